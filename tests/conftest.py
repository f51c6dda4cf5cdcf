"""Fixtures that several test files share, and how patient hypothesis is."""

import functools
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.object_server.fixtures import bucket, object_server

__all__ = ["bucket", "llama_run", "object_server"]

# Nobody's Hub, for this process and for those that it starts: a test that wants one starts its own.
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
os.environ.pop("HF_TOKEN", None)

# A busy machine is no fault: no example has a deadline.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(scope="module")
def one_torch_thread():
    """Two of torch's that wait for each other on a busy machine take a hundred times as long."""
    import torch  # seconds, for the tests that need it

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llama_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes the folder of a training run: a tiny random Llama that drifts, saved by transformers as `step-N`.

    Arguments: the torch dtype's name, the steps, further fields of the config. The same arguments give the same
    folder all session long, so tests must not write there.
    """

    @functools.cache
    def make(dtype: str = "float32", steps: tuple[int, ...] = (100, 200, 300), **config: object) -> Path:
        import torch  # seconds, for the tests that need it
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        run = tmp_path_factory.mktemp("run")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **config}))
            for step in steps:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(torch.randn_like(parameter), alpha=0.05)
                deepcopy(model).to(getattr(torch, dtype)).save_pretrained(run / f"step-{step}")
        return run

    return make

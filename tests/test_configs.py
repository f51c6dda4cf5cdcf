"""Configs with their defaults, against transformers' own classes."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, MixtralConfig

from merger import configs
from merger.configs import made, resolved
from merger.errors import NotInstalled, UnsupportedModel
from tests import tiny


def test_every_default_of_the_family_is_written() -> None:
    full = resolved({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}, "m")
    assert (full["rms_norm_eps"], full["rope_parameters"]["rope_theta"], full["num_key_value_heads"]) == (1e-6, 1e4, 4)
    assert "_name_or_path" not in full
    assert LlamaConfig(**full).to_dict() == LlamaConfig(hidden_size=64, num_attention_heads=4).to_dict()


def test_the_old_keys_are_understood() -> None:
    full = resolved({"model_type": "llama", "rope_theta": 5e5, "torch_dtype": "bfloat16"}, "m")
    assert full["rope_parameters"]["rope_theta"] == 5e5
    assert full["dtype"] == "bfloat16"


def test_another_family_gets_what_was_given_and_its_own_defaults() -> None:
    full = made("mixtral", {"hidden_size": 64, "rms_norm_eps": 1e-6, "num_local_experts": 4, "mlp_bias": False})
    assert (full["hidden_size"], full["rms_norm_eps"], full["num_local_experts"]) == (64, 1e-6, 4)
    assert "mlp_bias" not in full
    assert full["model_type"] == "mixtral"
    assert full["num_experts_per_tok"] == MixtralConfig().num_experts_per_tok


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (None, "has no config.json"),
        ({}, "with a model_type"),
        ({"model_type": "mystery"}, "'mystery' is not known to transformers"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}, "is quantized"),
        ({"model_type": "llama", "hidden_size": "wide"}, "config.json is not one of llama"),
    ],
)
def test_what_is_no_config_is_refused(config: dict | None, problem: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        resolved(config, "m")
    assert problem in str(caught.value)


CONFIG = {"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4, "rope_theta": 5e5}


def test_a_process_without_torch_gives_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    here = [resolved(CONFIG, "m"), made("qwen2_moe", {**CONFIG, "mlp_bias": False})]
    configs._answer.cache_clear()
    monkeypatch.delitem(sys.modules, "transformers")
    assert [resolved(CONFIG, "m"), made("qwen2_moe", {**CONFIG, "mlp_bias": False})] == here
    with pytest.raises(UnsupportedModel, match="'mystery' is not known"):
        resolved({"model_type": "mystery"}, "m")
    configs._child().kill()
    configs._child().wait()
    with pytest.raises(UnsupportedModel, match="could not be asked: its process has died"):
        resolved({"model_type": "llama"}, "m")
    configs._child().stdout.close()
    with contextlib.suppress(BrokenPipeError):
        configs._child().stdin.close()
    configs._answer.cache_clear()
    configs._child.cache_clear()


def test_planning_surgery_loads_no_torch(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama")
    (tmp_path / "recipe.yaml").write_text(json.dumps({"method": "expand", "source": str(source), "groups": 2}))
    code = (
        "import sys; from merger.cli.main import merger_command; "
        f"merger_command(['plan', {str(tmp_path / 'recipe.yaml')!r}], standalone_mode=False); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "result      exact by construction" in done.stdout


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    configs._answer.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers.models.auto.configuration_auto", None)
    with pytest.raises(NotInstalled, match="pip install"):
        resolved({"model_type": "llama"}, "m")
    configs._answer.cache_clear()

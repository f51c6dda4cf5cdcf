"""What `merger plan` and `merger run` say of tensors that are made as a whole, and `merger extract-lora`."""

import json

import numpy as np
import pytest

from merger.errors import NotEnoughMemory, RequestError
from tests.checkpoints import read_raw, write_model
from tests.cli.test_verbs import merger

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def models(tmp_path):
    random = np.random.default_rng(0)
    for name in ("base", "a", "b"):
        write_model(tmp_path / name, {NAME: random.normal(size=(300, 200)).astype("f4")}, {"model_type": "x"})
    (tmp_path / "recipe.yaml").write_text(
        f"method: iso_c\nbase: {tmp_path}/base\nmodels: [{tmp_path}/a, {tmp_path}/b]\n"
        f"output: {{path: {tmp_path}/out}}\n"
    )
    return tmp_path


def test_the_plan_shows_the_largest(models):
    shown = merger("plan", models / "recipe.yaml").output
    [line] = [line for line in shown.splitlines() if line.startswith("whole")]
    assert f"({NAME}), 240.00 kB beside the result for a while" in line
    assert "arXiv 2511.21437" in shown
    data = json.loads(merger("plan", models / "recipe.yaml", "--json", "--device", "cpu").output)["wholes"]
    assert (data["count"], data["largest"], data["scratch_bytes"], data["device"]) == (1, NAME, 240_000, "cpu")
    assert data["bytes"] > 8 * 300 * 200
    average = merger("average", models / "a", models / "b", "-o", models / "mean", "--json")
    assert average.exit_code == 0
    (models / "mean.yaml").write_text(f"method: average\ncheckpoints: [{models}/a, {models}/b]\noutput: {{path: x}}\n")
    assert json.loads(merger("plan", models / "mean.yaml", "--json").output)["wholes"] is None


def test_a_run_on_the_processor_and_the_refusal_of_a_gpu(models):
    for verb in ("plan", "run"):
        refused = merger(verb, models / "recipe.yaml", "--device", "cuda")
        assert isinstance(refused.exception, RequestError)
        assert "torch sees no GPU" in str(refused.exception)
    assert not (models / "out").exists()
    assert merger("run", models / "recipe.yaml", "--device", "cpu").exit_code == 0
    assert not (models / "out" / ".merger").exists()


def test_too_little_memory_is_refused_in_the_plan(models, monkeypatch):
    monkeypatch.setattr("merger.spilling.free_memory", lambda: 1000)
    assert isinstance(merger("plan", models / "recipe.yaml", "--memory", "1MiB").exception, NotEnoughMemory)


def test_extract_lora_prints_its_recipe(models):
    done = merger("extract-lora", models / "a", models / "base", "--rank", 4, "-o", models / "adapter")
    assert done.exit_code == 0, done.output
    assert "method: extract_lora" in done.output
    raw = read_raw(models / "adapter" / "adapter_model.safetensors")
    assert sorted(shape for _, shape, _ in raw.values()) == [(4, 200), (300, 4)]
    assert json.loads((models / "adapter" / "adapter_config.json").read_text())["r"] == 4

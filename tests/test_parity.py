"""The proof by logits: what it compares, what it says, and that it notices mistakes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merger import parity
from merger.checkpoint import Checkpoint, Origin, root_of
from merger.errors import VerificationFailed
from merger.expression import Filled
from merger.logits import compare
from merger.parity import parity_check, sample
from merger.sizes import active, parameters
from tests import tiny
from tests.methods.making import make


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("parity") / "source", "llama", "bfloat16")


def proof(outcome) -> str:
    [check] = [check for check in outcome.checks if check.name == "parity"]
    return check.detail


@pytest.mark.parametrize("mode", ["full", "layers"])
def test_expansion_is_proven_equal(tmp_path: Path, source: Path, mode: str) -> None:
    outcome = make({"method": "expand", "source": str(source), "groups": 2}, tmp_path / "out", parity=mode)
    where = " of layers 0, 2, 3, 4" if mode == "layers" else ""
    before, after = (sum(t.numel() for t in tiny.stored(folder).values()) for folder in (source, tmp_path / "out"))
    assert proof(outcome) == (
        f"logits{where} equal bit for bit (float32, 64 tokens); exact by construction: the new layers 2, 5 add zero to "
        f"the residual stream; parameters {before:,} -> {after:,}, active {before:,} -> {after:,}"
    )
    assert "logits" in (tmp_path / "out" / "report.html").read_text()
    assert not list((tmp_path / "out").glob(".merger*"))


@pytest.mark.parametrize("mode", ["auto", "layers"])
def test_upcycling_is_proven_close(tmp_path: Path, source: Path, mode: str) -> None:
    outcome = make({"method": "upcycle", "source": str(source), "experts": 4}, tmp_path / "out", parity=mode)
    assert " differ by up to " in proof(outcome)
    assert "exact but for rounding: all experts of a token are the same MLP" in proof(outcome)
    experts, dense = 4 * 3 * 32 * 48, 4 * 4 * 32  # of four layers: one expert, routers
    assert active(outcome.plan.checkpoint) == parameters(outcome.plan.checkpoint) - 2 * experts
    total = parameters(root_of(outcome.plan.checkpoint).checkpoint)
    assert parameters(outcome.plan.checkpoint) == total + 3 * experts + dense


def test_what_is_not_the_same_function_is_measured_but_no_failure(tmp_path: Path, source: Path) -> None:
    recipe = {"method": "upcycle", "source": str(source), "experts": 4, "drop": 0.5}
    outcome = make(recipe, tmp_path / "out", parity="auto")
    assert "not the same function: experts are drawn anew in part (drop)" in proof(outcome)
    assert all(check.passed for check in outcome.checks)


def test_a_chain_is_compared_with_its_beginning(tmp_path: Path, source: Path) -> None:
    average = {"method": "average", "checkpoints": [str(source), str(source)]}
    recipe = {"method": "upcycle", "experts": 4, "source": {"method": "expand", "groups": 2, "source": average}}
    for mode in ("full", "layers"):
        outcome = make(recipe, tmp_path / mode, parity=mode)
        root = root_of(outcome.plan.checkpoint)
        assert (root.claim, root.layers) == ("close", (0, 1, None, 2, 3, None))
        assert parameters(root.checkpoint) == sum(tensor.numel() for tensor in tiny.stored(source).values())
        assert "add zero to the residual stream; all experts" in proof(outcome)


def test_in_another_dtype_it_is_compared_with_the_source_in_that_dtype(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama")
    recipe = {"method": "expand", "source": str(source), "groups": 2, "output": {"dtype": "bfloat16"}}
    assert "equal bit for bit" in proof(make(recipe, tmp_path / "out", parity="auto"))


def test_methods_without_surgery_and_off_prove_nothing(tmp_path: Path, source: Path) -> None:
    for recipe in ({"method": "average", "checkpoints": [str(source)]}, {"method": "expand", "groups": 2}):
        surgery = recipe["method"] == "expand"
        fields = {"source": str(source)} if surgery else {}
        outcome = make({**recipe, **fields}, tmp_path / recipe["method"], parity="off" if surgery else "auto")
        assert "parity" not in [check.name for check in outcome.checks]


def test_a_wrong_weight_is_noticed(tmp_path: Path, source: Path) -> None:
    outcome = make({"method": "expand", "source": str(source), "groups": 2}, tmp_path / "out")
    [shard] = outcome.plan.shards
    [zero] = [entry for entry in shard.entries if entry.name == "model.layers.2.mlp.down_proj.weight"]
    with (tmp_path / "out" / shard.name).open("r+b") as file:
        file.seek(len(shard.header) + zero.offset)
        file.write(b"\x80\x3f")  # 1.0
    check = parity_check(outcome.plan, tmp_path / "out")
    assert not check.passed
    assert "differ by up to" in check.detail


def test_a_wrong_config_fails_the_job_and_leaves_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from merger.methods import depth

    def wrong(*args):
        return {**depth_with_layers(*args), "rms_norm_eps": 1e-2}

    depth_with_layers = depth.with_layers
    monkeypatch.setattr(depth, "with_layers", wrong)
    with pytest.raises(VerificationFailed, match="check of parity failed: logits differ by up to"):
        make({"method": "expand", "source": str(source), "groups": 2}, tmp_path / "out", parity="auto")
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_load_is_told(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = make({"method": "expand", "source": str(source), "groups": 2}, tmp_path / "out")
    broken = replace(outcome.plan.checkpoint, config={**outcome.plan.checkpoint.config, "hidden_size": 31})
    check = parity_check(replace(outcome.plan, checkpoint=broken), tmp_path / "out")
    assert not check.passed
    assert "could not be compared" in check.detail
    monkeypatch.setattr(parity, "find_spec", lambda _: None)
    assert "not compared: torch is not installed" in parity_check(outcome.plan, tmp_path / "out").detail


def test_keys_that_are_missing_or_left_over_are_told(tmp_path: Path, source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((source / "config.json").read_text())
    tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(1)
    del tensors["model.norm.weight"]
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    found = compare(source, other)
    assert found["missing"] == ["model.norm.weight"]
    assert found["unexpected"] == ["model.layers.0.mlp.extra.weight"]
    assert json.dumps(found)


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [((0,), (0,)), ((0, 1, 2, 3), (0, 2, 3)), ((0, None), (0, 1)), ((0, 1, None, 2, 3, None), (0, 2, 3, 4))],
)
def test_a_sample_has_the_ends_the_middle_and_a_new_layer(layers: tuple, chosen: tuple) -> None:
    assert sample(layers) == chosen


def test_of_several_claims_the_weakest_counts() -> None:
    first = Checkpoint({"x": Filled("F32", (1,))}, {}, {}, ())
    second = replace(first, origin=Origin(first, "equal", "one", (0, None, 1)))
    third = replace(first, origin=Origin(second, "close", "two", (0, 1, 2, 2), 1e-2))
    assert root_of(third) == Origin(first, "close", "one; two", (0, None, 1, 1), 1e-2)
    assert root_of(first) is None

"""Checking a checkpoint on disk: damage, values, and whether transformers finds every tensor."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from merger.cli.terminal import Silent
from merger.errors import FormatError
from merger.recipe import make_document
from merger.run import Options, run
from merger.verify import check_folder
from tests.checkpoints import write_model


def verdicts(folder: Path, **options) -> dict[str, tuple[bool, str]]:
    return {check.name: (check.passed, check.detail) for check in check_folder(folder, **options)}


@pytest.fixture
def result(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for i in (1, 2):
        write_model(
            tmp_path / f"step-{i}",
            {"x": rng.standard_normal(3_000_000).astype(np.float32), "y": np.ones(3, np.float16)},
            {},
        )
    recipe = {"method": "average", "checkpoints": str(tmp_path / "step-*"), "output": {"path": str(tmp_path / "out")}}
    run(make_document(recipe), Options(), Silent())
    return tmp_path / "out"


def test_a_result_is_sound(result):
    assert {name: passed for name, (passed, _) in verdicts(result).items()} == {
        "files": True,
        "finite": True,
        "checksums": True,
    }


@pytest.mark.parametrize("place", [5_000, 6_000_001, -1])
def test_one_flipped_bit_is_found(result, place):
    path = result / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    passed, detail = verdicts(result)["checksums"]
    assert (passed, detail) == (False, "model.safetensors is not the file that was written")


def test_a_truncated_file_is_refused(result):
    path = result / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="truncated"):
        check_folder(result)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("shift", [0, 1])
def test_values_that_are_not_finite_are_found_in_any_folder(tmp_path, dtype, shift):
    """Also where a foreign file does not align its tensors, and at the edges of what is read at once."""
    values = np.ones(5_000_000, dtype)
    values[[0, 1_048_576, 2_097_151, -1]] = np.nan, np.inf, -np.inf, np.nan
    name = "n" * (1 + shift)  # moves the data by a byte
    write_model(tmp_path, {name: values, "other": np.ones(3, dtype)}, {})
    assert verdicts(tmp_path)["finite"] == (False, f"{name}: 4 values are NaN or infinite")


def test_transformers_finds_every_tensor(llama_run):
    assert verdicts(llama_run("float32") / "step-100", load=True)["loads"][0]


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_a_tensor_too_few_or_too_many_is_found_by_loading(llama_run, tmp_path, kind):
    folder = shutil.copytree(llama_run("float32") / "step-100", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    if kind == "missing":
        del tensors["model.norm.weight"]
    else:
        tensors["model.more.weight"] = np.ones(3, np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    passed, detail = verdicts(folder, load=True)["loads"]
    assert not passed
    assert detail == f"{kind} {'model.norm.weight' if kind == 'missing' else 'model.more.weight'}"


def test_a_class_that_transformers_does_not_have_is_said(tmp_path):
    write_model(tmp_path, {"x": np.ones(3, np.float32)}, {"architectures": ["NoSuchModel"]})
    passed, detail = verdicts(tmp_path, load=True)["loads"]
    assert not passed
    assert "does not know NoSuchModel" in detail


def test_a_shard_that_is_gone_is_found(result):
    manifest = json.loads((result / "merger.json").read_text())
    manifest["shards"].append({**manifest["shards"][0], "file": "model-2.safetensors"})
    (result / "merger.json").write_text(json.dumps(manifest))
    assert verdicts(result)["checksums"] == (False, "model-2.safetensors is missing")

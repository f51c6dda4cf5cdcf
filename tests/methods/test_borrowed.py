"""Rules that mergekit computes: bit for bit what mergekit itself makes of the same models."""

from pathlib import Path

import numpy as np
import pytest

from merger.budget import allot
from merger.checkpoint import Checkpoint, open_checkpoint
from merger.engine import write_shards
from merger.errors import NotInstalled
from merger.methods import borrowed
from merger.methods.merging import RULES
from merger.methods.rules import Group
from merger.plan import make_plan
from tests.checkpoints import Raw, read_raw, write_model
from tests.methods.making import make
from tests.peer import merge
from tests.tiny import save

MODELS = ["base", "a", "b", "c"]

# name of a case: method, models beside the base, whether there is a base, shared numbers, numbers for each
CASES = {
    "ram": ("ram", "abc", True, {"epsilon": 0.05}, {}),
    "ram_one": ("ram", "a", True, {}, {}),
    "ramplus": ("ramplus_tl", "abc", True, {"r": 0.3, "alpha": 0.4, "epsilon": 0.05}, {}),
    "fusion": ("arcee_fusion", "b", True, {}, {}),
    "columns": ("nuslerp", "ab", True, {"nuslerp_flatten": False, "nuslerp_row_wise": True}, {"weight": (1.0, 3.0)}),
}
# the dtype that is computed in, the result's
DTYPES = {"F32": ("float32", "float32"), "BF16": ("bfloat16", "bfloat16"), "mixed": ("float32", "bfloat16")}
RUNS = [*((case, kind) for case in CASES for kind in ("F32", "BF16")), ("ram", "mixed")]
NAMES = {"float32": "F32", "bfloat16": "BF16"}


def config_of(folder: Path, case: str, kind: str) -> dict:
    method, names, has_base, shared, each = CASES[case]
    dtype, out = DTYPES[kind]
    models = [
        {"model": str(folder / name), "parameters": {key: values[i] for key, values in each.items()}}
        for i, name in enumerate(names)
    ]
    base = {"base_model": str(folder / "base")} if has_base else {}
    return {"merge_method": method, "models": models, **base, "parameters": shared, "dtype": dtype, "out_dtype": out}


@pytest.fixture(scope="module")
def peers(tmp_path_factory) -> Path:
    """Four tiny llamas, and what mergekit makes of them in every case."""
    folder = tmp_path_factory.mktemp("peers")
    for seed, name in enumerate(MODELS):
        save(folder / name, "llama", seed=seed)
    for case, kind in RUNS:
        merge(config_of(folder, case, kind), folder / f"{case}-{kind}")
    return folder


def fused(folder: Path, output: Path, seed: int) -> dict[str, Raw]:
    """arcee_fusion of the models b and base, by our rule alone."""
    base, other = (open_checkpoint(folder / name).tensors for name in ("base", "b"))
    groups = [Group(n, (other[n],), base[n], {}, {}, "F32", "F32", seed) for n in base]
    tensors = {group.name: RULES["arcee_fusion"].make(group) for group in groups}
    plan = make_plan(Checkpoint(tensors, {}, {}, ()), {"method": "x"}, 10**9)
    (output / ".merger").mkdir(parents=True)
    write_shards(plan.shards, output, allot(plan, threads=2), plan.fingerprint)
    return read_raw(output / "model.safetensors")


@pytest.mark.parametrize(("case", "kind"), RUNS)
def test_the_same_bits_as_mergekit(peers, tmp_path, case, kind):
    make(config_of(peers, case, kind), tmp_path / "out")
    found = read_raw(tmp_path / "out" / "model.safetensors")
    [expected] = [read_raw(path) for path in (peers / f"{case}-{kind}").glob("*.safetensors")]
    assert found.keys() == expected.keys()
    for name, (dtype, shape, content) in expected.items():
        assert found[name][:2] == (dtype, shape) == (NAMES[DTYPES[kind][1]], shape)
        if case != "columns" or len(shape) > 1:  # what has one axis goes by our own formula
            assert found[name][2] == content, name


def test_a_sample_follows_from_the_seed(tmp_path):
    """Above a million elements arcee_fusion samples its threshold: by the seed and the name, whoever runs beside it."""
    random = np.random.default_rng(0)
    for name in ("base", "b"):
        values = random.normal(size=(1100, 1000)).astype("f4")
        write_model(tmp_path / name, {"x": values, "y": values, "z": values}, {})
    runs = [fused(tmp_path, tmp_path / f"{i}", seed) for i, seed in enumerate((0, 0, 1))]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0]["x"] != runs[0]["y"]


def test_without_mergekit_it_is_refused_before_anything_is_read(peers, tmp_path, monkeypatch):
    monkeypatch.setattr(borrowed, "VERSION", "0.0.1")
    with pytest.raises(NotInstalled, match=r"computed by mergekit 0\.0\.1, 0\.1\.5 is installed") as caught:
        make(config_of(peers, "ram", "F32"), tmp_path / "out")
    assert caught.value.remedy == "pip install 'merger[mergekit]'"
    assert not (tmp_path / "out").exists()

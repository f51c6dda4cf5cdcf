"""Rules that mergekit computes: bit for bit what mergekit itself makes of the same models."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from merger.budget import allot
from merger.checkpoint import Checkpoint, open_checkpoint
from merger.engine import write_shards
from merger.errors import NotInstalled
from merger.methods import borrowed
from merger.methods.merging import RULES
from merger.methods.rules import Group, Rule, table
from merger.plan import make_plan
from tests.checkpoints import read_raw, write_model
from tests.tiny import save

MODELS = ["base", "a", "b", "c"]
NUSLERP = table(Rule("nuslerp", "NuSLERP", "optional", borrowed.nuslerp, {}, {}))["nuslerp"]

# name of a case: method, models beside the base, whether there is a base, shared numbers, numbers for each
CASES = {
    "ram": ("ram", "abc", True, {"epsilon": 0.05}, {}),
    "ram_one": ("ram", "a", True, {}, {}),
    "ramplus": ("ramplus_tl", "abc", True, {"r": 0.3, "alpha": 0.4, "epsilon": 0.05}, {}),
    "fusion": ("arcee_fusion", "b", True, {}, {}),
    "rows": ("nuslerp", "ab", False, {"nuslerp_flatten": False}, {"weight": (0.7, 0.2)}),
    "columns": ("nuslerp", "ab", True, {"nuslerp_flatten": False, "nuslerp_row_wise": True}, {"weight": (1.0, 3.0)}),
}
# the dtype that is computed in, the result's
DTYPES = {"F32": ("float32", "float32"), "BF16": ("bfloat16", "bfloat16"), "mixed": ("float32", "bfloat16")}
RUNS = [*((case, kind) for case in CASES for kind in ("F32", "BF16")), ("ram", "mixed")]
NAMES = {"float32": "F32", "bfloat16": "BF16"}

_RUN = """
import json, sys
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
torch.set_num_threads(1)
for output, config in json.load(open(sys.argv[1])).items():
    run_merge(MergeConfiguration.model_validate(config), output,
              MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True))
"""


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
    configs = {str(folder / f"{case}-{kind}"): config_of(folder, case, kind) for case, kind in RUNS}
    (folder / "configs.json").write_text(json.dumps(configs))
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _RUN, str(folder / "configs.json")],
        check=True,
        capture_output=True,
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(folder)},
    )
    return folder


def merged(sources: Mapping[str, Checkpoint], case: str, kind: str, output: Path, seed: int = 0) -> Path:
    """The same by our rules, group by group."""
    method, names, has_base, shared, each = CASES[case]
    rule = NUSLERP if method == "nuslerp" else RULES[method]
    numbers = {**{key: parameter.default for key, parameter in rule.shared.items()}, **shared}
    dtype, out = (NAMES[name] for name in DTYPES[kind])
    tensors = {
        name: rule.make(
            Group(
                name,
                tuple(sources[n].tensors[name] for n in names),
                sources["base"].tensors[name] if has_base else None,
                numbers,
                each,
                out,
                dtype,
                seed,
            )
        )
        for name in sources["a"].tensors
    }
    plan = make_plan(Checkpoint(tensors, {}, {}, ()), {"method": case}, 10**9)
    (output / ".merger").mkdir(parents=True)
    write_shards(plan.shards, output, allot(plan, threads=2), plan.fingerprint)
    return output / "model.safetensors"


@pytest.mark.parametrize(("case", "kind"), RUNS)
def test_the_same_bits_as_mergekit(peers, tmp_path, case, kind):
    sources = {name: open_checkpoint(peers / name) for name in MODELS}
    found = read_raw(merged(sources, case, kind, tmp_path / "out"))
    [expected] = [read_raw(path) for path in (peers / f"{case}-{kind}").glob("*.safetensors")]
    assert found.keys() == expected.keys()
    for name, (dtype, shape, content) in expected.items():
        assert found[name][:2] == (dtype, shape) == (NAMES[DTYPES[kind][1]], shape)
        assert found[name][2] == content, name


def test_a_sample_follows_from_the_seed(tmp_path):
    """Above a million elements arcee_fusion samples its threshold: by the seed and the name, whoever runs beside it."""
    random = np.random.default_rng(0)
    for name in ("base", "b"):
        values = random.normal(size=(1100, 1000)).astype("f4")
        write_model(tmp_path / name, {"x": values, "y": values, "z": values}, {})
    sources = {name: open_checkpoint(tmp_path / name) for name in ("base", "b")}
    sources["a"] = sources["b"]
    runs = [read_raw(merged(sources, "fusion", "F32", tmp_path / f"{i}", seed)) for i, seed in enumerate((0, 0, 1))]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0]["x"] != runs[0]["y"]


def test_without_mergekit_it_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    write_model(tmp_path / "a", {"x": np.ones((2, 2), "f4")}, {})
    sources = dict.fromkeys(["base", "a", "b", "c"], open_checkpoint(tmp_path / "a"))
    monkeypatch.setattr(borrowed, "VERSION", "0.0.1")
    with pytest.raises(NotInstalled, match=r"computed by mergekit 0\.0\.1, 0\.1\.5 is installed") as caught:
        merged(sources, "ram", "F32", tmp_path / "out")
    assert caught.value.remedy == "pip install 'merger[mergekit]'"
    assert not (tmp_path / "out").exists()

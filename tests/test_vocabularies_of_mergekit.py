"""The vocabularies of merges, against those that mergekit itself makes of the same models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from merger.checkpoint import open_checkpoint
from merger.methods.combination import weighted_sum
from merger.vocabularies import united
from merger.vocabulary_settings import TokenizerSettings
from tests.tiny import stored
from tests.vocabularies import CODE, ENGLISH, tensors, tokenizer, vocabulary, write_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"),
]

MERGE = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for name, config in yaml.safe_load(open(sys.argv[1])).items():
    run_merge(MergeConfiguration.model_validate(config), sys.argv[2] + "/" + name, MergeOptions(write_model_card=False))
"""
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}
TOKENS = {
    "<think>": {"source": {"kind": "zero"}},
    "<tool>": {"source": {"kind": "model_token", "model": "a", "token": "Ġthe"}, "force": True},
    "<|end|>": {"source": {"kind": "model_token", "model": "b", "token_id": 7}},
    "</s>": {"source": "b", "force": True},
    "<new>": {"source": {"kind": "model_token", "model": "c", "token": "<s>"}},
}
OWN_TOKENS = {"<think>": {"source": {"kind": "zero"}, "force": True}, "</s>": TOKENS["</s>"]}
# kind of tokenizer, base, `tokenizer`
CASES = {
    "union": ("BPE", "a", {"source": "union"}),
    "union on b": ("BPE", "b", {"source": "union"}),
    "union without base": ("BPE", None, {"source": "union"}),
    "words": ("WordPiece", "a", {"source": "union"}),
    "pieces": ("Unigram", "c", {"source": "union"}),
    "base": ("BPE", "a", {"source": "base"}),
    "of a model": ("BPE", "a", {"source": "b"}),
    "tokens": ("BPE", "a", {"source": "union", "tokens": TOKENS}),
    # Only tokens that the base has: for others of a tokenizer that is no union mergekit fails with a KeyError.
    "tokens of the base": ("BPE", "a", {"source": "base", "tokens": OWN_TOKENS}),
    "padded": ("BPE", "a", {"source": "base", "pad_to_multiple_of": 128}),
    "trimmed": ("trimmed", "a", {"source": "union"}),
}


def _models(root: Path) -> None:
    for kind, (first, other) in {"BPE": (330, 320), "WordPiece": (110, 100), "Unigram": (90, 90)}.items():
        write_model(root / kind / "a", tokenizer(kind, ENGLISH, first, ("<think>",), ("<|call|>",)), 1)
        write_model(root / kind / "b", tokenizer(kind, CODE, other, ("<tool>",), ("<|call|>", "<|end|>")), 2)
        write_model(root / kind / "c", tokenizer(kind, ENGLISH + CODE, other - 5, ("<tool>",)), 3)
    own = tokenizer("BPE", ENGLISH, 330, ("<think>",), ("<|call|>",))
    # Added tokens only: of words mergekit keeps the merges, and fails.
    write_model(root / "trimmed" / "a", own, 1, rows=len(own) - 1)
    write_model(root / "trimmed" / "b", tokenizer("BPE", CODE, 320, ("<tool>",)), 2, rows=384)
    write_model(root / "trimmed" / "c", tokenizer("BPE", ENGLISH + CODE, 300), 3)


def _absolute(value, folder):
    """References as paths."""
    if isinstance(value, dict):
        return {key: _absolute(it, folder) for key, it in value.items()}
    return str(folder / value) if value in ("a", "b", "c") else value


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """The models, and what mergekit makes of every case, in one process."""
    root, out = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("mergekit")
    _models(root)
    configs = {}
    for name, (kind, base, fields) in CASES.items():
        folder = root / kind
        models = [{"model": str(folder / it), "parameters": {"weight": weight}} for it, weight in WEIGHTS.items()]
        config = {
            "merge_method": "linear",
            "models": models,
            "dtype": "float32",
            "tokenizer": _absolute(fields, folder),
        }
        configs[name] = {**config, "base_model": str(folder / base)} if base else config
    (out / "cases.yaml").write_text(yaml.safe_dump(configs))
    command = [sys.executable, "-c", MERGE, str(out / "cases.yaml"), str(out)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "PYTHONHASHSEED": "0"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return root, out


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_mergekit_token_by_token(merged, name):
    root, out = merged
    kind, base, fields = CASES[name]
    models = [open_checkpoint(root / kind / it) for it in WEIGHTS]
    number = list(WEIGHTS).index
    made, found = united(models, number(base) if base else None, TokenizerSettings.model_validate(fields), number)
    ours, theirs = tensors(weighted_sum(made, list(WEIGHTS.values()))), stored(out / name)
    ids = vocabulary(out / name)
    assert set(ids) == set(found.ids)
    config = json.loads((out / name / "config.json").read_text())
    assert config["vocab_size"] == found.size
    mine = [found.ids[token] for token in ids]
    for tensor, values in ours.items():
        other = theirs[tensor].double().numpy()
        assert values.shape == other.shape
        if values.shape[0] == found.size:
            np.testing.assert_allclose(values[mine], other[list(ids.values())], rtol=1e-5, atol=1e-7, err_msg=tensor)
            np.testing.assert_allclose(values[len(ids) :], other[len(ids) :], rtol=1e-4, atol=1e-6, err_msg=tensor)
        else:
            np.testing.assert_allclose(values, other, rtol=1e-5, atol=1e-7, err_msg=tensor)

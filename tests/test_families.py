"""Merges of two tiny models of each family: the names of their files, the values, and whether transformers loads them.

docs/families.md is the table of all.
"""

import json
import subprocess
import sys

import pytest

from tests.families import MUST_BE_RIGHT, Row, examine
from tests.family_files import kinds
from tests.tiny import stored

# What each must hold beside what every model has: weights that a merge by the names of a model in memory loses.
HOLDS = {
    "aya_vision": "language_model.model.layers.1.mlp.up_proj.weight",
    "bert": "cls.predictions.transform.dense.weight",
    "bigbird_pegasus": "lm_head.weight",  # stored, though it is tied
    "blt": "model.global_transformer.layers.1.mlp.up_proj.weight",  # stacks of layers within one module
    "clip": "vision_model.encoder.layers.1.mlp.fc2.weight",
    "cohere": "model.layers.1.input_layernorm.weight",
    "deepseek_v2": "model.layers.1.mlp.experts.3.up_proj.weight",
    "deepseek_v3": "model.layers.1.mlp.experts.3.up_proj.weight",
    "dots1": "model.layers.1.mlp.experts.3.up_proj.weight",
    "ernie4_5_moe": "model.layers.1.mlp.experts.3.up_proj.weight",
    "falcon": "transformer.h.1.self_attention.query_key_value.weight",
    "gpt_neox": "gpt_neox.layers.1.attention.query_key_value.weight",
    "hrm_text": "model.L_module.layers.1.mlp.down_proj.weight",
    "llava": "language_model.model.layers.1.mlp.up_proj.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w1.weight",
    "paligemma": "language_model.model.layers.1.mlp.up_proj.weight",
    "qwen2_vl": "visual.blocks.1.mlp.fc1.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.3.up_proj.weight",
    "t5": "decoder.block.1.layer.2.DenseReluDense.wo.weight",
    "whisper": "model.decoder.layers.1.fc1.weight",
}


@pytest.mark.parametrize("kind", HOLDS)
def test_no_tensor_of_a_family_is_lost_or_renamed(kind, tmp_path):
    row = examine(kind, tmp_path)
    assert row.is_right, row
    assert HOLDS[kind] in stored(tmp_path / "merged")


@pytest.mark.slow
def test_every_family_that_can_be_made_is_right():
    done = subprocess.run([sys.executable, "-m", "tests.families"], capture_output=True, text=True, check=True)
    rows = {row["kind"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert list(rows) == kinds()
    built = {kind: row for kind, row in rows.items() if row["tensors"]}
    assert set(MUST_BE_RIGHT) <= set(built)
    assert len(built) > 150
    wrong = [row for row in built.values() if not Row(**row).is_right]
    assert not wrong

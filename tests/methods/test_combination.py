"""Which checkpoints may be added, and what becomes of what is not a floating weight."""

import json

import numpy as np
import pytest

from merger.checkpoint import open_checkpoint
from merger.errors import IncompatibleSources, UnsupportedModel
from merger.expression import Identical, Stored
from merger.methods.combination import weighted_sum
from merger.plan import make_plan
from merger.preflight import check_buffers
from merger.recipe import make_document, resolve
from merger.run import Options, plan_of
from tests.checkpoints import bfloat16, write_model

EMBEDDING = np.arange(12, dtype=np.float32).reshape(4, 3)
NORM = np.ones(3, np.float32)
TENSORS = {"model.embed_tokens.weight": EMBEDDING, "model.norm.weight": NORM}
HEAD = {"lm_head.weight": EMBEDDING + 1}


def summed(tmp_path, *models: tuple[dict, dict], side_files=({}, {})):
    """The even sum of models given as (tensors, config)."""
    folders = [
        write_model(tmp_path / f"m{i}", tensors, config, side_files=files)
        for i, ((tensors, config), files) in enumerate(zip(models, side_files, strict=True))
    ]
    return weighted_sum([open_checkpoint(folder, folder.name) for folder in folders], [0.5] * len(folders))


def test_the_head_that_some_store_is_left_out_where_all_tie_it(tmp_path):
    tied = {"tie_word_embeddings": True}
    made = summed(tmp_path, (TENSORS, tied), ({**TENSORS, **HEAD}, tied))
    assert sorted(made.tensors) == sorted(TENSORS)
    assert made.config == tied
    assert any("lm_head.weight is left out" in note for note in made.notes)


def test_the_head_is_stored_apart_where_only_some_tie_it(tmp_path):
    made = summed(
        tmp_path, (TENSORS, {"tie_word_embeddings": True}), ({**TENSORS, **HEAD}, {"tie_word_embeddings": False})
    )
    head = made.tensors["lm_head.weight"]
    names = [open_checkpoint(tmp_path / f"m{i}").tensors for i in (0, 1)]
    wanted = [names[0]["model.embed_tokens.weight"], names[1]["lm_head.weight"]]
    assert [(leaf.file.path, leaf.offset) for leaf in head.leaves()] == [
        (leaf.file.path, leaf.offset) for leaf in wanted
    ]
    assert made.config == {"tie_word_embeddings": False}


def test_a_head_that_is_missing_without_being_tied_is_refused(tmp_path):
    untied = {"tie_word_embeddings": False}
    with pytest.raises(IncompatibleSources, match="is missing in m0"):
        summed(tmp_path, (TENSORS, untied), ({**TENSORS, **HEAD}, untied))


def test_other_configs_are_a_warning_that_names_the_key(tmp_path):
    made = summed(
        tmp_path, (TENSORS, {"rope_theta": 1e4, "use_cache": True}), (TENSORS, {"rope_theta": 1e6, "use_cache": False})
    )
    assert made.warnings == ("config.json: rope_theta is 10000.0 in m0 and 1000000.0 in m1; the first is used",)
    assert made.config == {"rope_theta": 1e4, "use_cache": True}


def test_a_warning_is_a_refusal_when_strict(tmp_path):
    summed(tmp_path, (TENSORS, {"rope_theta": 1e4}), (TENSORS, {"rope_theta": 1e6}))
    document = make_document({"method": "average", "checkpoints": [str(tmp_path / "m0"), str(tmp_path / "m1")]})
    assert plan_of(document, Options())[0].checkpoint.warnings
    with pytest.raises(IncompatibleSources, match="rope_theta"):
        plan_of(document, Options(strict=True))


def test_running_statistics_are_those_of_the_newest(tmp_path):
    def model(i: int) -> dict:
        return {
            "bn.weight": NORM * i,
            "bn.running_mean": NORM * i,
            "bn.num_batches_tracked": np.array(i),
        }

    made = summed(tmp_path, (model(1), {}), (model(2), {}))
    for name in ("bn.running_mean", "bn.num_batches_tracked"):
        tensor = made.tensors[name]
        assert isinstance(tensor, Stored)
        assert tensor.file.path.parent.name == "m1"
    assert any("recompute" in note for note in made.notes)


@pytest.mark.parametrize("other", [[0, 1, 2], [0, 1, 3]])
def test_integers_must_be_the_same(tmp_path, other):
    made = summed(tmp_path, ({"ids": np.array([0, 1, 2])}, {}), ({"ids": np.array(other)}, {}))
    assert isinstance(made.tensors["ids"], Identical)
    plan = make_plan(made, {"method": "average"}, 10**9)
    if other == [0, 1, 2]:
        check_buffers(plan)
    else:
        with pytest.raises(IncompatibleSources, match=r"ids.*I64 and differs"):
            check_buffers(plan)


def test_mixed_dtypes_become_one_that_holds_both(tmp_path):
    made = summed(tmp_path, ({"x": bfloat16(NORM), "y": NORM}, {}), ({"x": NORM.astype(np.float16), "y": NORM}, {}))
    assert {name: tensor.dtype for name, tensor in made.tensors.items()} == {"x": "F32", "y": "F32"}
    assert any("1 tensors come in different dtypes" in note for note in made.notes)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F4", "F8_E8M0"])
def test_narrow_floats_without_scales_are_not_averaged(tmp_path, dtype):
    packed = (dtype, (2, 2), bytes(2 if dtype == "F4" else 4))
    with pytest.raises((IncompatibleSources, UnsupportedModel), match="mean nothing without their scales"):
        summed(tmp_path, ({"x": packed}, {}), ({"x": packed}, {}))


def test_one_model_of_weight_one_is_itself_whatever_it_holds(tmp_path):
    folder = write_model(tmp_path / "m", {"x": ("F8_E4M3", (2,), bytes(2))}, {"quantization_config": {}})
    checkpoint = open_checkpoint(folder)
    assert weighted_sum([checkpoint], [1.0]) is checkpoint


def test_tokenizers_that_differ_are_refused(tmp_path):
    files = [{"vocab.json": json.dumps({"a": i, "b": 1 - i})} for i in (0, 1)]
    with pytest.raises(IncompatibleSources, match="token 'a' has the id 0"):
        summed(tmp_path, (TENSORS, {}), (TENSORS, {}), side_files=files)


def test_corrections_of_routers_stay_in_float32(tmp_path):
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    for i in (0, 1):
        write_model(tmp_path / f"m{i}", {name: NORM, "w": NORM, "ids": np.array([1])}, {"dtype": "float32"})
    recipe = {"method": "average", "checkpoints": str(tmp_path / "m*"), "output": {"dtype": "bfloat16"}}
    made = resolve(make_document(recipe))
    assert {key: tensor.dtype for key, tensor in made.tensors.items()} == {name: "F32", "w": "BF16", "ids": "I64"}
    assert made.config == {"dtype": "bfloat16"}

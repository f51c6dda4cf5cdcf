"""Text to document: defaults, mistakes, changes, sizes, side files."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger.errors import IncompatibleSources, RecipeError
from merger.methods import METHODS
from merger.recipe import make_document, parse_document, resolve, size_in_bytes
from tests.checkpoints import write_model


@pytest.mark.parametrize("name", METHODS)
def test_every_example_is_a_document(name):
    document = parse_document(METHODS[name].example)
    assert document.recipe.method == name
    assert make_document(document.dump()).dump() == document.dump()


@pytest.mark.parametrize("name", METHODS)
def test_every_field_says_what_it_is(name):
    fields = METHODS[name].model_json_schema()["properties"]
    assert all(field.get("description") for key, field in fields.items() if key != "method")


def test_recipes_nest_and_defaults_are_written_out():
    document = parse_document("method: average\ncheckpoints: [x, {method: lawa, checkpoints: run/*}]\n")
    assert document.dump() == {
        "method": "average",
        "checkpoints": ["x", {"method": "lawa", "checkpoints": "run/*", "k": 6}],
        "normalize": True,
        "output": {"shard_size": "5GB"},
    }


def test_a_licence_is_accepted_in_the_recipe_or_not_at_all():
    document = parse_document("method: average\ncheckpoints: [x]\n", ["output.accept_license=true"])
    assert document.output.accept_license
    assert document.dump()["output"] == {"shard_size": "5GB", "accept_license": True}
    assert make_document(document.dump()) == document


def test_json_is_read_too():
    assert parse_document(json.dumps({"method": "lawa", "checkpoints": "x", "k": 3})).recipe.k == 3


def test_fields_are_changed_from_outside():
    changes = ["k=8", "output.dtype=float16", 'output.path="a: b"', "steps=[1, 2]"]
    document = parse_document("method: lawa\ncheckpoints: x\n", changes)
    assert (document.recipe.k, document.recipe.steps) == (8, [1, 2])
    assert (document.output.dtype, document.output.path) == ("float16", "a: b")


def test_changes_reach_into_lists():
    text = "merge_method: linear\nmodels: [{model: x}, {model: y, parameters: {weight: [1, 2]}}]\n"
    changes = ["models[1].parameters.weight[0]=3", "models[0].parameters.weight=0.5"]
    config = parse_document(text, [*changes, "dtype=float16"]).dump()["config"]
    assert [model["parameters"]["weight"] for model in config["models"]] == [0.5, [3, 2]]
    assert config["dtype"] == "float16"


@pytest.mark.parametrize("change", ["k", "k.more=1", "k[0]=1", "checkpoints[1]=y", "checkpoints[0].x=y"])
def test_changes_that_lead_nowhere_are_refused(change):
    with pytest.raises(RecipeError, match="--set"):
        parse_document("method: lawa\ncheckpoints: [x]\nk: 3\n", [change])


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), ("10", 10), (7, 7), ("2kb", 2000)]
)
def test_sizes(text, size):
    assert size_in_bytes(text) == size


@given(st.text(max_size=6).filter(lambda text: not text.strip()[:1].isdigit()))
def test_what_is_no_size_is_refused_as_such(text):
    with pytest.raises(ValueError, match="is not a size"):
        size_in_bytes(text)


def test_side_files_come_from_the_first_source_or_the_one_that_is_named(tmp_path):
    tensors = {"x": np.ones(2, np.float32)}
    for name in ("a", "b", "c"):
        write_model(tmp_path / name, tensors, {"from": name}, side_files={"generation_config.json": name})
    recipe = {"method": "average", "checkpoints": [str(tmp_path / "a"), str(tmp_path / "b")]}
    assert resolve(make_document(recipe)).config == {"from": "a"}
    made = resolve(make_document({**recipe, "output": {"side_files_from": str(tmp_path / "c")}}))
    assert made.config == {"from": "c"}
    assert made.side_files["generation_config.json"].read_text() == "c"


def test_licences_of_all_sources_are_side_files(tmp_path):
    tensors = {"x": np.ones(3, np.float32)}
    for name in "ab":
        write_model(tmp_path / name, tensors, {}, side_files={"LICENSE": f"that of {name}"})
    recipe = {"method": "average", "checkpoints": [str(tmp_path / name) for name in "ab"]}
    assert list(resolve(make_document(recipe)).side_files) == ["LICENSE", "LICENSE-2-b"]


def test_side_files_of_another_shape_or_vocabulary_are_refused(tmp_path):
    for name, size, ids in (("a", 2, {"x": 0}), ("b", 3, {"x": 0}), ("c", 2, {"y": 0})):
        write_model(tmp_path / name, {"x": np.ones(size, np.float32)}, {}, side_files={"vocab.json": json.dumps(ids)})
    for name, problem in (("b", "another shape of x"), ("c", "another vocabulary")):
        recipe = {
            "method": "average",
            "checkpoints": str(tmp_path / "a"),
            "output": {"side_files_from": str(tmp_path / name)},
        }
        with pytest.raises(IncompatibleSources, match=problem):
            resolve(make_document(recipe))

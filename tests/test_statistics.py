"""Folders of statistics: opened for a model, refused for others, with the place that is at fault."""

import json
from pathlib import Path

import numpy as np
import pytest

from merger.checkpoint import open_checkpoint
from merger.errors import FormatError, IncompatibleSources, SourceError
from merger.statistics import MANIFEST, open_statistics, read_manifest
from merger.storage.safetensors import read_header
from tests.checkpoints import write_model, write_safetensors

EMBED, HEAD, UP, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.up.weight", "model.norm.weight"
SHAPES = {EMBED: (8, 4), HEAD: (8, 4), UP: (6, 4), NORM: (4,)}


def write(folder: Path, tensors, **fields) -> Path:
    """A folder of statistics, by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    path = write_safetensors(folder / "statistics.safetensors", tensors)
    file = {"size": path.stat().st_size, "header_sha256": read_header(path).sha256, "sha256": "0" * 64}
    manifest = {
        "kind": "fisher",
        "model": {"reference": "models/code", "digest": "0" * 64},
        "data": {"files": [{"name": "code.txt", "sha256": "0" * 64}], "context": 512, "windows": 2, "tokens": 9},
        "mean": 0.5,
        "files": {path.name: file},
        "versions": {},
    }
    (folder / MANIFEST).write_text(json.dumps({**manifest, **fields}))
    return folder


def ones(shapes):
    return {name: np.ones(shape, "f4") for name, shape in shapes.items()}


@pytest.fixture
def model(tmp_path):
    return open_checkpoint(write_model(tmp_path / "model", ones(SHAPES), {"model_type": "llama"}))


def opened(folder, model, kind="fisher"):
    return open_statistics(open_checkpoint(folder), kind, model)


def test_what_fits_is_found_by_name(tmp_path, model):
    found = opened(write(tmp_path / "s", ones(SHAPES)), model)
    assert {name: found.find(name).shape for name in SHAPES} == SHAPES
    assert found.find("other") is None
    assert found.manifest.data.tokens == 9


def test_layers_that_share_an_input_share_a_matrix_and_others_may_have_none(tmp_path, model):
    folder = write(tmp_path / "s", {UP: np.eye(4, dtype="f4")}, kind="gram", same={HEAD: UP}, without=[EMBED, NORM])
    found = opened(folder, model, "gram")
    assert found.find(HEAD) == found.find(UP)
    assert found.find(UP) is not None
    assert found.find(EMBED) is None


@pytest.mark.parametrize("stored_head", [True, False])
def test_a_tied_head_has_those_of_the_embedding(tmp_path, stored_head):
    shapes = {name: shape for name, shape in SHAPES.items() if stored_head or name != HEAD}
    config = {"model_type": "llama", "tie_word_embeddings": True}
    model = open_checkpoint(write_model(tmp_path / "model", ones(shapes), config))
    found = opened(write(tmp_path / "s", ones({n: s for n, s in shapes.items() if n != HEAD})), model)
    assert found.find(HEAD) == found.find(EMBED)
    assert found.find(HEAD).shape == (8, 4)


def test_a_tensor_that_is_said_to_have_none_may_lack_them(tmp_path, model):
    some = {name: value for name, value in ones(SHAPES).items() if name != NORM}
    assert opened(write(tmp_path / "s", some, without=[NORM]), model).find(NORM) is None
    with pytest.raises(IncompatibleSources, match="has no statistics"):
        opened(write(tmp_path / "t", some), model)


# ---- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "complaint", "where"),
    [
        ({**SHAPES, "model.layers.1.up.weight": (6, 4)}, "is not a tensor of the model", "layers.1.up"),
        ({**SHAPES, UP: (4, 6)}, r"has F32 \[4, 6\], needed is \[6, 4\]", UP),
        ({NORM: (4,)}, "has no statistics", HEAD),
    ],
)
def test_statistics_of_another_model_are_refused_with_their_place(tmp_path, model, shapes, complaint, where):
    with pytest.raises(IncompatibleSources, match=complaint) as error:
        opened(write(tmp_path / "s", ones(shapes)), model)
    assert str(tmp_path / "s") in error.value.where
    assert where in error.value.where
    assert "models/code" in error.value.remedy


def test_a_matrix_of_another_size_is_refused(tmp_path, model):
    folder = write(tmp_path / "s", {UP: np.eye(6, dtype="f4")}, kind="gram")
    with pytest.raises(IncompatibleSources, match=r"has F32 \[6, 6\], needed is \[4, 4\]"):
        opened(folder, model, "gram")


def test_statistics_of_integers_are_refused(tmp_path, model):
    with pytest.raises(IncompatibleSources, match="has I32"):
        opened(write(tmp_path / "s", {**ones(SHAPES), UP: np.ones((6, 4), "i4")}), model)


def test_the_other_kind_is_refused(tmp_path, model):
    with pytest.raises(IncompatibleSources, match="of the kind fisher, gram is what is needed"):
        opened(write(tmp_path / "s", ones(SHAPES)), model, "gram")


def test_a_folder_without_a_manifest_is_refused(model):
    with pytest.raises(SourceError, match=r"has no statistics\.json"):
        open_statistics(model, "fisher", model)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"kind": "hessian"}, "kind: Input should be 'fisher' or 'gram'"),
        ({"format": 2}, "format: Input should be 1"),
        ({"mean": -1}, "mean: Input should be greater"),
        ({"mean": None}, "mean: Input should be a valid number"),
        ({"more": 1}, "more: Extra inputs are not permitted"),
        ({"files": {}}, "is not the file that statistics.json tells of"),
        (
            {"data": {"files": [], "context": 1, "windows": 0, "tokens": 0}},
            "data.tokens: Input should be greater than 0",
        ),
        ({"same": []}, "same: Input should be a valid dictionary"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path, model, fields, complaint):
    with pytest.raises(FormatError) as error:
        opened(write(tmp_path / "s", ones(SHAPES), **fields), model)
    assert complaint in str(error.value)
    assert str(tmp_path / "s") in error.value.where


@pytest.mark.parametrize("content", ["", "[]", "{", "{}"])
def test_a_manifest_that_is_no_object_is_refused(tmp_path, content):
    folder = write(tmp_path / "s", ones(SHAPES))
    (folder / MANIFEST).write_text(content)
    with pytest.raises(FormatError):
        read_manifest(open_checkpoint(folder))


def test_a_file_that_was_exchanged_is_refused(tmp_path, model):
    folder = write(tmp_path / "s", ones(SHAPES))
    write_safetensors(folder / "statistics.safetensors", ones(SHAPES), {"statistics": "of another"})
    with pytest.raises(FormatError, match="is not the file") as error:
        opened(folder, model)
    assert error.value.where.endswith("s/statistics.safetensors")

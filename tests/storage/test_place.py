"""Folders as places, here; those on a Hub are in test_hub."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger.errors import FormatError, SourceError
from merger.storage.place import LocalFolder, local_weights, natural
from tests.checkpoints import write_model


@pytest.fixture
def place(tmp_path) -> LocalFolder:
    write_model(tmp_path, {"x": np.zeros(3, np.float32)}, {"model_type": "llama"}, side_files={"a.txt": "text"})
    (tmp_path / "sub").mkdir()
    return LocalFolder(tmp_path)


def test_names_sizes_and_paths(place, tmp_path):
    assert str(place) == str(tmp_path)
    assert place.names == {"config.json", "model.safetensors", "a.txt", "sub"}
    assert (place.size("a.txt"), place.size("sub"), place.size("none")) == (4, None, None)
    assert (place.has("a.txt"), place.has("sub"), place.has("none")) == (True, False, False)
    assert place.path("a.txt") == tmp_path / "a.txt"
    assert place.where("a.txt") == f"{tmp_path}/a.txt"


def test_names_that_match_come_in_order(place):
    assert list(place.matches("*")) == ["a.txt", "config.json", "model.safetensors", "sub"]
    assert list(place.matches("*.TXT")) == []
    assert list(place.matches("[ac]*")) == ["a.txt", "config.json"]


def test_what_comes_after_it_was_read_is_not_there(place, tmp_path):
    assert "late.txt" not in place.names
    (tmp_path / "late.txt").touch()
    assert not place.has("late.txt")


def test_a_link_to_nothing_is_no_file(place, tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "gone")
    assert "link.json" in place.names
    assert not place.has("link.json")


def test_a_file_of_tensors(place, tmp_path):
    weights = place.weights("model.safetensors")
    assert weights == local_weights(tmp_path / "model.safetensors")
    assert weights.path.name == "model.safetensors"
    assert weights.mtime_ns == (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert weights.header.tensors.keys() == {"x"}


def test_a_file_that_holds_no_tensors(place, tmp_path):
    with pytest.raises(FormatError) as caught:
        place.weights("a.txt")
    assert caught.value.where == f"{tmp_path}/a.txt"
    with pytest.raises(SourceError, match="cannot be read") as caught:
        place.weights("none")
    assert caught.value.where == f"{tmp_path}/none"


def test_numbers_are_sorted_as_numbers():
    names = ["step-10", "step-9", "step-100", "step-1/b10", "step-1/b9", "step"]
    assert sorted(names, key=natural) == ["step", "step-1/b9", "step-1/b10", "step-9", "step-10", "step-100"]


@given(st.lists(st.text(st.sampled_from("a1\xb2\u0663-"))))
def test_any_names_can_be_sorted(names):
    assert sorted(sorted(names, key=natural)) == sorted(names)

"""What a stage keeps: whole or not at all, of one stage only, and of several processes at once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merger.stages import FINISHED, is_finished
from merger.states import State, States


def state(step, value=1.0):
    return State(0, step, {"model.w": torch.full((4,), value), "exp_avg.w": torch.zeros(4)})


def save(content):
    def write(place):
        place.mkdir()
        (place / "model").write_text(content)

    return write


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_state_is_found_again_by_its_own_stage_only(tmp_path):
    assert States(tmp_path / "run", "key").kept() is None
    States(tmp_path / "run", "key").keep(state(7, 0.5))
    found = States(tmp_path / "run", "key").kept()
    assert found is not None
    assert (found.first, found.step) == (0, 7)
    assert torch.equal(found.tensors["model.w"], torch.full((4,), 0.5))
    assert States(tmp_path / "run", "other").kept() is None
    assert States(tmp_path / "run-2", "key").kept() is None


def test_who_is_killed_while_it_writes_leaves_nothing_behind(tmp_path, monkeypatch):
    """safetensors writes to a file of a name of its own, and then renames it."""

    def killed(_tensors, path, _told):
        path.with_name(".tmpup9G1w").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr("merger.states.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        States(tmp_path / "run", "key").keep(state(7))
    States(tmp_path / "run", "key").finish(save("done"))
    assert names(tmp_path) == ["run"]


def test_a_damaged_state_is_no_state(tmp_path):
    States(tmp_path / "run", "key").keep(state(7))
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:20])
    assert States(tmp_path / "run", "key").kept() is None


def test_a_finished_model_leaves_nothing_else_behind(tmp_path):
    (tmp_path / ".run.part-model-1-killed").mkdir()
    (tmp_path / ".run.part-state-1-killed").mkdir()
    (tmp_path / ".run.part-state-1-killed" / ".tmpx1").write_text("half")
    (tmp_path / ".run-2.part-state-1-other").write_text("another stage's")
    states = States(tmp_path / "run", "key")
    states.keep(state(7))
    states.finish(save("done"))
    assert is_finished(tmp_path / "run", "key")
    assert names(tmp_path) == [".run-2.part-state-1-other", "run"]


def test_a_model_of_an_older_recipe_is_replaced(tmp_path):
    States(tmp_path / "run", "old").finish(save("old"))
    States(tmp_path / "run", "new").finish(save("new"))
    assert (tmp_path / "run" / "model").read_text() == "new"
    assert not is_finished(tmp_path / "run", "old")


def test_the_second_of_two_processes_finds_the_model_there_and_leaves_it(tmp_path):
    first, second = States(tmp_path / "run", "key"), States(tmp_path / "run", "key")
    first.finish(save("first"))
    inode = (tmp_path / "run").stat().st_ino
    second.keep(state(9))  # one that does not know yet
    second.finish(save("second"))
    assert (tmp_path / "run").stat().st_ino == inode
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("write", [Path.touch, lambda path: save_file({"w": torch.zeros(2)}, path)])
def test_one_whose_unfinished_model_is_cleaned_up_by_the_other_ends_well(tmp_path, write):
    first, second = States(tmp_path / "run", "key"), States(tmp_path / "run", "key")

    def interrupted(place):
        place.mkdir()
        first.finish(save("first"))  # removes `place`
        write(place / "model.safetensors")

    second.finish(interrupted)
    assert (tmp_path / "run" / "model").read_text() == "first"
    assert names(tmp_path) == ["run"]


def test_a_model_that_cannot_be_written_is_told(tmp_path):
    def full(place):
        place.mkdir()
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        States(tmp_path / "run", "key").finish(full)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_the_digest_is_not_finished(tmp_path):
    (tmp_path / "run").mkdir()
    assert not is_finished(tmp_path / "run", "key")
    (tmp_path / "run" / FINISHED).write_text("{")
    assert not is_finished(tmp_path / "run", "key")
    (tmp_path / "run" / FINISHED).write_text(json.dumps({"key": "key"}))
    assert is_finished(tmp_path / "run", "key")
    shutil.rmtree(tmp_path / "run")
    assert not is_finished(tmp_path / "run", "key")

"""The output folder in every state that a run may find it in."""

import fcntl
import json
from pathlib import Path

import numpy as np
import pytest

from merger.budget import Allotment
from merger.checkpoint import open_checkpoint
from merger.engine import write_shards
from merger.errors import OutputOccupied
from merger.plan import Plan, make_plan
from merger.publish import check_free, complete, discard, finish, finished_shards, is_complete, published, taken
from merger.report import manifest
from tests.checkpoints import write_model


@pytest.fixture
def plan(tmp_path) -> Plan:
    tensors = {f"x{i}": np.ones(1000, np.float32) * i for i in range(3)}
    folder = write_model(tmp_path / "source", tensors, {"a": 1}, side_files={"tokenizer.json": "{}"})
    return make_plan(open_checkpoint(folder), {"method": "average"}, 4000)


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "out"


def write(plan: Plan, output: Path) -> None:
    write_shards(plan.shards, output, Allotment(1, 1 << 16, 1 << 16), plan.fingerprint)


def test_a_new_or_empty_folder_is_free(plan, output):
    check_free(output, plan)
    output.mkdir()
    check_free(output, plan)


def test_something_else_is_left_alone(plan, output):
    output.mkdir()
    (output / "notes.txt").touch()
    with pytest.raises(OutputOccupied, match=r"something else \(notes.txt\)"):
        check_free(output, plan)


def test_unfinished_work_of_this_plan_is_free_and_of_another_is_not(plan, output):
    with taken(output, plan):
        pass
    check_free(output, plan)
    (output / ".merger" / "plan.json").write_text(json.dumps({"fingerprint": "other"}))
    with pytest.raises(OutputOccupied, match="unfinished work of another recipe"):
        check_free(output, plan)


def test_two_runs_do_not_write_into_one_folder(plan, output):
    with taken(output, plan), pytest.raises(OutputOccupied, match="another run"), taken(output, plan):
        pass


def test_the_lock_ends_with_the_run(plan, output):
    with taken(output, plan):
        pass
    with (output / ".merger" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_result_is_complete_when_everything_is_in_place(plan, output):
    with taken(output, plan):
        write(plan, output)
        receipts = finished_shards(output, plan)
        assert [receipt.file for receipt in receipts] == [shard.name for shard in plan.shards]
        assert not is_complete(output, plan)
        complete(output, plan, {"README.md": "card"}, manifest(plan, receipts))
        assert not is_complete(output, plan)  # it may have to be pushed yet
        finish(output)
    assert is_complete(output, plan)
    assert sorted(path.name for path in output.iterdir() if "model-" not in path.name) == [
        "README.md",
        "config.json",
        "merger.json",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert published(output) == receipts
    with pytest.raises(OutputOccupied, match="finished result of another recipe"):
        check_free(output, make_plan(plan.checkpoint, {"method": "lawa"}, 4000))


def test_what_cannot_succeed_takes_its_own_files_back_and_no_others(plan, output):
    with taken(output, plan):
        write(plan, output)
        discard(output, plan)
    assert not output.exists()
    with taken(output, plan):
        write(plan, output)
        (output / "notes.txt").touch()
        discard(output, plan)
    assert [path.name for path in output.iterdir()] == ["notes.txt"]

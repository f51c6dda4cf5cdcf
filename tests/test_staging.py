"""Folders of attempts: adopting, fencing, publishing whole or not at all."""

import os
from pathlib import Path

import pytest

from merger.destination import landed_in, uploaded
from merger.engine import write_shards
from merger.errors import MergerError, OutputOccupied, WriteFailed
from merger.plan import Plan
from merger.receipt import Receipt
from merger.recipe import make_document
from merger.run import Options, plan_of
from merger.staging import JOBS, Staging, remove_staging
from tests.service.processes import recipe, write_run
from tests.shelf import Shelf


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Three shards of a megabyte."""
    write_run(tmp_path / "run", shards=3, megabytes=1)
    return plan_of(make_document(recipe(tmp_path / "run", "unused", 1)), Options())[0]


def make(plan: Plan, folder: Path, *indices: int, execution: str = "") -> list[Receipt]:
    _, allotment = plan_of(make_document(dict(plan.recipe)), Options())
    shards = [plan.shards[i] for i in indices]
    made = write_shards(shards, folder, allotment, plan.fingerprint, execution=execution)
    return sorted(made, key=lambda receipt: receipt.file)  # they finish in any order


def test_the_first_attempt_finds_nothing_and_publishes_by_one_rename(plan: Plan, tmp_path: Path) -> None:
    staging = Staging(tmp_path / "deep" / "out", "job", 1)
    assert staging.take(plan) == []
    make(plan, staging.folder, 0, 1, 2)
    inode = (staging.folder / plan.shards[0].name).stat().st_ino
    staging.publish(plan)
    assert (tmp_path / "deep" / "out" / plan.shards[0].name).stat().st_ino == inode
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_a_later_attempt_adopts_finished_shards_with_inode_and_time(plan: Plan, tmp_path: Path) -> None:
    first = Staging(tmp_path / "out", "job", 1)
    first.take(plan)
    made = make(plan, first.folder, 0, 2)
    before = [(first.folder / receipt.file).stat() for receipt in made]
    second = Staging(tmp_path / "out", "job", 2)
    assert second.take(plan) == made
    after = [(second.folder / receipt.file).stat() for receipt in made]
    assert [(s.st_ino, s.st_mtime_ns) for s in after] == [(s.st_ino, s.st_mtime_ns) for s in before]
    assert not first.folder.exists()
    third = Staging(tmp_path / "out", "job", 3)
    assert third.take(plan) == made


def test_shards_of_another_plan_are_not_adopted(plan: Plan, tmp_path: Path) -> None:
    first = Staging(tmp_path / "out", "job", 1)
    first.take(plan)
    make(plan, first.folder, 0)
    other = Plan(plan.recipe, plan.checkpoint, plan.shards, "another fingerprint")
    assert Staging(tmp_path / "out", "job", 2).take(other) == []


def test_a_half_adopted_attempt_is_taken_up_again(plan: Plan, tmp_path: Path) -> None:
    first = Staging(tmp_path / "out", "job", 1)
    first.take(plan)
    made = make(plan, first.folder, 0, 1)
    second = Staging(tmp_path / "out", "job", 2)
    first.folder.rename(first.folder.with_name("fenced-2-attempt-1"))  # attempt 2 died here
    assert second.take(plan) == made


def test_an_earlier_attempt_is_fenced(plan: Plan, tmp_path: Path) -> None:
    first, second = Staging(tmp_path / "out", "job", 1), Staging(tmp_path / "out", "job", 2)
    first.take(plan)
    make(plan, first.folder, 0)
    second.take(plan)
    with pytest.raises((MergerError, OSError)):
        make(plan, first.folder, 1)
    with pytest.raises(WriteFailed, match="cannot be published"):
        first.publish(plan)
    make(plan, second.folder, 1, 2)
    second.publish(plan)
    with pytest.raises((WriteFailed, OutputOccupied)):
        first.publish(plan)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == [s.name for s in plan.shards]


def test_two_executions_of_a_shard_do_not_write_into_one_file(plan: Plan, tmp_path: Path) -> None:
    staging = Staging(tmp_path / "out", "job", 1)
    staging.take(plan)
    abandoned = staging.folder / ".merger" / f"{plan.shards[0].name}.1.0"
    with abandoned.open("wb") as orphan:  # still open in a process that was given up
        made = make(plan, staging.folder, 0, execution=".1.1")
        orphan.write(b"too late")
    assert (staging.folder / made[0].file).stat().st_size == plan.shards[0].size


def test_nothing_is_published_over_something_else(plan: Plan, tmp_path: Path) -> None:
    staging = Staging(tmp_path / "out", "job", 1)
    staging.take(plan)
    make(plan, staging.folder, 0, 1, 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputOccupied):
        staging.publish(plan)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_empty_output_folder_is_taken(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    staging = Staging(tmp_path / "out", "job", 1)
    staging.take(plan)
    staging.publish(plan)
    assert (tmp_path / "out").is_dir()


def test_removing_takes_all_attempts_of_this_job_only(plan: Plan, tmp_path: Path) -> None:
    for job in ("one", "two"):
        for number in (1, 2):
            Staging(tmp_path / "out", job, number).take(plan)
    remove_staging(tmp_path / "out", "one")
    assert [path.name for path in (tmp_path / JOBS).iterdir()] == ["two"]
    remove_staging(tmp_path / "out", "one")  # nothing there is fine
    remove_staging(tmp_path / "out", "two")
    assert not (tmp_path / JOBS).exists()


def test_a_removal_that_was_interrupted_is_finished(plan: Plan, tmp_path: Path) -> None:
    Staging(tmp_path / "out", "job", 1).take(plan)
    (tmp_path / JOBS / "job.removed" / "left").mkdir(parents=True)
    remove_staging(tmp_path / "out", "job")
    assert not (tmp_path / JOBS).exists()


def test_without_hard_links_shards_are_moved(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Staging(tmp_path / "out", "job", 1)
    first.take(plan)
    made = make(plan, first.folder, 0)

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)  # as on file systems that have none
    second = Staging(tmp_path / "out", "job", 2)
    assert second.take(plan) == made
    assert (second.folder / made[0].file).stat().st_size == made[0].size


# ---- what has landed ----------------------------------------------------------------------------------


def test_what_has_landed_is_adopted_with_its_shard_and_not_brought_again(plan: Plan, tmp_path: Path) -> None:
    shelf, other = Shelf(tmp_path / "shelf"), Shelf(tmp_path / "other")
    shelf.prepare()
    first = Staging(tmp_path / "out", "job", 1)
    first.take(plan)
    made = make(plan, first.folder, 0, 2)
    landed = uploaded(first.folder, made[0].file, shelf)
    for number in (2, 3):
        later = Staging(tmp_path / "out", "job", number)
        assert later.take(plan) == made
        assert landed_in(later.folder, shelf) == {made[0].file: landed}
    assert landed_in(later.folder, other) == {}, "it landed elsewhere"
    for receipt in made:
        uploaded(later.folder, receipt.file, shelf)
    assert shelf.files == [receipt.file for receipt in made]


def test_a_note_without_its_shard_is_not_adopted(plan: Plan, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    shelf.prepare()
    first = Staging(tmp_path / "out", "job", 1)
    first.take(plan)
    [receipt] = make(plan, first.folder, 0)
    uploaded(first.folder, receipt.file, shelf)
    (first.folder / ".merger" / f"{receipt.file}.json").unlink()
    second = Staging(tmp_path / "out", "job", 2)
    assert second.take(plan) == []
    assert landed_in(second.folder, shelf) == {}


def test_a_fenced_attempt_cannot_note_that_its_shard_has_landed(plan: Plan, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    shelf.prepare()
    first, second = Staging(tmp_path / "out", "job", 1), Staging(tmp_path / "out", "job", 2)
    first.take(plan)
    [receipt] = make(plan, first.folder, 0)
    second.take(plan)
    with pytest.raises(OSError):
        uploaded(first.folder, receipt.file, shelf)
    assert not first.folder.exists()

"""A shard's task as a plain generator: what it says, and what it raises. Ray runs it in `tests/service`."""

import threading
from pathlib import Path

import pytest

from merger import uploads
from merger.destination import Destination, Landed, landed_in
from merger.errors import SourceChanged, WriteFailed
from merger.plan import Plan
from merger.receipt import Receipt
from merger.recipe import make_document
from merger.run import Options, plan_of
from merger.staging import Staging
from merger.uploads import Uploads
from tests.service.processes import recipe, write_run
from tests.shelf import Shelf
from workers.resources import INTERPRETER, TaskSize, request_for
from workers.shards import Begun, ShardTasks, Uploading, Work, write_shard


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    write_run(tmp_path / "run", shards=2, megabytes=4)
    return plan_of(make_document(recipe(tmp_path / "run", "unused", 4)), Options())[0]


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    shelf = Shelf(tmp_path / "shelf")
    shelf.prepare()
    return shelf


def work_in(plan: Plan, folder: Path, destination: Destination | None = None) -> Work:
    request, allotment = request_for(plan, TaskSize(1.0, 64 << 20))
    staging = Staging(folder / "out", "job", 1)
    staging.take(plan)
    return Work(staging.folder, allotment, plan.fingerprint, request, destination=destination)


def ignore(*_: object) -> None:
    """Nobody listens."""


def test_a_task_says_its_bytes_and_then_its_receipt(plan: Plan, tmp_path: Path) -> None:
    begun, *numbers, receipt = write_shard(plan.shards[1], work_in(plan, tmp_path), ".1.0")
    assert isinstance(begun, Begun)
    assert sum(number for number in numbers if isinstance(number, int)) == plan.shards[1].data_size
    assert isinstance(receipt, Receipt)
    assert (receipt.file, receipt.size) == (plan.shards[1].name, plan.shards[1].size)


def test_a_task_raises_what_the_engine_raises(plan: Plan, tmp_path: Path) -> None:
    work = work_in(plan, tmp_path)
    (tmp_path / "run" / "step-1" / "model.safetensors").unlink()
    with pytest.raises(SourceChanged, match="cannot be opened any more"):
        list(write_shard(plan.shards[0], work, ""))


def test_a_request_states_processors_and_the_memory_of_buffers_and_interpreter(plan: Plan) -> None:
    request, allotment = request_for(plan, TaskSize(2.0, 64 << 20))
    assert (request.cpus, request.gpus) == (2.0, 0.0)
    assert allotment.threads == 4
    assert request.memory == allotment.memory + INTERPRETER <= (64 << 20) + INTERPRETER


# ---- destinations -------------------------------------------------------------------------------------


def test_a_task_brings_its_shard_to_the_destination_before_it_gives_the_receipt(
    plan: Plan, tmp_path: Path, shelf: Shelf
) -> None:
    work, shard = work_in(plan, tmp_path, shelf), plan.shards[0]
    *_, receipt = write_shard(shard, work, "")
    assert isinstance(receipt, Receipt)
    assert shelf.files == [shard.name]
    [landed] = landed_in(work.folder, shelf).values()
    assert (landed.file, landed.size, landed.destination) == (shard.name, shard.size, "shelf://shelf")


def test_a_task_raises_what_the_destination_raises_and_its_shard_is_kept(
    plan: Plan, tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: Shelf, _path: Path) -> None:
        raise WriteFailed("HTTP 503", where="shelf://shelf")

    monkeypatch.setattr(Shelf, "upload", refuse)
    work = work_in(plan, tmp_path, shelf)
    with pytest.raises(WriteFailed, match="HTTP 503"):
        list(write_shard(plan.shards[0], work, ""))
    assert [receipt.file for receipt in Staging(tmp_path / "out", "job", 1).take(plan)] == [plan.shards[0].name]
    assert landed_in(work.folder, shelf) == {}


def test_a_shard_whose_task_died_before_it_had_landed_is_brought_by_the_runner(
    plan: Plan, tmp_path: Path, shelf: Shelf
) -> None:
    list(write_shard(plan.shards[0], work_in(plan, tmp_path), ""))  # as it is when the upload has only begun
    work = work_in(plan, tmp_path, shelf)
    finished: list[Receipt] = []
    tasks = ShardTasks(work, 1, ignore, lambda _shard, receipt: finished.append(receipt), ignore)
    receipt = tasks._after_death(plan.shards[0], RuntimeError("killed"))
    assert receipt is not None
    assert finished == [receipt]
    *_, other = write_shard(plan.shards[1], work, "")
    assert isinstance(other, Receipt)
    with Uploads(work.folder, shelf, ignore) as under_way:
        assert sorted(under_way.land([receipt, other])) == [shard.name for shard in plan.shards]
    assert shelf.files == [shard.name for shard in plan.shards]


def test_a_task_gives_signs_while_it_uploads_and_only_as_long_as_an_upload_may_take(
    plan: Plan, tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough, upload = threading.Event(), Shelf.upload

    def slowly(self: Shelf, path: Path) -> Landed:
        assert enough.wait(60)
        return upload(self, path)

    monkeypatch.setattr(Shelf, "upload", slowly)
    monkeypatch.setattr(uploads, "_SIGN", 0.01)
    signs: list[object] = []
    for said in write_shard(plan.shards[0], work_in(plan, tmp_path, shelf), ""):
        signs += [said] if isinstance(said, Uploading) else []
        if len(signs) == 3:
            enough.set()
    assert len(signs) >= 3
    assert isinstance(said, Receipt)
    monkeypatch.setattr(uploads, "_GRACE", 0.0)
    monkeypatch.setattr(uploads, "_SLOWEST", 1e12)
    told = [*write_shard(plan.shards[1], work_in(plan, tmp_path, shelf), "")]
    assert not [said for said in told if isinstance(said, Uploading)], "it stands still, as far as anybody can tell"


# ---- tasks that wait for a node -----------------------------------------------------------------------


class Done(Exception):
    """The test has seen enough."""


class Queue:
    """A cluster whose tasks say, look by look, what a test lets them."""

    def __init__(self, looks: list[object]) -> None:
        self.looks, self.signs, self.lines = looks, 0, list[str]()

    def remote(self, *_: object) -> "Queue":
        return self

    def wait(self, streams: list[object], **_: object) -> tuple[list[object], list[object]]:
        if not self.looks:
            raise Done
        if self.looks[0] is None:
            self.looks.pop(0)
            return [], streams
        return streams, []

    def __next__(self) -> object:
        return self.looks.pop(0)

    def sign(self) -> None:
        self.signs += 1


@pytest.mark.parametrize(
    ("looks", "signs"), [([None] * 3, 3), ([Begun(), None, None, None], 0), ([None, None, Begun(), None], 2)]
)
def test_tasks_that_could_not_begin_are_no_standstill_and_others_are(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: list[object], signs: int
) -> None:
    cluster = Queue(list(looks))
    monkeypatch.setattr("workers.shards._WAIT", 0.0)
    monkeypatch.setattr("workers.shards.ray.wait", cluster.wait)
    monkeypatch.setattr("workers.shards.ray.get", lambda said: said)
    tasks = ShardTasks(work_in(plan, tmp_path), 1, ignore, ignore, cluster.lines.append, cluster.sign)
    tasks._remote = cluster
    with pytest.raises(Done):
        tasks.run(plan.shards[:1])
    assert cluster.signs == signs
    assert len(cluster.lines) == signs
    assert all("no room" in line for line in cluster.lines)


def test_a_sign_is_given_now_and_then(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Queue([None] * 100)
    monkeypatch.setattr("workers.shards.ray.wait", cluster.wait)
    tasks = ShardTasks(work_in(plan, tmp_path), 1, ignore, ignore, cluster.lines.append, cluster.sign)
    tasks._remote = cluster
    with pytest.raises(Done):
        tasks.run(plan.shards[:1])
    assert cluster.signs == 0, "a hundred looks took no half minute"

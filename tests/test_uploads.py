"""Uploads beside the making of shards, to a destination that a test holds back."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from merger.destination import Destination, Landed
from merger.errors import WriteFailed
from merger.plan import Plan
from merger.receipt import Receipt
from merger.uploads import Uploads

PLAN = Plan({}, None, (), "plan")  # type: ignore[arg-type]
SHARDS = [Receipt(f"model-{i}.safetensors", 1, "", "plan") for i in range(4)]


@dataclass
class Gate(Destination):
    """Takes shards only while it is open; fails for those that are `broken`."""

    name: str = "test://gate"
    open: threading.Event = field(default_factory=threading.Event)
    brought: list[str] = field(default_factory=list)
    published: list[dict[str, Landed]] = field(default_factory=list)
    broken: str = ""
    at_once: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def check(self, plan: Plan) -> str | None:
        return None

    def prepare(self) -> None:
        pass

    def upload(self, path: Path) -> Landed:
        self.at_once.release()
        assert self.open.wait(30)
        if path.name == self.broken:
            raise WriteFailed("the disk there is full", where=self.name)
        self.brought.append(path.name)
        return Landed(path.name, 1, "", self.name)

    def publish(self, folder: Path, plan: Plan, landed: Mapping[str, Landed]) -> str:
        self.published.append(dict(landed))
        return "test://gate/result"


@pytest.fixture
def folder(tmp_path) -> Path:
    for shard in SHARDS:
        (tmp_path / shard.file).write_bytes(b"x")
    return tmp_path


def test_shards_go_while_others_are_made_and_all_are_published(folder):
    gate, said = Gate(), []
    with Uploads(folder, gate, said.append) as uploads:
        uploads.add(SHARDS[0])
        uploads.add(SHARDS[0])  # again, by a worker that was retried
        assert gate.at_once.acquire(timeout=30)
        gate.open.set()
        assert uploads.finish(PLAN, SHARDS) == "test://gate/result"
    assert sorted(gate.brought) == [shard.file for shard in SHARDS]
    assert [sorted(landed) for landed in gate.published] == [[shard.file for shard in SHARDS]]
    assert said[-1] == "publishing test://gate"


def test_nothing_is_published_where_an_upload_failed(folder):
    gate = Gate(broken=SHARDS[2].file)
    gate.open.set()
    with pytest.raises(WriteFailed, match="is full"), Uploads(folder, gate, print) as uploads:
        uploads.finish(PLAN, SHARDS)
    assert not gate.published


def test_a_run_that_fails_waits_for_what_is_under_way_and_drops_the_rest(folder):
    gate = Gate()

    def fail_in_the_middle() -> None:
        with Uploads(folder, gate, print) as uploads:
            for shard in SHARDS:
                uploads.add(shard)
            for _ in range(2):
                assert gate.at_once.acquire(timeout=30)
            threading.Timer(0.1, gate.open.set).start()
            raise KeyError

    with pytest.raises(KeyError):
        fail_in_the_middle()
    assert sorted(gate.brought) == [shard.file for shard in SHARDS[:2]]
    assert not gate.published

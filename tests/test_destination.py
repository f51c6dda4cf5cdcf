"""What is noted of uploads, with a destination that only counts them."""

import hashlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from merger.destination import Destination, Landed, landed_in, uploaded
from merger.plan import Plan


@dataclass
class Counting(Destination):
    """Somewhere that remembers what was brought."""

    name: str = "test://there"
    brought: list[str] = field(default_factory=list)

    def check(self, plan: Plan) -> str | None:
        return None

    def prepare(self) -> None:
        pass

    def upload(self, path: Path) -> Landed:
        self.brought.append(path.name)
        content = path.read_bytes()
        return Landed(path.name, len(content), hashlib.sha256(content).hexdigest(), self.name)

    def publish(self, folder: Path, plan: Plan, landed: Mapping[str, Landed]) -> str:
        return self.name


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a shard, while the work goes on."""
    (tmp_path / ".merger").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def test_a_shard_is_brought_once(folder):
    there = Counting()
    first = uploaded(folder, "model.safetensors", there)
    assert uploaded(folder, "model.safetensors", Counting(brought=there.brought)) == first
    assert there.brought == ["model.safetensors"]
    assert landed_in(folder, there) == {"model.safetensors": first}


def test_what_landed_elsewhere_is_brought_again(folder):
    uploaded(folder, "model.safetensors", Counting("test://elsewhere"))
    there = Counting()
    assert landed_in(folder, there) == {}
    uploaded(folder, "model.safetensors", there)
    assert there.brought == ["model.safetensors"]


def test_a_shard_of_another_size_is_brought_again(folder):
    there = Counting()
    uploaded(folder, "model.safetensors", there)
    (folder / "model.safetensors").write_bytes(b"more weights")
    assert uploaded(folder, "model.safetensors", there).size == 12
    assert len(there.brought) == 2


@pytest.mark.parametrize("note", ["", "{", "[]", '{"file": "model.safetensors"}', json.dumps({"another": 1})])
def test_a_damaged_note_counts_for_nothing(folder, note):
    (folder / ".merger" / "model.safetensors.landed").write_text(note)
    assert landed_in(folder, Counting()) == {}


def test_nothing_is_noted_in_a_finished_folder(folder):
    """It would look unfinished."""
    (folder / ".merger").rmdir()
    uploaded(folder, "model.safetensors", Counting())
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


def test_what_landed_can_be_told_to_another_process(folder):
    landed = uploaded(folder, "model.safetensors", Counting())
    assert pickle.loads(pickle.dumps(landed)) == landed


def test_a_place_is_nobodys_to_see_unless_it_says_so():
    assert not Counting().is_public()

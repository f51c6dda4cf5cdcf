"""Where a finished result is published beside, or instead of, a folder: a repository of the Hub, a bucket.

Knows what any such place must do; knows nothing of how. A destination is a value that can be pickled: each worker
uploads the shards that it made, and one process publishes.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from merger.plan import Plan
from merger.receipt import FOLDER
from merger.storage.disk import write_atomically


@dataclass(frozen=True)
class Landed:
    """A shard that is at the destination, whole, though nobody sees it yet; `proof` is the destination's own."""

    file: str
    size: int
    sha256: str
    destination: str
    proof: str = ""


class Destination(ABC):
    """A place that results are published to, whole or not at all."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What people call it: `hf://me/moe`. Nothing secret."""

    def admit(self) -> None:
        """See that it can be written to, as far as that shows before anything is known of the result.

        Raises SourceError. Writes nothing.
        """
        return

    @abstractmethod
    def check(self, plan: Plan) -> str | None:
        """The address of this very plan's result where it is published already, None where there is room for it.

        Raises OutputOccupied where something else is there, SourceError where it cannot be written to. Writes nothing.
        """

    def is_public(self) -> bool:
        """Whether anybody may see what is published there. Raises SourceError."""
        return False

    @abstractmethod
    def prepare(self) -> None:
        """Make the place ready for uploads, once, before the first. Raises SourceError and WriteFailed."""

    @abstractmethod
    def upload(self, path: Path) -> Landed:
        """Bring a finished shard there, by a name that nobody sees yet. Bytes that landed before are not sent again.

        Raises WriteFailed.
        """

    @abstractmethod
    def publish(self, folder: Path, plan: Plan, landed: Mapping[str, Landed]) -> str:
        """Make the uploaded shards and the other files of `folder` the result, in one step; returns its address.

        A result of the same plan that is there by now is success. Raises OutputOccupied where somebody else was first,
        WriteFailed where it cannot be done; nothing is visible then.
        """


def note_of(folder: Path, name: str) -> Path:
    """Where it is noted that a shard of `folder` has landed."""
    return folder / FOLDER / f"{name}.landed"


def landed_in(folder: Path, destination: Destination) -> dict[str, Landed]:
    """What earlier uploads of the shards of `folder` have left, by the shard's name."""
    found = {}
    for path in (folder / FOLDER).glob("*.landed"):
        try:
            landed = Landed(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue
        if landed.destination == destination.name:
            found[landed.file] = landed
    return found


def uploaded(folder: Path, name: str, destination: Destination) -> Landed:
    """Upload a shard of `folder`, unless it has landed already, and note that it has while the work goes on.

    Raises WriteFailed.
    """
    known = landed_in(folder, destination).get(name)
    if known and known.size == (folder / name).stat().st_size:
        return known
    landed = destination.upload(folder / name)
    if (folder / FOLDER).is_dir():
        write_atomically(note_of(folder, name), json.dumps(asdict(landed)).encode())
    return landed

"""A destination that is a folder of this machine, for tests of what happens around destinations."""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from merger.destination import Destination, Landed
from merger.plan import Plan


@dataclass(frozen=True)
class Shelf(Destination):
    """Takes files into `folder`; a file that was brought twice shows."""

    folder: Path

    @property
    def name(self) -> str:
        return f"shelf://{self.folder.name}"

    def check(self, plan: Plan) -> str | None:
        return None

    def prepare(self) -> None:
        self.folder.mkdir()

    def upload(self, path: Path) -> Landed:
        target = self.folder / path.name
        assert not target.exists(), f"{path.name} was brought twice"
        shutil.copy(path, target)
        return Landed(path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest(), self.name)

    def publish(self, folder: Path, plan: Plan, landed: Mapping[str, Landed]) -> str:
        return self.name

    @property
    def files(self) -> list[str]:
        """The names of what was brought."""
        return sorted(path.name for path in self.folder.iterdir())

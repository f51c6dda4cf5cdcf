"""Large contents by their sha256: files of the server's folder, or files elsewhere that it only refers to.

Knows hashing and where bytes lie. Knows nothing of repositories.
"""

import hashlib
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tests.hub_server.errors import HubError


@dataclass(frozen=True)
class Blob:
    sha256: str
    path: Path
    size: int


@lru_cache(maxsize=4096)
def _hash_of(path: str, size: int, modified: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(path: Path) -> str:
    """The sha256 of a file; read once as long as its size and time stay."""
    status = path.stat()
    return _hash_of(str(path.resolve()), status.st_size, status.st_mtime_ns)


class Blobs:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, Blob] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._known

    def __getitem__(self, sha256: str) -> Blob:
        return self._known[sha256]

    def refer(self, path: Path, sha256: str | None = None) -> Blob:
        """Take a file as it lies: nothing is copied, and the file must stay."""
        blob = Blob(sha256 or hash_of(path), path.resolve(), path.stat().st_size)
        return self._known.setdefault(blob.sha256, blob)

    def scratch(self) -> Path:
        return self._folder / f"{uuid.uuid4().hex}.part"

    def part(self, sha256: str, number: int) -> Path:
        """Where one part of an upload lies until all are there."""
        return self._folder / f"{sha256}.{number}.part"

    def receive(self, pieces: Iterable[bytes], sha256: str, size: int | None = None) -> Blob:
        """Write what comes, and keep it if it is what was announced."""
        scratch, digest = self.scratch(), hashlib.sha256()
        try:
            with scratch.open("wb") as file:
                for piece in pieces:
                    file.write(piece)
                    digest.update(piece)
        except OSError:  # the client left
            scratch.unlink()
            raise
        if digest.hexdigest() != sha256 or size not in (None, scratch.stat().st_size):
            scratch.unlink()
            raise HubError(400, f"the content is not {sha256} of {size} bytes")
        path = self._folder / sha256
        scratch.rename(path)
        self._known[sha256] = Blob(sha256, path, path.stat().st_size)
        return self._known[sha256]

"""A folder of files, on this disk or elsewhere. Knows names, sizes and small files; knows nothing of models."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from merger.errors import SourceError
from merger.remote import Remote
from merger.storage.safetensors import Header, read_header

_HEAD = 128 << 10  # bytes of a file elsewhere that are read first: they hold most headers


@dataclass(frozen=True)
class WeightFile:
    """One file of tensors, as it was when its header was read; a remote one is pinned and has no time."""

    path: Path | Remote
    mtime_ns: int
    header: Header


def natural(name: str) -> list[tuple[int, str]]:
    """What names are sorted by: step-9 before step-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


class Place(ABC):
    """A folder that is read once, when it is opened."""

    @abstractmethod
    def __str__(self) -> str:
        """What people call it; a file's name after a slash is what they call the file."""

    @property
    @abstractmethod
    def names(self) -> frozenset[str]:
        """The names of its files and folders."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """The bytes of a file, None of a folder."""

    @abstractmethod
    def path(self, name: str) -> Path:
        """A small file on this machine's disk, fetched first where it is elsewhere. Raises SourceError."""

    @abstractmethod
    def weights(self, name: str) -> WeightFile:
        """A file of tensors, its header read. Raises SourceError and FormatError."""

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return name in self.names and self.size(name) is not None

    def matches(self, pattern: str) -> Iterator[str]:
        """The names of files and folders that match a pattern, in order."""
        return (name for name in sorted(self.names) if fnmatchcase(name, pattern))

    def where(self, name: str) -> str:
        """A file of the folder, for messages."""
        return f"{self}/{name}"


@dataclass(frozen=True)
class LocalFolder(Place):
    """A folder on this machine's disk."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(path.name for path in self.folder.iterdir())

    def size(self, name: str) -> int | None:
        path = self.folder / name
        return path.stat().st_size if path.is_file() else None

    def path(self, name: str) -> Path:
        return self.folder / name

    def weights(self, name: str) -> WeightFile:
        return local_weights(self.folder / name)


def local_weights(path: Path) -> WeightFile:
    """A file of tensors on this disk, its header read. Raises SourceError and FormatError."""
    try:
        time = path.stat().st_mtime_ns
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return WeightFile(path, time, read_header(path))


def beginning_of(file: Remote, size: int) -> Callable[[int], bytes]:
    """Reads a file of `size` bytes from its start, piece by piece, most often with one request."""
    have = bytearray()
    taken = 0

    def read(count: int) -> bytes:
        nonlocal taken
        stop = min(size, taken + count)
        if stop > len(have):
            more = bytearray(min(size, max(_HEAD, stop)) - len(have))
            file.fetch(len(have), memoryview(more))
            have.extend(more)
        taken, piece = stop, bytes(have[taken:stop])
        return piece

    return read

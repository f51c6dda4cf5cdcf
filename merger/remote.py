"""Files that are not on this machine. Knows what can be done with one; knows nothing of hubs, stores or networks."""

from abc import ABC, abstractmethod
from pathlib import Path


class Remote(ABC):
    """A file elsewhere, as it was when it was planned. Two are equal where their addresses are."""

    @property
    @abstractmethod
    def address(self) -> str:
        """Where it is, for people and for fingerprints: pinned, without anything secret."""

    @property
    def name(self) -> str:
        """Its name in its folder."""
        return self.address.rpartition("/")[2]

    @abstractmethod
    def fetch(self, start: int, into: memoryview) -> None:
        """Fill `into` with the file's bytes from `start` on. Threads may do it at once. Raises ReadFailed."""

    @abstractmethod
    def download(self) -> Path:
        """The whole file on this machine's disk, its content checked. Raises ReadFailed and SourceChanged."""

    def __str__(self) -> str:
        return self.address

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and other.address == self.address

    def __hash__(self) -> int:
        return hash(self.address)

"""Models in object stores. Knows objects, listings and the cache of what was downloaded; knows nothing of models.

An object is pinned by its ETag when its folder is listed: every later request asks for that very content.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merger.errors import FormatError, ReadFailed, SourceChanged, SourceError
from merger.remote import Remote
from merger.storage.patience import Again, Patience
from merger.storage.place import Place, WeightFile, beginning_of
from merger.storage.safetensors import header_of
from merger.storage.stores import Location, asked, explained, library, location_of, store_for

_PIECE = 1 << 20  # bytes that are waited for at once
_PART, _CONNECTIONS = 8 << 20, 4  # of a download
_LARGEST_INDEX = 64 << 20  # bytes


@dataclass(frozen=True, eq=False)
class ObjectFile(Remote):
    """An object as a listing described it: its bytes, its ETag, its version where the store tells one."""

    location: Location
    size: int
    etag: str
    version: str | None = None

    @property
    def address(self) -> str:
        etag = self.etag.replace('"', "")
        return f"{self.location}#{etag}"

    @property
    def name(self) -> str:
        return self.location.name

    def fetch(self, start: int, into: memoryview) -> None:
        """Fill `into` from `start` on. Raises ReadFailed, SourceError, SourceChanged where it is another object now."""
        patience = Patience(str(self.location))
        done = 0
        while done < len(into):
            try:
                for piece in self._pieces(start + done, start + len(into)):
                    into[done : done + len(piece)] = piece
                    done += len(piece)
                    patience.renew()
            except Again as failure:
                patience.spend(Again(str(failure)))

    def _pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        """One request; raises Again where fewer bytes came than were asked for."""
        options: dict[str, Any] = {"range": (start, stop), "if_match": self.etag}
        if self.version:
            options["version"] = self.version
        with explained(self.location):
            try:
                answer = store_for(self.location.root).get(self.location.key, options=options)
            except (FileNotFoundError, library().exceptions.PreconditionError):
                raise SourceChanged("was replaced or removed since it was planned", where=str(self.location)) from None
            if answer.meta["size"] != self.size:
                raise SourceChanged(
                    f"has {answer.meta['size']:,} bytes, {self.size:,} were planned", where=str(self.location)
                )
            if tuple(answer.range) != (start, stop):
                raise Again("the store sends another range than was asked for")
            for piece in answer.stream(_PIECE):
                start += len(piece)
                if start > stop:
                    raise Again("the store sends more than was asked for")
                yield memoryview(piece)
        if start < stop:
            raise Again(f"the answer ended {stop - start:,} bytes early")

    def download(self) -> Path:
        """The whole object in the cache of this user, by its address and ETag; its length is checked."""
        path = _cache() / hashlib.sha256(self.address.encode()).hexdigest()[:32] / self.name
        try:
            if not (path.is_file() and path.stat().st_size == self.size):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._download(path)
        except OSError as error:
            message = f"cannot be kept in the cache: {error.strerror}"
            raise ReadFailed(message, where=str(path), remedy="XDG_CACHE_HOME says where caches are.") from error
        return path

    def _download(self, path: Path) -> None:
        handle, temporary = tempfile.mkstemp(dir=path.parent)

        def keep(start: int) -> None:
            part = memoryview(bytearray(min(_PART, self.size - start)))
            self.fetch(start, part)
            done = 0
            while done < len(part):
                done += os.pwrite(handle, part[done:], start + done)

        try:
            with ThreadPoolExecutor(_CONNECTIONS) as pool:
                list(pool.map(keep, range(0, self.size, _PART)))
            os.fsync(handle)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink()
            raise
        finally:
            os.close(handle)


def _cache() -> Path:
    """Where objects are kept that were downloaded whole; whoever wants the space may remove it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "merger" / "objects"


# ---- folders ------------------------------------------------------------------------------------------


class ObjectFolder(Place):
    """The objects whose keys begin alike, up to the next slash."""

    def __init__(self, location: Location) -> None:
        """Raises SourceError where there is nothing."""
        self._location = location
        found = listed(location)
        self._files = {Path(entry["path"]).name: entry for entry in found["objects"]}
        self._names = frozenset([*self._files, *(Path(path).name for path in found["common_prefixes"])])
        if not self._names:
            raise SourceError("is not there", where=str(location), remedy="Check the bucket and the folder in it.")

    def __str__(self) -> str:
        return str(self._location)

    @property
    def names(self) -> frozenset[str]:
        return self._names

    def size(self, name: str) -> int | None:
        return self._files[name]["size"] if name in self._files else None

    def file(self, name: str) -> ObjectFile:
        """An object of the folder, as the listing describes it."""
        return _file(self._location.at(name), self._files[name])

    def path(self, name: str) -> Path:
        if name.endswith(".index.json") and self._files[name]["size"] > _LARGEST_INDEX:
            raise FormatError(f"is an index of {self._files[name]['size']:,} bytes", where=self.where(name))
        return self.file(name).download()

    def weights(self, name: str) -> WeightFile:
        return weights_at(self.file(name))


def listed(location: Location) -> dict[str, Any]:
    """The objects and folders of a folder: `objects`, and `common_prefixes`. Raises SourceError and ReadFailed."""
    found = asked(lambda: store_for(location.root).list_with_delimiter(location.key), location)
    # Some tools make an object of no bytes for a folder, with the folder's own key.
    objects = [entry for entry in found["objects"] if entry["path"] != location.key]
    return {"objects": objects, "common_prefixes": found["common_prefixes"]}


def object_at(text: str) -> ObjectFile:
    """The object of this address as it is now. Raises SourceError and ReadFailed."""
    location = location_of(text)
    return _file(location, asked(lambda: store_for(location.root).head(location.key), location))


def weights_at(file: ObjectFile) -> WeightFile:
    """An object of tensors, its header read. Raises SourceError, FormatError, ReadFailed and SourceChanged."""
    return WeightFile(file, 0, header_of(str(file.location), file.size, beginning_of(file, file.size)))


def _file(location: Location, entry: dict[str, Any]) -> ObjectFile:
    if not entry["e_tag"]:
        raise SourceError("the store gives it no ETag, so that a change would not be seen", where=str(location))
    return ObjectFile(location, entry["size"], entry["e_tag"], entry["version"])

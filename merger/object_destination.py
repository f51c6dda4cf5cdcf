"""Results that appear in a bucket. Knows objects, claims and what a put may replace; knows nothing of how a result is
made.

Shards go to the names that they will keep: without its config a folder is no result. Whoever comes first claims the
folder for one plan; its config, put last and only where there is none, is the publication. Every object tells its
SHA-256 and its plan, so that what landed is not sent again and what is not ours is never replaced.
"""

import hashlib
import json
import mimetypes
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merger.destination import Destination, Landed
from merger.errors import MergerError, OutputOccupied, WriteFailed
from merger.plan import Plan
from merger.receipt import FOLDER
from merger.storage.folder import ADAPTER_CONFIG, CONFIG
from merger.storage.objects import listed
from merger.storage.stores import Location, asked, library, location_of, store_for
from merger.verify import MANIFEST

_CLAIM = f"{FOLDER}/claim.json"
_PART, _AT_ONCE = 16 << 20, 3  # bytes of a part, and how many are on their way: what an upload holds in memory
_PARTS = 9000  # of one object; stores take 10,000
_PIECE = 1 << 20


@dataclass(frozen=True)
class _Found:
    """An object that is there: its bytes, and what it tells of itself."""

    size: int
    etag: str
    sha256: str | None
    plan: str | None


@dataclass(frozen=True)
class ObjectDestination(Destination):
    """A folder of a bucket, which the environment says how to reach."""

    location: Location

    @property
    def name(self) -> str:
        return str(self.location)

    def admit(self) -> None:
        self._names()  # that there is such a bucket, and that the keys open it

    def check(self, plan: Plan) -> str | None:
        names = self._names()
        if MANIFEST in names and _last(plan) in names and self._fingerprint(MANIFEST) == plan.fingerprint:
            return self.name
        owner = self._fingerprint(_CLAIM)
        if _last(plan) in names or (names and owner is None):
            raise self._occupied(_what(names))
        if owner not in (None, plan.fingerprint):
            raise self._occupied("holds unfinished work of another recipe, or of sources that have changed")
        return None

    def prepare(self) -> None:
        """See that objects can be put, and that the store heeds the condition that there is none yet."""
        probe = f"{FOLDER}/probe-{uuid.uuid4().hex[:8]}"
        self._create(probe, b"", {})
        heeded = not self._create(probe, b"", {})
        self._remove(probe)
        if not heeded:
            raise WriteFailed(
                "the store replaces objects that shall only be put where there is none (If-None-Match)",
                where=self.name,
                remedy="Push to a store that does conditional writes: S3, GCS, Azure, recent servers of one's own.",
            )

    def upload(self, path: Path) -> Landed:
        """Bring a finished shard there. Raises WriteFailed, OutputOccupied where somebody else's object is there."""
        plan = _plan_of(path)
        size, sha256 = _digest(path)
        self._claim(plan)

        def send() -> str:
            found = self._found(path.name)
            if found and (found.size, found.sha256) != (size, sha256):
                raise self._occupied(f"holds another {path.name}")
            return found.etag if found else self._send(path, size, {"sha256": sha256, "merger": plan})

        etag = asked(send, self.location.at(path.name), WriteFailed)
        return Landed(path.name, size, sha256, self.name, etag)

    def publish(self, folder: Path, plan: Plan, landed: Mapping[str, Landed]) -> str:
        if self.check(plan) is None:
            self._claim(plan.fingerprint)
            for shard in plan.shards:
                self._see(shard.name, landed.get(shard.name))
            for path in _others(folder, plan):
                self._put(path, plan)
            content, last = (folder / _last(plan)).read_bytes(), _last(plan)
            if not self._create(last, content, _told(last, content, plan)) and self.check(plan) is None:
                raise self._occupied(f"holds another {last}")
        self._remove(_CLAIM)
        return self.name

    # ---- what is ours -------------------------------------------------------------------------------------

    def _claim(self, fingerprint: str) -> None:
        """Take the folder for one plan, for all of its processes. Raises OutputOccupied where it is taken."""
        content = json.dumps({"fingerprint": fingerprint}).encode()
        if not self._create(_CLAIM, content, {}):
            if self._fingerprint(_CLAIM) != fingerprint:
                raise self._occupied("is being written by another recipe")
        elif (names := self._names()) and self._fingerprint(MANIFEST) != fingerprint:
            self._remove(_CLAIM)
            raise self._occupied(_what(names))

    def _see(self, name: str, landed: Landed | None) -> None:
        """See that a shard is there as it was uploaded."""
        found = self._found(name)
        if found is None or landed is None or (found.size, found.sha256) != (landed.size, landed.sha256):
            where = str(self.location.at(name))
            raise WriteFailed("is not there as it was uploaded", where=where, remedy="Remove it and run again.")

    def _put(self, path: Path, plan: Plan) -> None:
        """Put a small file, in the place of one that an earlier try of this plan has left."""
        content = path.read_bytes()
        told = _told(path.name, content, plan)
        if self._create(path.name, content, told):
            return
        found = self._found(path.name)
        if found is None or found.plan != plan.fingerprint:
            raise self._occupied(f"holds another {path.name}")
        if found.sha256 != told["sha256"]:
            key, where = self.location.at(path.name).key, self.location.at(path.name)
            asked(lambda: self._store.put(key, content, attributes=told, use_multipart=False), where, WriteFailed)

    def _occupied(self, message: str) -> OutputOccupied:
        remedy = (
            f"merger never replaces what is there. Push to another folder, or remove all below {self.name}/ yourself."
        )
        return OutputOccupied(message, where=self.name, remedy=remedy)

    # ---- objects ------------------------------------------------------------------------------------------

    @property
    def _store(self) -> Any:
        return store_for(self.location.root, writing=True)

    def _names(self) -> set[str]:
        """The names of what is there, without the traces of the work."""
        found = listed(self.location)
        paths = [*(entry["path"] for entry in found["objects"]), *found["common_prefixes"]]
        return {Path(path).name for path in paths} - {FOLDER}

    def _fingerprint(self, name: str) -> str | None:
        """The plan that a claim or a manifest tells, None where there is none."""
        where = self.location.at(name)

        def read() -> bytes:
            try:
                return bytes(self._store.get(where.key).bytes())
            except FileNotFoundError:
                return b"{}"

        try:
            value = json.loads(asked(read, where)).get("fingerprint")
        except (ValueError, AttributeError):
            return ""  # something that is no plan of ours
        return value if isinstance(value, str) else None

    def _found(self, name: str) -> _Found | None:
        where = self.location.at(name)

        def look() -> _Found | None:
            try:
                answer = self._store.get(where.key, options={"head": True})
            except FileNotFoundError:
                return None
            told = answer.attributes
            return _Found(answer.meta["size"], answer.meta["e_tag"] or "", told.get("sha256"), told.get("merger"))

        return asked(look, where, WriteFailed)

    def _create(self, name: str, content: bytes, told: Mapping[str, str]) -> bool:
        """Put an object where there is none; whether it was put. One that an earlier try has put counts as there."""
        where = self.location.at(name)

        def put() -> bool:
            try:
                self._store.put(where.key, content, mode="create", attributes=dict(told))
            except library().exceptions.AlreadyExistsError:
                return False
            return True

        return asked(put, where, WriteFailed)

    def _send(self, path: Path, size: int, told: Mapping[str, str]) -> str:
        """A large file in parts; what was begun is taken back where it fails or is interrupted."""
        part = max(_PART, -(-size // _PARTS // _PIECE) * _PIECE)
        key = self.location.at(path.name).key
        done = self._store.put(key, _pieces(path), attributes=dict(told), chunk_size=part, max_concurrency=_AT_ONCE)
        return str(done["e_tag"])

    def _remove(self, name: str) -> None:
        """Take away a trace of the work, where that is allowed."""
        where = self.location.at(name)
        with suppress(MergerError):
            asked(lambda: self._store.delete([where.key]), where)


def _pieces(path: Path) -> Iterator[bytes]:
    """A file's bytes. Read by us and not by the library, so that an upload can be interrupted. Raises WriteFailed."""
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece
    except OSError as error:
        raise WriteFailed(f"cannot be read any more: {error.strerror}", where=str(path)) from error


def _digest(path: Path) -> tuple[int, str]:
    """The size and the SHA-256 of a file. Raises WriteFailed."""
    size, digest = 0, hashlib.sha256()
    for piece in _pieces(path):
        size += len(piece)
        digest.update(piece)
    return size, digest.hexdigest()


def _told(name: str, content: bytes, plan: Plan) -> dict[str, str]:
    """What is put beside an object. The names are what every store takes: letters and digits."""
    kind = mimetypes.guess_type(name)[0]
    told = {"sha256": hashlib.sha256(content).hexdigest(), "merger": plan.fingerprint}
    return {**told, "Content-Type": kind} if kind else told


def _plan_of(path: Path) -> str:
    """The plan that a finished shard belongs to: its receipt, or the finished result's manifest, tells."""
    for file in (path.parent / FOLDER / f"{path.name}.json", path.parent / MANIFEST):
        with suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads(file.read_text())["fingerprint"])
    raise WriteFailed("is no finished shard: it has no receipt", where=str(path))


def _what(names: set[str]) -> str:
    """What a folder holds, for people."""
    some = ", ".join(sorted(names)[:4])
    return (
        f"holds a finished result of another recipe: {some}" if MANIFEST in names else f"holds something else: {some}"
    )


def _last(plan: Plan) -> str:
    """The file that makes a folder complete."""
    if plan.checkpoint.config is None:
        return MANIFEST
    return ADAPTER_CONFIG if plan.checkpoint.is_adapter else CONFIG


def _others(folder: Path, plan: Plan) -> list[Path]:
    """The files of a result but its shards and the very last, as they are put: index and manifest at the end."""
    shards = {shard.name for shard in plan.shards}
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    left = [name for name in names if name not in shards and name != _last(plan)]
    return [folder / name for name in sorted(left, key=lambda name: (name == MANIFEST, name.endswith(".index.json")))]


def object_destination(url: str) -> ObjectDestination:
    """The destination at an address such as s3://bucket/folder. Raises SourceError."""
    return ObjectDestination(location_of(url))

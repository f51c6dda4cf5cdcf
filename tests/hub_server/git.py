"""The names that git gives to contents: blobs, trees and commits. Knows git's object format; stores nothing."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

SYMLINK, REGULAR = "120000", "100644"


def name(kind: str, data: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """What git holds in the place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


@dataclass(frozen=True)
class File:
    """A file of a commit. `data` is there for files that git holds itself, `sha256` for the large ones."""

    oid: str
    size: int
    sha256: str | None = None
    data: bytes | None = None
    mode: str = REGULAR


def small(data: bytes, mode: str = REGULAR) -> File:
    return File(name("blob", data), len(data), data=data, mode=mode)


def large(sha256: str, size: int) -> File:
    return File(name("blob", pointer(sha256, size)), size, sha256=sha256)


def trees(files: Mapping[str, File], prefix: str = "") -> dict[str, str]:
    """The oid of every folder, the root's under ""."""
    entries: list[tuple[str, str, str]] = []
    found: dict[str, str] = {}
    children: dict[str, dict[str, File]] = {}
    for path, file in files.items():
        head, slash, rest = path.partition("/")
        if slash:
            children.setdefault(head, {})[rest] = file
        else:
            entries.append((head, file.mode, file.oid))
    for head, inside in children.items():
        below = trees(inside, f"{prefix}{head}/")
        found.update(below)
        entries.append((head, "40000", below[f"{prefix}{head}"]))
    entries.sort(key=lambda entry: (entry[0] + "/" * (entry[1] == "40000")).encode())
    data = b"".join(f"{mode} {path}\0".encode() + bytes.fromhex(oid) for path, mode, oid in entries)
    return {**found, prefix.rstrip("/"): name("tree", data)}


@dataclass(frozen=True)
class Commit:
    oid: str
    files: Mapping[str, File]
    folders: Mapping[str, str]
    parents: tuple[str, ...]
    title: str
    message: str
    author: str
    date: datetime

    @property
    def iso_date(self) -> str:
        return self.date.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def commit(
    files: Mapping[str, File], parents: tuple[str, ...], title: str, message: str, author: str, date: datetime
) -> Commit:
    folders = trees(files)
    lines = [f"tree {folders['']}", *(f"parent {oid}" for oid in parents)]
    signature = f"{author} <{author}@users.noreply.huggingface.co> {int(date.timestamp())} +0000"
    lines += [f"author {signature}", f"committer {signature}", "", title, "", message]
    return Commit(name("commit", "\n".join(lines).encode()), files, folders, parents, title, message, author, date)

"""Collects the demo's text: the sources of Python's standard library, which are on every machine that runs this.

Knows where the interpreter keeps its library and which of its files are prose and code that people wrote.
Knows nothing of tokenizers, models or training.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Tests, other people's packages, programs, and tables that a script printed (codecs, build variables).
SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test"}
    | {"tests", "turtledemo"}
)
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Document:
    """One source file: its name below the library's folder, in POSIX form, and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents to predict; no file, and no copy of a file, is in both."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    @property
    def digest(self) -> str:
        """Changes with any name, any text, and with the split."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            for document in part:
                digest.update(f"{document.name}\0{document.text}\0".encode())
            digest.update(b"\1")
        return digest.hexdigest()


def collect(root: Path | None = None) -> Corpus:
    """Reads the library below `root` (this interpreter's own by default) and splits it by file."""
    documents = list(_distinct(_read(root or Path(sysconfig.get_path("stdlib")))))
    return Corpus(
        train=tuple(d for d in documents if not _is_held_out(d.name)),
        held_out=tuple(d for d in documents if _is_held_out(d.name)),
    )


def _read(root: Path) -> Iterator[Document]:
    """The wanted files in the order of their names; a file that is not UTF-8, or empty, is left out."""
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if _is_skipped(relative):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield Document(relative.as_posix(), text)


def _is_skipped(relative: Path) -> bool:
    return any(part in SKIPPED_FOLDERS or part.startswith(SKIPPED_PREFIXES) for part in relative.parts)


def _distinct(documents: Iterator[Document]) -> Iterator[Document]:
    """Drops later copies of a text: two equal files could fall on both sides of the split."""
    seen: set[str] = set()
    for document in documents:
        if document.text not in seen:
            seen.add(document.text)
            yield document


def _is_held_out(name: str) -> bool:
    """By a hash of the name alone, so that a file keeps its side when other files come and go."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0

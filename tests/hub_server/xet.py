"""Contents in Xet's way: xorbs that clients uploaded, xorbs that are only views of files, and files made of them.

Knows where chunks lie and how a range of a file is put together. Knows nothing of HTTP.
"""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from tests.hub_server import xet_formats as formats
from tests.hub_server.errors import HubError
from tests.hub_server.wire import Part, Piece
from tests.hub_server.xet_formats import Chunk, Term, XetFile

CHUNK = 64 << 10
_PER_XORB = 960  # a little under the 64 MiB that a xorb may have, headers included


@dataclass(frozen=True)
class Xorb:
    hash: str
    chunks: tuple[Chunk, ...]
    hashes: tuple[bytes, ...]  # of the chunks
    path: Path

    @property
    def size(self) -> int:
        return self.chunks[-1].end

    def body(self) -> tuple[Piece, ...]:
        return (Part(self.path, 0, self.size),)


@dataclass(frozen=True)
class View(Xorb):
    """Chunks of a file that lies somewhere, as if headers stood between them. Nothing is copied."""

    start: int

    def body(self) -> tuple[Piece, ...]:
        return tuple(self._pieces())

    def _pieces(self) -> Iterator[Piece]:
        position = self.start
        for chunk in self.chunks:
            yield formats.chunk_header(chunk.length)
            yield Part(self.path, position, chunk.length)
            position += chunk.length


class Xet:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.xorbs: dict[str, Xorb] = {}
        self.files: dict[str, XetFile] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def add_xorb(self, name: str, data: bytes) -> bool:
        """Keep an uploaded xorb after looking whether it has the content that its name says. False: known before."""
        try:
            chunks = formats.chunks_of(data)
            view = memoryview(data)
            hashes = [(formats.chunk_hash(formats.unpacked(view, chunk)), chunk.length) for chunk in chunks]
        except (ValueError, IndexError, OSError) as error:
            raise HubError(400, f"xorb {name}: {error}") from error
        if formats.text(formats.xorb_hash(hashes)) != name:
            raise HubError(400, f"xorb {name} has another content")
        new = name not in self.xorbs
        path = self._folder / name
        path.write_bytes(data)
        self.xorbs.setdefault(name, Xorb(name, tuple(chunks), tuple(digest for digest, _ in hashes), path))
        return new

    def add_file(self, file: XetFile) -> None:
        """Register a file whose xorbs are here, after looking whether its name is that of its chunks."""
        nodes: list[tuple[bytes, int]] = []
        for term in file.terms:
            if term.xorb not in self.xorbs:
                raise HubError(400, f"file {file.hash} needs xorb {term.xorb}, which was not uploaded")
            xorb, some = self.xorbs[term.xorb], slice(term.start, term.end)
            lengths = [chunk.length for chunk in xorb.chunks[some]]
            if sum(lengths) != term.length:
                raise HubError(400, f"file {file.hash} expects another length of xorb {term.xorb}")
            nodes += zip(xorb.hashes[some], lengths, strict=True)
        if formats.text(formats.file_hash(nodes)) != file.hash:
            raise HubError(400, f"file {file.hash} is not what its chunks make")
        self.files[file.hash] = file

    def content(self, file: XetFile) -> Iterator[bytes]:
        """The bytes of a file, chunk by chunk."""
        for term in file.terms:  # of views nobody asks: their bytes are in the blob
            xorb = self.xorbs[term.xorb]
            data = memoryview(xorb.path.read_bytes())
            for chunk in xorb.chunks[term.start : term.end]:
                yield formats.unpacked(data, chunk)

    def view(self, path: Path, sha256: str) -> XetFile:
        """A file as it lies, cut into chunks of equal length.

        The client would cut it by its content, so the file's Xet hash is another than the client's own would be; both
        are good names for the same bytes.
        """
        chunks: list[tuple[bytes, int]] = []
        with path.open("rb") as file:
            while data := file.read(CHUNK):
                chunks.append((formats.chunk_hash(data), len(data)))
        terms = []
        for first in range(0, len(chunks), _PER_XORB):
            some = chunks[first : first + _PER_XORB]
            name = formats.text(formats.xorb_hash(some))
            laid_out, hashes = _laid_out([size for _, size in some]), tuple(digest for digest, _ in some)
            self.xorbs.setdefault(name, View(name, laid_out, hashes, path, first * CHUNK))
            terms.append(Term(name, 0, len(some), sum(size for _, size in some)))
        found = XetFile(formats.text(formats.file_hash(chunks)), tuple(terms), sha256)
        self.files[found.hash] = found
        return found

    def terms(self, file: XetFile, start: int, end: int) -> tuple[int, list[Term]]:
        """The chunks that hold the bytes [start, end), and how many bytes before `start` the first of them holds."""
        found: list[Term] = []
        position, skipped = 0, 0
        for term in file.terms:
            low, high = max(start - position, 0), min(end - position, term.length)
            position += term.length
            if low >= high:
                continue
            lengths = [chunk.length for chunk in self.xorbs[term.xorb].chunks[term.start : term.end]]
            ends = list(accumulate(lengths))
            first, last = bisect.bisect_right(ends, low), bisect.bisect_left(ends, high)
            before = ends[first] - lengths[first]
            if not found:
                skipped = low - before
            found.append(Term(term.xorb, term.start + first, term.start + last + 1, ends[last] - before))
        return skipped, found


def _laid_out(lengths: list[int]) -> tuple[Chunk, ...]:
    ends = list(accumulate(length + 8 for length in lengths))
    return tuple(Chunk(end - length - 8, end, 0, length) for length, end in zip(lengths, ends, strict=True))

"""The formats of Xet storage as published (huggingface.co/docs/xet): hashes, xorbs and shards.

Knows bytes only. A file is a list of chunks; a xorb is a file of chunks, each with a header of 8 bytes; a shard says
which ranges of chunks of which xorbs make up a file.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

_DATA_KEY = bytes.fromhex("6697f5775b9550de3135cbaca597181c9de421109beb2b58b4d0b04b93adf229")
_NODE_KEY = bytes.fromhex("017ec5c7a5472996fd946666b48a02e65ddd536f37c76dd2f86352e64a53713f")
_BOOKEND = b"\xff" * 32
_VERIFIED, _EXTENDED = 1 << 31, 1 << 30


def text(digest: bytes) -> str:
    """A hash as the API writes it: four little-endian numbers of 64 bits in hexadecimal."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


def digest_of(written: str) -> bytes:
    return struct.pack("<4Q", *(int(written[start : start + 16], 16) for start in range(0, 64, 16)))


def chunk_hash(data: bytes | memoryview) -> bytes:
    return blake3(data, key=_DATA_KEY).digest()


def _merged(nodes: Sequence[tuple[bytes, int]]) -> tuple[bytes, int]:
    lines = "".join(f"{text(digest)} : {size}\n" for digest, size in nodes)
    return blake3(lines.encode(), key=_NODE_KEY).digest(), sum(size for _, size in nodes)


def _cut(nodes: Sequence[tuple[bytes, int]]) -> int:
    """How many nodes the next parent takes: up to the first, from the third on, whose hash divides by four."""
    end = min(9, len(nodes))
    if len(nodes) <= 2:
        return len(nodes)
    return next((place + 1 for place in range(2, end) if nodes[place][0][24] % 4 == 0), end)


def xorb_hash(chunks: Sequence[tuple[bytes, int]]) -> bytes:
    """The root of the tree over (hash, size) of the chunks."""
    nodes = list(chunks)
    while len(nodes) > 1:
        parents = []
        while nodes:
            taken = _cut(nodes)
            parents.append(_merged(nodes[:taken]))
            nodes = nodes[taken:]
        nodes = parents
    return nodes[0][0] if nodes else bytes(32)


def file_hash(chunks: Sequence[tuple[bytes, int]]) -> bytes:
    return blake3(xorb_hash(chunks), key=bytes(32)).digest() if chunks else bytes(32)


@dataclass(frozen=True)
class Chunk:
    """Where a chunk lies in its xorb's file, header included, and how long its content is."""

    start: int
    end: int
    scheme: int
    length: int


def chunk_header(length: int) -> bytes:
    """The header of a chunk that is not compressed."""
    return b"\0" + length.to_bytes(3, "little") + b"\0" + length.to_bytes(3, "little")


def chunks_of(data: bytes | memoryview) -> list[Chunk]:
    """The chunks of a serialised xorb; what follows them (a footer) is left out."""
    found, position = [], 0
    while position + 8 <= len(data) and bytes(data[position : position + 7]) != b"XETBLOB":
        if data[position] != 0:
            raise ValueError(f"a chunk of version {data[position]}")
        packed = int.from_bytes(data[position + 1 : position + 4], "little")
        length = int.from_bytes(data[position + 5 : position + 8], "little")
        found.append(Chunk(position, position + 8 + packed, data[position + 4], length))
        position += 8 + packed
    return found


def unpacked(data: memoryview, chunk: Chunk) -> bytes:
    """A chunk's content. Schemes: 0 plain, 1 LZ4, 2 LZ4 of the bytes grouped by their place in four."""
    packed = data[chunk.start + 8 : chunk.end]
    if chunk.scheme == 0:
        return bytes(packed)
    import pyarrow

    plain = pyarrow.decompress(packed, chunk.length, codec="lz4", asbytes=True)
    return plain if chunk.scheme == 1 else _ungrouped(plain)


def _ungrouped(data: bytes) -> bytes:
    planes, result = np.frombuffer(data, np.uint8), np.empty(len(data), np.uint8)
    position = 0
    for place in range(4):
        size = len(result[place::4])
        result[place::4] = planes[position : position + size]
        position += size
    return result.tobytes()


@dataclass(frozen=True)
class Term:
    """Chunks [start, end) of a xorb and the length of their contents."""

    xorb: str
    start: int
    end: int
    length: int


@dataclass(frozen=True)
class XetFile:
    hash: str
    terms: tuple[Term, ...]
    sha256: str | None

    @property
    def size(self) -> int:
        return sum(term.length for term in self.terms)


@dataclass(frozen=True)
class ShardXorb:
    """What a shard says of a xorb: its chunks' hashes and lengths."""

    hash: str
    chunks: tuple[tuple[bytes, int], ...]


class _Reader:
    """The records of a shard, each of 48 bytes."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 0

    def record(self, layout: str) -> tuple:
        found = struct.unpack_from(layout, self._data, self._position)
        self._position += 48
        return found


def shard(data: bytes) -> tuple[list[XetFile], list[ShardXorb]]:
    """The files and the xorbs that a shard describes."""
    if data[:14] != b"HFRepoMetaData":
        raise ValueError("this is no shard")
    reader = _Reader(data)
    reader.record("<32sQQ")
    return list(_files(reader)), list(_xorbs(reader))


def _files(reader: _Reader) -> Iterator[XetFile]:
    while True:
        name, flags, count, _ = reader.record("<32sIIQ")
        if name == _BOOKEND:
            return
        entries = [reader.record("<32sIIII") for _ in range(count)]
        for _ in range(count if flags & _VERIFIED else 0):
            reader.record("<32s16s")
        sha256 = text(reader.record("<32s16s")[0]) if flags & _EXTENDED else None
        terms = tuple(Term(text(xorb), start, end, length) for xorb, _, length, start, end in entries)
        yield XetFile(text(name), terms, sha256)


def _xorbs(reader: _Reader) -> Iterator[ShardXorb]:
    while True:
        name, _, count, _, _ = reader.record("<32sIIII")
        if name == _BOOKEND:
            return
        entries = [reader.record("<32sIIII") for _ in range(count)]
        yield ShardXorb(text(name), tuple((entry[0], entry[2]) for entry in entries))

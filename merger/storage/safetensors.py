"""The safetensors file format: headers parsed, checked and built.

Knows one file's header; knows nothing of tensor values.

A file is 8 bytes (little-endian length of the header), the header (JSON, padded with spaces) and the data,
which the tensors cover without holes or overlaps. Checked more strictly than the reference implementation
(safetensors 0.8): duplicate names, unknown fields and oversize headers are refused too.
"""

import hashlib
import json
import math
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from merger.dtypes import DTYPES
from merger.errors import FormatError, SourceError

MAX_HEADER = 32 << 20  # bytes; the largest known checkpoints need 12 MB, a hostile one may ask for gigabytes
MAX_TENSORS = 500_000  # in one file
MAX_DIMENSIONS = 64
MAX_NAME = 1024  # characters
PAGE = 4096  # our data sections start at a multiple of this, so that direct input and output need no copy


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: dtype name, shape, and where its bytes lie, counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself: its tensors in the order of their bytes, its metadata, a digest of the header."""

    file_size: int
    data_start: int
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    sha256: str


def read_header(path: Path) -> Header:
    """Read and check the header of the file at `path`; no tensor is read.

    Raises SourceError where the file cannot be opened and FormatError where it breaks the format.
    """
    try:
        with path.open("rb") as file:
            return header_of(str(path), os.fstat(file.fileno()).st_size, file.read)
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", where=str(path)) from error


def header_of(where: str, size: int, read: Callable[[int], bytes]) -> Header:
    """The checked header of a file of `size` bytes, from its first bytes: `read` gives the next so many.

    Raises FormatError, and what `read` raises.
    """
    head = read(min(size, 8))
    text = read(_header_length(where, head, size))
    return _parse(where, text, size, hashlib.sha256(head + text).hexdigest())


def _header_length(where: str, head: bytes, size: int) -> int:
    if len(head) < 8:
        _refuse(where, f"is {size} bytes long: too short for a safetensors file")
    length = int(struct.unpack("<Q", head)[0])
    if length > MAX_HEADER:
        _refuse(where, f"claims a header of {length:,} bytes; merger reads headers of up to {MAX_HEADER:,}")
    if length + 8 > size:
        _refuse(where, f"is truncated: the header alone takes {length + 8:,} bytes, the file has {size:,}")
    return length


def _parse(where: str, text: bytes, size: int, digest: str) -> Header:
    try:
        entries = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_int=_integer if b"-0" in text else None
        )
    except _Duplicate as error:
        _refuse(where, f"names {error} twice in its header")
    except (ValueError, RecursionError) as error:
        _refuse(where, f"has a header that is not JSON: {error}")
    if type(entries) is not dict or not text.startswith(b"{"):
        _refuse(where, "has a header that is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if type(metadata) is not dict or not all(_is_text(word) for pair in metadata.items() for word in pair):
        _refuse(where, "has a `__metadata__` that is not an object of strings")
    if len(entries) > MAX_TENSORS:
        _refuse(where, f"holds {len(entries):,} tensors; merger reads up to {MAX_TENSORS:,} in one file")
    data_start = len(text) + 8
    tensors = {name: _tensor(where, name, entry, data_start) for name, entry in entries.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_cover(where, tensors, data_start, size)
    return Header(size, data_start, tensors, metadata, digest)


class _Duplicate(Exception):
    """A JSON object names a key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise _Duplicate(_brief(next(name for name, count in counts.items() if count > 1)))
    return entries


def _integer(text: str) -> int:
    """Python reads `-0` as 0, which the format does not allow."""
    if text == "-0":
        raise ValueError("-0 is no natural number")
    return int(text)


def _is_text(value: Any) -> bool:
    """A string of whole characters: JSON can spell half of one."""
    return type(value) is str and not any("\ud800" <= character <= "\udfff" for character in value)


_LIMIT = 1 << 63
_FIELDS = {"dtype", "shape", "data_offsets"}


def _tensor(where: str, name: str, entry: Any, data_start: int) -> StoredTensor:
    if not name or len(name) > MAX_NAME or not name.isprintable():
        _refuse(where, f"has a tensor with an unusable name: {name[:80]!r}")
    if type(entry) is not dict or entry.keys() != _FIELDS:
        _refuse(where, "must have exactly the fields dtype, shape and data_offsets", name)
    dtype = DTYPES.get(entry["dtype"]) if type(entry["dtype"]) is str else None
    if dtype is None:
        _refuse(where, f"has the unknown dtype {_brief(entry['dtype'])}", name)
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        _refuse(where, f"has a bad shape or bad offsets: {_brief(shape)}, {_brief(offsets)}", name)
    if len(shape) > MAX_DIMENSIONS or math.prod(size or 1 for size in shape) >= _LIMIT:
        _refuse(where, f"has more elements than there can be: {_brief(shape)}", name)
    bits = math.prod(shape) * dtype.bits
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        wanted = f"{dtype.name} {_brief(shape)} takes {bits // 8:,} bytes{' and a part' if bits % 8 else ''}"
        _refuse(where, f"{wanted}, its offsets span {offsets[1] - offsets[0]:,}", name)
    return StoredTensor(dtype.name, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _brief(value: Any) -> str:
    """What a file says, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _naturals(values: Any) -> bool:
    if type(values) is not list:
        return False
    for value in values:  # noqa: SIM110  (a plain loop: this runs twice for each of up to a million tensors)
        if type(value) is not int or not 0 <= value < _LIMIT:
            return False
    return True


def _check_cover(where: str, tensors: Mapping[str, StoredTensor], data_start: int, size: int) -> None:
    position = data_start
    for name, tensor in tensors.items():
        if tensor.start != position:
            problem = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
            _refuse(where, f"{problem} (starts at {tensor.start:,}, expected {position:,})", name)
        position = tensor.stop
    if position != size:
        problem = "is truncated" if size < position else "has bytes after its last tensor"
        _refuse(where, f"{problem}: its header describes {position:,} bytes, the file has {size:,}")


def _refuse(where: str, problem: str, tensor: str = "") -> NoReturn:
    raise FormatError(problem, where=f"{where}: tensor {tensor!r}" if tensor else where)


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file: length and header, padded so that the data starts at a multiple of PAGE.

    `tensors` are (name, dtype name, shape) in the order in which their bytes will follow.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * DTYPES[dtype].bits // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % PAGE)
    return struct.pack("<Q", len(text)) + text

"""Checksums of checkpoint files that can be made in pieces, in any order. Knows bytes only.

A file's checksum is the xxh3-128 of its header followed by the xxh3-64 of every LEAF bytes of its data, so
threads can work on different parts of a file. It finds damage; it is no defence against forgery.
"""

import xxhash

from merger.kernels import Bytes

LEAF = 64 << 10  # bytes


def leaves(data: Bytes) -> bytes:
    """The xxh3-64 of each LEAF bytes, 8 bytes each, back to back."""
    return b"".join(xxhash.xxh3_64_digest(data[i : i + LEAF].data) for i in range(0, data.size, LEAF))


def checksum(header: bytes, data_leaves: bytes | bytearray) -> str:
    """The checksum of a file, in hexadecimal."""
    return str(xxhash.xxh3_128_hexdigest(header + bytes(data_leaves)))

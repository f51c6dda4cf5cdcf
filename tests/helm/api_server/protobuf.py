"""Reads the two messages that helm sends as protobuf: Secrets and the options of a deletion.

Knows the field numbers of these messages in Kubernetes' API; knows nothing of what is done with them.
"""

import base64
from collections.abc import Iterator
from typing import Any

MAGIC = b"k8s\0"
_VARINT, _BYTES = 0, 2


def decoded(message: bytes) -> dict[str, Any]:
    """The object in an envelope (`k8s\\0`, then apiVersion, kind and the message)."""
    envelope = _fields(message.removeprefix(MAGIC))
    kind = _fields(envelope[1][0])[2][0].decode()
    version = _fields(envelope[1][0])[1][0].decode()
    raw = _fields(envelope[2][0]) if 2 in envelope else {}
    return {"apiVersion": version, "kind": kind, **_READERS[kind](raw)}


def _secret(fields: dict[int, list[Any]]) -> dict[str, Any]:
    data = {key.decode(): base64.b64encode(value).decode() for key, value in _pairs(fields.get(2, []))}
    return {"metadata": _metadata(fields[1][0]), "type": fields.get(3, [b"Opaque"])[0].decode(), "data": data}


def _metadata(message: bytes) -> dict[str, Any]:
    fields = _fields(message)
    texts = {1: "name", 2: "generateName", 3: "namespace", 5: "uid", 6: "resourceVersion"}
    found: dict[str, Any] = {name: fields[i][0].decode() for i, name in texts.items() if fields.get(i, [b""])[0]}
    for i, name in {11: "labels", 12: "annotations"}.items():
        if i in fields:
            found[name] = {key.decode(): value.decode() for key, value in _pairs(fields[i])}
    return found


def _options(fields: dict[int, list[Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"gracePeriodSeconds": fields[1][0]} if 1 in fields else {}
    return found | ({"propagationPolicy": fields[4][0].decode()} if 4 in fields else {})


_READERS = {"Secret": _secret, "DeleteOptions": _options}


def _pairs(messages: list[bytes]) -> Iterator[tuple[bytes, bytes]]:
    for message in messages:
        fields = _fields(message)
        yield fields.get(1, [b""])[0], fields.get(2, [b""])[0]


def _fields(message: bytes) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == _VARINT:
            value, at = _varint(message, at)
            found.setdefault(key >> 3, []).append(value)
        elif key & 7 == _BYTES:
            size, at = _varint(message, at)
            found.setdefault(key >> 3, []).append(message[at : at + size])
            at += size
        else:
            raise ValueError(f"wire type {key & 7} at byte {at}")
    return found


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at

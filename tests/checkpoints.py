"""Small real checkpoints, made on the spot. Knows the libraries that own the formats; knows nothing of merger."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import TensorSpec, deserialize, serialize_file

# A tensor whose dtype numpy lacks: the dtype's name in a header, the shape, the bytes.
Raw = tuple[str, tuple[int, ...], bytes]

NUMPY = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "C64": np.complex64,
}
# What the safetensors library calls the dtypes that numpy lacks; it writes neither of the six-bit ones.
_SPEC_NAMES = {
    "BF16": "bfloat16",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2",
}

# ---- writing ------------------------------------------------------------------------------------------


def write_model(
    folder: Path,
    tensors: Mapping[str, np.ndarray | Raw],
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
    side_files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """A model folder as transformers leaves one; `tensors` are dealt out to `shards` files, several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for name, content in (side_files or {}).items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        write_safetensors(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return folder


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray | Raw], metadata: Mapping[str, str] | None = None
) -> Path:
    """A file written by the safetensors library."""
    buffers = {name: _buffer(tensor) for name, tensor in tensors.items()}
    specs = {name: _spec(tensors[name], buffer) for name, buffer in buffers.items()}
    serialize_file(specs, path, dict(metadata or {"format": "pt"}))
    return path


def _buffer(tensor: np.ndarray | Raw) -> np.ndarray:
    return np.frombuffer(tensor[2], np.uint8) if isinstance(tensor, tuple) else np.ascontiguousarray(tensor)


def _spec(tensor: np.ndarray | Raw, buffer: np.ndarray) -> TensorSpec:
    if isinstance(tensor, tuple):
        dtype, shape, _ = tensor
        name = _SPEC_NAMES.get(dtype) or np.dtype(NUMPY[dtype]).name
        shape = (*shape[:-1], shape[-1] // 2) if dtype == "F4" else shape
    else:
        name, shape = tensor.dtype.name, tensor.shape
    return TensorSpec(dtype=name, shape=shape, data_ptr=buffer.ctypes.data, data_len=buffer.nbytes)


def write_index(folder: Path, weight_map: Mapping[str, str]) -> Path:
    """The index of a sharded model."""
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}))
    return index


def write_header(path: Path, header: Mapping[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header, right or wrong, and this data; `length` is what it claims of the header's length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str, shape: Sequence[Any], start: int, stop: int) -> dict[str, Any]:
    """A tensor's entry in a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


# ---- values -------------------------------------------------------------------------------------------


def bfloat16(values: np.ndarray) -> Raw:
    """Values as BF16, cut off after eight bits: exact for values that are BF16 already."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32) >> np.uint32(16)
    return "BF16", values.shape, bits.astype(np.uint16).tobytes()


def as_float64(content: bytes, dtype: str) -> np.ndarray:
    """Stored floating values, exactly."""
    if dtype == "BF16":
        values = (np.frombuffer(content, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        values = np.frombuffer(content, NUMPY[dtype])
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return values.astype(np.float64)


def read_raw(path: Path) -> dict[str, Raw]:
    """The tensors of a file as the safetensors library reads them."""
    stored = deserialize(path.read_bytes())
    return {name: (it["dtype"], tuple(it["shape"]), bytes(it["data"])) for name, it in stored}

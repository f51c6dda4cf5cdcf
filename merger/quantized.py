"""Quantized checkpoints: those of eight-bit floats with scales become what they stand for, others are refused.

Knows quantization configs and the names of scales; reads no weights. `weight_scale_inv`, in spite of its name, is
multiplied by like `weight_scale`: it is the inverse of what the weights were multiplied by when they were quantized.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from merger.architecture import quantization_of, with_dtype, with_quantization_of
from merger.checkpoint import Checkpoint
from merger.dtypes import FROM_TORCH, TORCH_NAMES
from merger.errors import UnsupportedModel
from merger.expression import Expression, Stored
from merger.scaled import Blocks, Scaled

Layout = Literal["tensor", "channel"] | tuple[int, int]  # one scale for the whole, for each row, for each block

_NARROW = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
_SUFFIXES = ("_scale_inv", "_scale")  # of a tensor's name: X.weight_scale, X.gate_up_proj_scale_inv
_OF_ACTIVATIONS = re.compile(
    r"(^|[._])(input|activation|output|act)_scale(_inv|_ub)?$|(^|\.)([qkv]|prob|softmax)_scale(_inv)?$"
)
_ORPHAN = re.compile(r"(^|\.)weight_(scale|scale_inv|zero_point|g_idx|packed)$")
_Block = tuple[PositiveInt, PositiveInt]
_SIDE_FILE = "hf_quant_config.json"  # of modelopt: says the same as the config
_REMEDY = (
    "Dequantize it first, where its own library runs (transformers' `dequantize()` and `save_pretrained`), or use the "
    "model in the precision that it was quantized from."
)

# ---- what a config says -------------------------------------------------------------------------------


class _Weights(BaseModel):
    """How a group of modules has its weights, in the terms of compressed-tensors' `QuantizationArgs`."""

    model_config = ConfigDict(extra="ignore")

    num_bits: int
    type: str
    strategy: str | None = None
    symmetric: bool = True
    block_structure: _Block | None = None

    def layout(self) -> Layout | None:
        if (self.num_bits, self.type, self.symmetric) != (8, "float", True):
            return None
        if self.strategy == "block":
            return self.block_structure
        if self.strategy in (None, "tensor"):
            return "tensor"
        return "channel" if self.strategy == "channel" else None


class _Group(BaseModel):
    model_config = ConfigDict(extra="ignore")

    weights: _Weights | None = None


class _Quantization(BaseModel):
    """What is read of a `quantization_config`."""

    model_config = ConfigDict(extra="ignore")

    quant_method: str = ""
    format: str | None = None
    weight_block_size: _Block | None = None
    quant_algo: str | None = None
    config_groups: dict[str, _Group] = {}

    def layouts(self) -> tuple[Layout, ...]:
        """How scales may lie; none where the values are not eight-bit floats with scales."""
        match self.quant_method:
            case "fp8":
                return (self.weight_block_size,) if self.weight_block_size else ("tensor", "channel")
            case "fbgemm_fp8":
                return ("channel",)
            case "modelopt" if self.quant_algo == "FP8":
                return ("tensor",)
            case "compressed-tensors" if self.format in ("float-quantized", "naive-quantized"):
                found = [group.weights.layout() if group.weights else None for group in self.config_groups.values()]
                return tuple(layout for layout in found if layout) if None not in found else ()
        return ()


def _layouts(said: Mapping[str, Any] | None, label: str) -> tuple[Layout, ...]:
    """How scales may lie. Raises UnsupportedModel where the config says that it is none of these kinds."""
    if said is None:
        return ("tensor", "channel")
    try:
        layouts = _Quantization.model_validate(said).layouts()
    except ValidationError:
        layouts = ()
    if layouts:
        return layouts
    raise UnsupportedModel(
        f"is quantized ({_called(said)}): its stored numbers are not its weights, and merger turns only eight-bit "
        "floats with scales back into weights",
        where=label,
        remedy=_REMEDY,
    )


def _called(said: Mapping[str, Any]) -> str:
    kind = f"quant_method: {said.get('quant_method') or 'not stated'}"
    details = [f"{key}: {said[key]}" for key in ("format", "quant_algo") if isinstance(said.get(key), str)]
    return ", ".join([kind, *details])


# ---- scales and what they belong to -------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """Narrow values and their scales, with both names."""

    name: str
    scale: str
    made: Scaled


def _pair(name: str, checkpoint: Checkpoint, layouts: Sequence[Layout], dtype: str) -> _Pair:
    """A narrow tensor with its scales. Raises UnsupportedModel, with its name, where they are missing or do not fit."""
    where = f"{checkpoint.label}: tensor {name!r}"
    tensor = checkpoint.tensors[name]
    found = [f"{name}{suffix}" for suffix in _SUFFIXES if f"{name}{suffix}" in checkpoint.tensors]
    if len(found) != 1:
        raise UnsupportedModel(
            f"is {tensor.dtype}, whose numbers mean nothing without their scales: "
            + (" and ".join(found) + " are both there" if found else f"{name}{_SUFFIXES[1]} is missing"),
            where=where,
            remedy=f"Is the checkpoint whole? {_REMEDY}",
        )
    scales = checkpoint.tensors[found[0]]
    if not isinstance(scales, Stored) or scales.dtype not in _SCALE_DTYPES:
        raise UnsupportedModel(f"has scales of the type {scales.dtype}", where=where, remedy=_REMEDY)
    blocks = next((b for b in (_blocks(tensor.shape, scales.shape, layout) for layout in layouts) if b), None)
    if blocks is None:
        wanted = " or ".join(_says(layout) for layout in layouts)
        raise UnsupportedModel(
            f"has the shape {list(tensor.shape)} and {found[0]} {list(scales.shape)}, which is not {wanted}",
            where=where,
            remedy=_REMEDY,
        )
    return _Pair(name, found[0], Scaled(dtype, tensor.shape, tensor, scales, blocks))


def _says(layout: Layout) -> str:
    match layout:
        case "tensor":
            return "one scale"
        case "channel":
            return "one scale a row"
        case (rows, columns):
            return f"one scale for each {rows} x {columns} elements"


def _blocks(shape: tuple[int, ...], scales: tuple[int, ...], layout: Layout) -> Blocks | None:
    """The blocks of a tensor that scales of a shape belong to, or None where they do not fit."""
    lead, (height, width) = shape[:-2], (1, 1, *shape)[-2:]
    whole = Blocks(math.prod(shape[:-1]), width, math.prod(shape[:-1]), width)
    bare = tuple(size for size in scales if size != 1)
    match layout:
        case "tensor" if math.prod(scales) == 1:
            return whole
        case "tensor" if lead and bare == tuple(size for size in lead if size != 1):
            return Blocks(height, width, height, width)
        case "channel" if scales in ((*shape[:-1], 1), shape[:-1]):
            return Blocks(height, width, 1, width)
        case (rows, columns) if scales == (*lead, -(-height // rows), -(-width // columns)):
            return Blocks(height, width, rows, columns)
    return None


# ---- the checkpoint -----------------------------------------------------------------------------------


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint in the values that its numbers stand for, in the model's dtype (BF16 where its config names none).

    One that is not quantized is itself. Scales, and what the config says of them, are left out. Raises UnsupportedModel
    where it is quantized in another way than by eight-bit floats with a scale for each tensor, row or block, and, with
    the tensor, where scales are missing or do not fit.
    """
    said = quantization_of(checkpoint.config)
    narrow = [name for name, tensor in checkpoint.tensors.items() if tensor.dtype in _NARROW]
    if said is None and not narrow:
        return checkpoint
    layouts = _layouts(said, checkpoint.label)
    if not narrow:
        raise UnsupportedModel(
            f"is quantized ({_called(said or {})}), as its config says, and holds no eight-bit floats",
            where=checkpoint.label,
            remedy="If these are the weights themselves, take quantization_config out of its config.json. "
            f"If not: {_REMEDY}",
        )
    dtype = _dtype_of(checkpoint.config)
    pairs = {name: _pair(name, checkpoint, layouts, dtype) for name in narrow}
    used = {pair.scale for pair in pairs.values()}
    dropped = [name for name in checkpoint.tensors if name not in used and _OF_ACTIVATIONS.search(name)]
    _check_orphans(checkpoint, {*used, *dropped})
    left_out = {*used, *dropped}
    tensors: dict[str, Expression] = {
        name: pairs[name].made if name in pairs else tensor
        for name, tensor in checkpoint.tensors.items()
        if name not in left_out
    }
    return replace(
        checkpoint,
        tensors=tensors,
        config=_config(checkpoint.config, dtype),
        side_files={name: path for name, path in checkpoint.side_files.items() if name != _SIDE_FILE},
        notes=(*checkpoint.notes, *_notes(checkpoint.label, len(pairs), dropped, dtype)),
    )


def _check_orphans(checkpoint: Checkpoint, known: Iterable[str]) -> None:
    """See that no scale is left of a tensor that was not scaled by it. Raises UnsupportedModel with its name."""
    for name in checkpoint.tensors.keys() - set(known):
        stems = [name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix)]
        if _ORPHAN.search(name) or any(stem in checkpoint.tensors for stem in stems):
            raise UnsupportedModel(
                "belongs to quantized weights, and there are no eight-bit floats that it goes with",
                where=f"{checkpoint.label}: tensor {name!r}",
                remedy=_REMEDY,
            )


def _dtype_of(config: Mapping[str, Any] | None) -> str:
    inner = (config or {}).get("text_config")
    for part in (config or {}, inner if isinstance(inner, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) in FROM_TORCH:
                return FROM_TORCH[part[key]]
    return "BF16"


def _config(config: Mapping[str, Any] | None, dtype: str) -> Mapping[str, Any] | None:
    if config is None:
        return None
    bare = with_quantization_of(config)
    return (
        bare if {bare.get("dtype"), bare.get("torch_dtype")} & {*FROM_TORCH} else with_dtype(bare, TORCH_NAMES[dtype])
    )


def _notes(label: str, count: int, dropped: Sequence[str], dtype: str) -> list[str]:
    notes = [
        f"{count} tensors of {label} are dequantized to {TORCH_NAMES[dtype]}: its eight-bit floats by their scales"
    ]
    if dropped:
        notes.append(f"{len(dropped)} scales of activations in {label} are left out, {dropped[0]} first")
    return notes

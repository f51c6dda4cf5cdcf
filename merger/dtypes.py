"""The data types of the safetensors format. Knows names and sizes; knows nothing of files or arithmetic.

Source: the format's reference implementation, safetensors 0.8, `Dtype`.
"""

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What may be done with the values of a type."""

    FLOAT = "float"  # arithmetic
    INTEGER = "integer"  # copied, never averaged
    PACKED = "packed"  # narrow floats: their values mean nothing without the scales beside them; copied
    COMPLEX = "complex"  # copied


@dataclass(frozen=True, slots=True)
class DType:
    """A data type: its name in a header, its size in bits, and what may be done with it."""

    name: str
    bits: int
    kind: Kind

    @property
    def is_float(self) -> bool:
        return self.kind is Kind.FLOAT

    @property
    def alignment(self) -> int:
        """Bytes that a tensor's first byte is aligned to: the element's size, 1 for types under a byte."""
        return max(1, self.bits // 8) if self.bits % 8 == 0 else 1


def _table() -> dict[str, DType]:
    rows = {
        Kind.FLOAT: {"F64": 64, "F32": 32, "F16": 16, "BF16": 16},
        Kind.COMPLEX: {"C64": 64},
        Kind.INTEGER: {
            "BOOL": 8,
            "U8": 8,
            "I8": 8,
            "U16": 16,
            "I16": 16,
            "U32": 32,
            "I32": 32,
            "U64": 64,
            "I64": 64,
        },
        Kind.PACKED: {
            "F8_E5M2": 8,
            "F8_E4M3": 8,
            "F8_E8M0": 8,
            "F8_E4M3FNUZ": 8,
            "F8_E5M2FNUZ": 8,
            "F6_E2M3": 6,
            "F6_E3M2": 6,
            "F4": 4,
        },
    }
    return {name: DType(name, bits, kind) for kind, sizes in rows.items() for name, bits in sizes.items()}


DTYPES: dict[str, DType] = _table()

# The names that configs and recipes use for the types that take part in arithmetic.
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
FROM_TORCH = {torch: name for name, torch in TORCH_NAMES.items()}


def promote(names: frozenset[str]) -> str:
    """The narrowest floating type that holds every value of all of `names` exactly: BF16 with F16 gives F32."""
    if len(names) == 1:
        return next(iter(names))
    return "F64" if "F64" in names else "F32"

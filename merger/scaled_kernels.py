"""Values of eight bits times their scales. Knows bit patterns; knows nothing of tensors, names or files.

The formats are those of "FP8 formats for deep learning" (arXiv 2209.05433), which safetensors calls F8_E4M3 (finite
values and NaN only: torch's float8_e4m3fn) and F8_E5M2, and those of "8-bit numerical formats for deep neural networks"
(arXiv 2206.02915), with FNUZ in their names; F8_E8M0 holds powers of two (OCP microscaling formats 1.0, 5.4.1).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from merger.dtypes import DTYPES
from merger.kernels import Bytes, compiled, weighted_sum

Floats = NDArray[np.float32]


def _values(exponent: int, mantissa: int, bias: int) -> NDArray[np.float64]:
    """What the 256 patterns of a sign, an exponent and a mantissa of so many bits stand for, were all finite."""
    code = np.arange(256)
    power = (code >> mantissa) & ((1 << exponent) - 1)
    rest = (code & ((1 << mantissa) - 1)) / (1 << mantissa)
    size = np.where(power > 0, np.ldexp(1.0 + rest, power - bias), np.ldexp(rest, 1 - bias))
    return np.where(code < 128, size, -size)


def _table(values: NDArray[np.float64], special: dict[int, float]) -> Floats:
    table = values.astype(np.float32)
    for code, value in special.items():
        table[code] = value
    return table


_NAN = float("nan")
_NO_ZERO = {0x80: _NAN}  # of FNUZ: what would be -0 is NaN
_E5M2 = {0x7C: np.inf, 0xFC: -np.inf} | dict.fromkeys([0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF], _NAN)

# The value of each of the 256 patterns; float32 holds all of them exactly.
TABLES: dict[str, Floats] = {
    "F8_E4M3": _table(_values(4, 3, 7), {0x7F: _NAN, 0xFF: _NAN}),
    "F8_E5M2": _table(_values(5, 2, 15), _E5M2),
    "F8_E4M3FNUZ": _table(_values(4, 3, 8), _NO_ZERO),
    "F8_E5M2FNUZ": _table(_values(5, 2, 16), _NO_ZERO),
    "F8_E8M0": _table(np.ldexp(1.0, np.minimum(np.arange(256), 254) - 127), {0xFF: _NAN}),
}


@compiled
def _scale(
    codes: Any, table: Any, scales: Any, out: Any, start: Any, width: Any, place: Any, block: Any, grid: Any
) -> None:
    """`out[i] = table[codes[i]] * scale`, block by block of each row."""
    top, left, first = place
    height, grid_height, grid_width = grid
    i = 0
    while i < codes.size:
        row = (start + i) // width + top
        column = (start + i) % width + left
        cell = ((row // height) * grid_height + (row % height) // block[0]) * grid_width + column // block[1]
        stop = min(codes.size, i + block[1] - column % block[1], i + width + left - column)
        scale = scales[cell - first]
        for k in range(i, stop):
            out[k] = table[codes[k]] * scale
        i = stop


def multiply_by_scales(
    codes: Bytes,
    dtype: str,
    scales: Floats,
    *,
    start: int,
    width: int,
    place: tuple[int, int, int],
    block: tuple[int, int],
    grid: tuple[int, int, int],
) -> Floats:
    """The float32 products of values of `dtype` and the scales of the blocks that they lie in.

    The values are elements `start` and following of rows of `width`, row-major, cut out of matrices of `grid[0]` rows
    one above the other: their first element lies in row `place[0]` and column `place[1]`. A matrix has one scale for
    each `block` of rows and columns, which make `grid[1]` rows of `grid[2]`; `scales` holds them from number
    `place[2]` on.
    """
    out = np.empty(codes.size, np.float32)
    _scale(codes, TABLES[dtype], scales, out, start, width, place, block, grid)
    return out


def as_float32(content: Bytes, dtype: str) -> Floats:
    """Stored scales: of F8_E8M0, or of a floating type."""
    if dtype in TABLES:
        return TABLES[dtype][content]
    out = np.empty(content.size * 8 // DTYPES[dtype].bits, np.float32)
    weighted_sum([(1.0, content, dtype)], out.view(np.uint8), "F32")
    return out


def count_non_finite_codes(content: Bytes, dtype: str) -> int:
    """How many values of eight bits are NaN or infinite."""
    return int(np.count_nonzero(~np.isfinite(TABLES[dtype])[content]))

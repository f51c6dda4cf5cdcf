"""The mean of tensors weighed element by element, in float64. Knows bit patterns; knows no tensors or files."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merger.kernels import CODES, ITEMSIZE, Bytes, compiled, round_sums, widen

_CHUNK = 512  # elements: the sums and what is loaded for them stay in the first-level cache

Numbers = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]  # factors, floors, weights


@compiled
def _weigh(sums: Any, totals: Any, values: Any, importance: Any, factor: Any, floor: Any, weight: Any) -> None:
    """Add weight * c * value to the sums and weight * c to the totals, c = factor * importance, at least the floor."""
    for i in range(sums.size):
        c = factor * importance[i]
        c = weight * (floor if c < floor else c)  # NaN stays NaN
        sums[i] += c * values[i]
        totals[i] += c


@compiled
def _weighed_mean(
    addresses: Any, codes: Any, sizes: Any, factors: Any, floors: Any, weights: Any, out: Any, out_code: Any, count: Any
) -> Any:
    bad = np.int64(0)
    models, out_size = factors.size, sizes[sizes.size - 1]
    buffers = np.empty((4, _CHUNK))
    scratch = np.empty(_CHUNK, np.float32)
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        sums, totals, values, importance = buffers[0, :size], buffers[1, :size], buffers[2, :size], buffers[3, :size]
        sums[:] = 0.0
        totals[:] = 0.0
        for k in range(models):
            widen(values, addresses[k] + np.uint64(start * sizes[k]), codes[k])
            m = models + k
            widen(importance, addresses[m] + np.uint64(start * sizes[m]), codes[m])
            _weigh(sums, totals, values, importance, factors[k], floors[k], weights[k])
        for i in range(size):
            sums[i] /= totals[i]
        bad += round_sums(sums, scratch[:size], out + np.uint64(start * out_size), out_code)
    return bad


def weighed_mean(
    values: Sequence[tuple[Bytes, str]],
    importances: Sequence[tuple[Bytes, str]],
    numbers: Numbers,
    out: Bytes,
    out_dtype: str,
) -> int:
    """`out = sum of w c x / sum of w c` over pairs of values x and importances, with c = max(floor, factor *
    importance), element by element; returns how many results are not finite.

    Arrays come with the names of their types and hold as many elements as `out`; the sums of w c are above zero.
    """
    factors, floors, weights = numbers
    count = out.size // ITEMSIZE[out_dtype]
    pairs = [*values, *importances]
    for content, dtype in pairs:
        if content.size != count * ITEMSIZE[dtype]:
            raise ValueError(f"{content.size} bytes of {dtype} are not {count} elements")
    return int(
        _weighed_mean(
            np.array([content.ctypes.data for content, _ in pairs], np.uint64),
            np.array([CODES[dtype] for _, dtype in pairs], np.int64),
            np.array([*(ITEMSIZE[dtype] for _, dtype in pairs), ITEMSIZE[out_dtype]], np.int64),
            factors,
            floors,
            weights,
            np.uint64(out.ctypes.data),
            CODES[out_dtype],
            count,
        )
    )

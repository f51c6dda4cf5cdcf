"""Arithmetic on what fine-tunes differ from their base by, in float32. Knows bit patterns; knows no tensors or files.

An element's rank is by its magnitude, equal ones by their index, the earlier the higher: one order, whatever the
threads. A float32's magnitude is its bits without the sign, so that ranks are compared as integers.

All numbers of a chunk stay in the first-level cache while one loop after the other goes over them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import carray
from numpy.typing import NDArray

from merger.kernels import (
    CODES,
    ITEMSIZE,
    Bytes,
    bits_of,
    compiled,
    from_bfloat16,
    from_float16,
    to_bfloat16,
    to_float16,
    to_float32,
    to_float64,
    to_uint16,
)

CHUNK, PAD = 1024, 16  # elements; rows lie so that equal places do not share the lower bits of their addresses
_SUMS = 64  # of a dot product, side by side
SIGN = np.uint32(0x7FFFFFFF)


class Inputs:
    """Arrays of one length, with the names of their types; holds them while kernels work on their addresses."""

    def __init__(self, values: Sequence[Bytes], dtypes: Sequence[str]) -> None:
        self._values = list(values)
        self.kernel = (
            np.array([array.ctypes.data for array in self._values], np.uint64),
            np.array([CODES[dtype] for dtype in dtypes], np.int64),
            np.array([ITEMSIZE[dtype] for dtype in dtypes], np.uint64),
        )


@compiled
def _load(out: Any, address: Any, code: Any) -> None:
    """The array of type `code` at `address` as float32."""
    if code == 0:
        bfloats = carray(to_uint16(address), out.size)
        for i in range(out.size):
            out[i] = from_bfloat16(bfloats[i])
    elif code == 1:
        halves = carray(to_uint16(address), out.size)
        for i in range(out.size):
            out[i] = from_float16(halves[i])
    elif code == 2:
        floats = carray(to_float32(address), out.size)
        for i in range(out.size):
            out[i] = floats[i]
    else:
        doubles = carray(to_float64(address), out.size)
        for i in range(out.size):
            out[i] = np.float32(doubles[i])


@compiled
def load_deltas(deltas: Any, base: Any, inputs: Any, start: Any) -> None:
    """The base's elements from `start` on, as many as there is room for, and what the others differ by from them, in
    the first columns of `deltas`; the base is the first input.

    Rows are cut where they are used: of a matrix that was cut the compiler does not know that its rows lie close.
    """
    addresses, codes, sizes = inputs
    first = np.uint64(start)
    _load(base, addresses[0] + first * sizes[0], codes[0])
    for k in range(deltas.shape[0]):
        delta = deltas[k, : base.size]
        _load(delta, addresses[k + 1] + first * sizes[k + 1], codes[k + 1])
        for i in range(delta.size):
            delta[i] -= base[i]


@compiled
def store(values: Any, address: Any, code: Any) -> None:
    """Float32 values as type `code` at `address`, rounded to nearest, ties to even."""
    if code == 0:
        bfloats = carray(to_uint16(address), values.size)
        for i in range(values.size):
            bfloats[i] = to_bfloat16(values[i])
    elif code == 1:
        halves = carray(to_uint16(address), values.size)
        for i in range(values.size):
            halves[i] = to_float16(values[i])
    elif code == 2:
        floats = carray(to_float32(address), values.size)
        for i in range(values.size):
            floats[i] = values[i] if values[i] == values[i] else np.float32(np.nan)
    else:
        doubles = carray(to_float64(address), values.size)
        for i in range(values.size):
            doubles[i] = np.float64(values[i]) if values[i] == values[i] else np.nan


# ---- keys that elements are ranked by -----------------------------------------------------------------


@compiled
def keys_of(keys: Any, deltas: Any, size: Any, by_variance: Any) -> None:
    """The bits of magnitudes, a row for each model; or of the variances over the models, in one row."""
    if not by_variance:
        for k in range(keys.shape[0]):
            row, delta = keys[k, :size], deltas[k, :size]
            for i in range(row.size):
                row[i] = bits_of(delta[i]) & SIGN
        return
    row, means = keys[0, :size], np.zeros(size, np.float32)
    squares, count = np.zeros(size, np.float32), np.float32(deltas.shape[0])
    for k in range(deltas.shape[0]):
        delta = deltas[k, :size]
        for i in range(size):
            means[i] += delta[i]
    for i in range(size):
        means[i] /= count
    for k in range(deltas.shape[0]):
        delta = deltas[k, :size]
        for i in range(size):
            squares[i] += (delta[i] - means[i]) * (delta[i] - means[i])
    for i in range(size):
        row[i] = bits_of(squares[i] / count)


@compiled
def _count_keys(inputs: Any, count: Any, by_variance: Any, low: Any, shift: Any, tables: Any) -> None:
    """tables[k, (key - low) >> shift] += 1 for the keys that fall into row k of the tables."""
    base = np.empty(CHUNK, np.float32)
    deltas = np.empty((inputs[0].size - 1, CHUNK + PAD), np.float32)
    keys = np.empty((tables.shape[0], CHUNK + PAD), np.uint32)
    bins = np.uint32(tables.shape[1])
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        load_deltas(deltas, base[:size], inputs, start)
        keys_of(keys, deltas, size, by_variance)
        for k in range(tables.shape[0]):
            row, table = keys[k, :size], tables[k]
            for i in range(size):
                place = np.uint32(row[i] - low[k]) >> shift
                if place < bins:
                    table[place] += 1


def count_keys(inputs: Inputs, count: int, by_variance: bool, low: NDArray[np.uint32], shift: int, tables: Any) -> None:
    """Add to `tables` [k, bins] how many keys of row k lie at `low[k]` and above, in bins of 2^shift patterns."""
    _count_keys(inputs.kernel, count, by_variance, low, np.uint32(shift), tables)


@compiled
def _collect_keys(
    inputs: Any, count: Any, first: Any, by_variance: Any, low: Any, high: Any, found: Any, places: Any, filled: Any
) -> None:
    base = np.empty(CHUNK, np.float32)
    deltas = np.empty((inputs[0].size - 1, CHUNK + PAD), np.float32)
    keys = np.empty((low.size, CHUNK + PAD), np.uint32)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        load_deltas(deltas, base[:size], inputs, start)
        keys_of(keys, deltas, size, by_variance)
        for k in range(low.size):
            row, span = keys[k, :size], np.uint32(high[k] - low[k])
            hits = np.int64(0)
            for i in range(size):
                hits += np.int64(np.uint32(row[i] - low[k]) < span)
            if hits == 0:
                continue
            for i in range(size):
                if np.uint32(row[i] - low[k]) < span:
                    if filled[k] < found.shape[1]:
                        found[k, filled[k]] = row[i]
                        places[k, filled[k]] = first + start + i
                    filled[k] += 1


def collect_keys(
    inputs: Inputs,
    count: int,
    first: int,
    by_variance: bool,
    low: NDArray[np.uint32],
    high: NDArray[np.uint32],
    found: NDArray[np.uint32],
    places: NDArray[np.int64],
    filled: NDArray[np.int64],
) -> None:
    """Append the keys of row k from `low[k]` to `high[k]` to `found[k]`, and the elements' indices, of which the first
    is `first`, to `places[k]`. `filled[k]` counts all, also those for which there is no room any more.
    """
    _collect_keys(inputs.kernel, count, first, by_variance, low, high, found, places, filled)


# ---- dot products -------------------------------------------------------------------------------------


@compiled
def _dot(a: Any, b: Any, sums: Any) -> Any:
    """The dot product of float32 arrays in float64, in `_SUMS` sums side by side: one would wait for itself with every
    element. Their number and order are fixed, so that the bits are.
    """
    sums[:] = 0.0
    whole = a.size - a.size % _SUMS
    for i in range(0, whole, _SUMS):
        for j in range(_SUMS):
            sums[j] += np.float64(a[i + j]) * np.float64(b[i + j])
    total = 0.0
    for j in range(_SUMS):
        total += sums[j]
    for i in range(whole, a.size):
        total += np.float64(a[i]) * np.float64(b[i])
    return total


@compiled
def _dots(inputs: Any, count: Any, first: Any, width: Any, has_base: Any, found: Any) -> None:
    addresses, codes, sizes = inputs
    models = addresses.size - np.int64(has_base)
    rows = np.empty((addresses.size, CHUNK + PAD), np.float32)
    sums = np.empty(_SUMS)
    start = 0
    while start < count:
        row = (first + start) // width
        size = min(CHUNK, count - start, (row + 1) * width - first - start)
        for k in range(addresses.size):
            _load(rows[k, :size], addresses[k] + np.uint64(start) * sizes[k], codes[k])
        if has_base:
            base = rows[models, :size]
            for k in range(models):
                values = rows[k, :size]
                for i in range(size):
                    values[i] -= base[i]
        for a in range(models):
            for b in range(a, models):
                total = _dot(rows[a, :size], rows[b, :size], sums)
                found[row, a, b] += total
                if a != b:
                    found[row, b, a] += total
        start += size


def dots(inputs: Inputs, count: int, first: int, width: int, has_base: bool, found: NDArray[np.float64]) -> None:
    """Add the dot products of arrays, of each row of `width` elements, to `found` [rows, n, n]; with `has_base` of what
    they differ by from the last array. `first` is the index of the first element. Values and differences are float32,
    sums float64.
    """
    _dots(inputs.kernel, count, first, width, has_base, found)


# ---- swaps --------------------------------------------------------------------------------------------


@compiled
def _swap(inputs: Any, count: Any, t: Any, out: Any, out_code: Any, out_size: Any) -> None:
    base = np.empty(CHUNK, np.float32)
    deltas = np.empty((1, CHUNK + PAD), np.float32)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        load_deltas(deltas, base[:size], inputs, start)
        delta = deltas[0, :size]
        for i in range(size):
            weight = t / max(abs(delta[i]), np.float32(1e-6))
            base[i] += min(weight, np.float32(1)) * delta[i]
        store(base[:size], out + np.uint64(start) * out_size, out_code)


def swap(inputs: Inputs, t: float, out: Bytes, out_dtype: str) -> None:
    """`out` = the first input + w * the difference of the second from it, w = t over its magnitude, at most 1."""
    size = ITEMSIZE[out_dtype]
    count = out.size // size
    _swap(inputs.kernel, count, np.float32(t), np.uint64(out.ctypes.data), CODES[out_dtype], np.uint64(size))

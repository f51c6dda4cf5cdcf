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

from merger.decomposition import dot
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
from merger.noise import philox

CHUNK, PAD = 1024, 16  # elements; rows lie so that equal places do not share the lower bits of their addresses
_SIGN = np.uint32(0x7FFFFFFF)

Arrays = Any  # what `arrays` makes, for the kernels


def arrays(values: Sequence[Bytes], dtypes: Sequence[str]) -> Arrays:
    """The addresses, types and element sizes of arrays of one length."""
    return (
        np.array([array.ctypes.data for array in values], np.uint64),
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
def _load_deltas(deltas: Any, base: Any, inputs: Any, start: Any) -> None:
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


# ---- keys that elements are ranked by -----------------------------------------------------------------


@compiled
def _keys_of(keys: Any, deltas: Any, size: Any, by_variance: Any) -> None:
    """The bits of magnitudes, a row for each model; or of the variances over the models, in one row."""
    if not by_variance:
        for k in range(keys.shape[0]):
            row, delta = keys[k, :size], deltas[k, :size]
            for i in range(row.size):
                row[i] = bits_of(delta[i]) & _SIGN
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
        _load_deltas(deltas, base[:size], inputs, start)
        _keys_of(keys, deltas, size, by_variance)
        for k in range(tables.shape[0]):
            row, table = keys[k, :size], tables[k]
            for i in range(size):
                place = np.uint32(row[i] - low[k]) >> shift
                if place < bins:
                    table[place] += 1


def count_keys(inputs: Arrays, count: int, by_variance: bool, low: NDArray[np.uint32], shift: int, tables: Any) -> None:
    """Add to `tables` [k, bins] how many keys of row k lie at `low[k]` and above, in bins of 2^shift patterns."""
    _count_keys(inputs, count, by_variance, low, np.uint32(shift), tables)


@compiled
def _collect_keys(
    inputs: Any, count: Any, first: Any, by_variance: Any, low: Any, high: Any, found: Any, places: Any, filled: Any
) -> None:
    base = np.empty(CHUNK, np.float32)
    deltas = np.empty((inputs[0].size - 1, CHUNK + PAD), np.float32)
    keys = np.empty((low.size, CHUNK + PAD), np.uint32)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        _load_deltas(deltas, base[:size], inputs, start)
        _keys_of(keys, deltas, size, by_variance)
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
    inputs: Arrays,
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
    _collect_keys(inputs, count, first, by_variance, low, high, found, places, filled)


# ---- masks --------------------------------------------------------------------------------------------

# How a mask chooses, by element: all of them, by keys, by random numbers, or from a table.
ALL, RANKED, RANDOM, LISTED = 0, 1, 2, 3


@compiled
def _keep_keys(delta: Any, low: Any, high: Any) -> None:
    """Zero what has no key from `low` to below `high`."""
    span = np.uint32(high - low)
    for i in range(delta.size):
        delta[i] = delta[i] if np.uint32((bits_of(delta[i]) & _SIGN) - low) < span else np.float32(0)


@compiled
def _keep_ranked(delta: Any, first: Any, bounds: Any) -> None:
    """Zero what does not reach the lower bound, a key and an index, or does reach the upper one."""
    low, high = np.uint32(bounds[0]), np.uint32(bounds[2])
    low_end = min(max(bounds[1] + 1 - first, 0), delta.size)  # up to here an equal key reaches the bound
    high_end = min(max(bounds[3] + 1 - first, 0), delta.size)
    middle, end = min(low_end, high_end), max(low_end, high_end)
    one, none = np.uint32(1), np.uint32(0)
    _keep_keys(delta[:middle], low, high)
    _keep_keys(
        delta[middle:end], low + (none if low_end > middle else one), high + (none if high_end > middle else one)
    )
    _keep_keys(delta[end:], low + one, high + one)


@compiled
def _draw(numbers: Any, first: Any, key: Any) -> None:
    """32 random bits for each element from `first` on."""
    block = np.uint64(first) >> np.uint64(3)
    lane = np.int64(np.uint64(first) & np.uint64(7))
    i = 0
    while i < numbers.size:
        words = philox(block, key[0], key[1])
        if lane == 0 and i + 8 <= numbers.size:
            for j in range(4):
                numbers[i + 2 * j] = np.uint32(words[j])
                numbers[i + 2 * j + 1] = np.uint32(words[j] >> np.uint64(32))
            i += 8
        else:
            while lane < 8 and i < numbers.size:
                numbers[i] = np.uint32(words[lane >> 1] >> (np.uint64(32) * np.uint64(lane & 1)))
                lane += 1
                i += 1
            lane = 0
        block += np.uint64(1)


@compiled
def _keep_random(delta: Any, first: Any, key: Any, limit: Any, numbers: Any) -> None:
    """Zero what draws a 32-bit number of `limit` or more."""
    _draw(numbers, first, key)
    for i in range(delta.size):
        delta[i] = delta[i] if numbers[i] < limit else np.float32(0)


@compiled
def _keep_listed(delta: Any, kept: Any) -> None:
    for i in range(delta.size):
        delta[i] = delta[i] if kept[i] else np.float32(0)


@compiled
def _apply(delta: Any, k: Any, start: Any, first: Any, mask: Any) -> None:
    """Zero what the mask of model k leaves out; `start` counts in this call, `first` in the tensor."""
    kinds, bounds, keys, limits, listed = mask
    if kinds[k] == 1:
        _keep_ranked(delta, first, bounds[k])
    elif kinds[k] == 2:
        _keep_random(delta, first, keys[k], limits[k], np.empty(delta.size, np.uint32))
    elif kinds[k] == 3:
        _keep_listed(delta, listed[k, start : start + delta.size])


@compiled
def _sum_abs(delta: Any) -> Any:
    """Eight sums side by side: an order that any processor can keep and the wide ones can use."""
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = 0.0
    whole = delta.size - delta.size % 8
    for i in range(0, whole, 8):
        s0 += np.float64(abs(delta[i]))
        s1 += np.float64(abs(delta[i + 1]))
        s2 += np.float64(abs(delta[i + 2]))
        s3 += np.float64(abs(delta[i + 3]))
        s4 += np.float64(abs(delta[i + 4]))
        s5 += np.float64(abs(delta[i + 5]))
        s6 += np.float64(abs(delta[i + 6]))
        s7 += np.float64(abs(delta[i + 7]))
    total = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))
    for i in range(whole, delta.size):
        total += np.float64(abs(delta[i]))
    return total


@compiled
def _sum_squares(delta: Any) -> Any:
    wide = np.empty(delta.size, np.float64)
    for i in range(delta.size):
        wide[i] = np.float64(delta[i])
    return dot(wide, wide)


@compiled
def _sum_kept(inputs: Any, count: Any, first: Any, mask: Any, squares: Any, totals: Any) -> None:
    base = np.empty(CHUNK, np.float32)
    deltas = np.empty((totals.shape[0], CHUNK + PAD), np.float32)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        _load_deltas(deltas, base[:size], inputs, start)
        for k in range(totals.shape[0]):
            delta = deltas[k, :size]
            totals[k, 0] += _sum_abs(delta)
            _apply(delta, k, start, first + start, mask)
            totals[k, 1] += _sum_squares(delta) if squares else _sum_abs(delta)


def sum_kept(
    inputs: Arrays, count: int, first: int, mask: Any, totals: NDArray[np.float64], *, squares: bool = False
) -> None:
    """Add the sums of magnitudes, of all and of those that the mask keeps (or of their squares), to `totals` [k, 2]."""
    _sum_kept(inputs, count, first, mask, squares, totals)


@compiled
def _list_by_variance(inputs: Any, count: Any, first: Any, bound: Any, kept: Any) -> None:
    base = np.empty(CHUNK, np.float32)
    deltas = np.empty((inputs[0].size - 1, CHUNK + PAD), np.float32)
    keys = np.empty((1, CHUNK + PAD), np.uint32)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        _load_deltas(deltas, base[:size], inputs, start)
        _keys_of(keys, deltas, size, True)
        for i in range(size):
            key = np.int64(keys[0, i])
            kept[start + i] = key > bound[0] or (key == bound[0] and first + start + i <= bound[1])


def list_by_variance(inputs: Arrays, count: int, first: int, bound: Sequence[int]) -> NDArray[np.bool_]:
    """The elements whose variance over the models reaches a bound, a key and an index."""
    kept = np.empty(count, np.bool_)
    _list_by_variance(inputs, count, first, np.array(bound, np.int64), kept)
    return kept


# ---- ranks within rows --------------------------------------------------------------------------------

_BUCKETS, _BUCKET = 4096, np.uint32(19)  # of keys with the same twelve upper bits


@compiled
def _rank(keys: Any, i: Any) -> Any:
    """How many of the keys are smaller than that of an element, or equal and later."""
    key = keys[i]
    smaller = np.uint32(0)
    for j in range(i + 1):
        smaller += np.uint32(keys[j] < key)
    for j in range(i + 1, keys.size):
        smaller += np.uint32(keys[j] <= key)
    return smaller


@compiled
def _keep_by_rank(kept: Any, keys: Any, numbers: Any, below: Any, least: Any, step: Any) -> None:
    """kept[i] = numbers[i] < least + step * rank of i, in units of 2^-32.

    That most numbers are smaller than the least probability of the key's bucket, or no smaller than the largest, spares
    the ranks. `below` are the keys in lower buckets, for each bucket and one more.
    """
    for i in range(keys.size):
        bucket = keys[i] >> _BUCKET
        number = np.float64(numbers[i])
        surely = number < least + step * below[bucket]
        maybe = number < least + step * (below[bucket + np.uint32(1)] - 1)
        kept[i] = surely
        if surely != maybe:
            kept[i] = number < least + step * _rank(keys, i)


@compiled
def _count_below(below: Any, keys: Any) -> None:
    """below[b] = how many keys lie in lower buckets than b, for the buckets in use and the one after them."""
    smallest, largest = keys[0], keys[0]
    for i in range(keys.size):
        smallest, largest = min(smallest, keys[i]), max(largest, keys[i])
    first, last = np.int64(smallest >> _BUCKET), np.int64(largest >> _BUCKET)
    below[first : last + 2] = 0
    for i in range(keys.size):
        below[(keys[i] >> _BUCKET) + np.uint32(1)] += 1
    for bucket in range(first, last + 1):
        below[bucket + 1] += below[bucket]


@compiled
def _list_by_rank(inputs: Any, rows: Any, width: Any, first: Any, random_keys: Any, spans: Any, kept: Any) -> None:
    base = np.empty(width, np.float32)
    deltas = np.empty((kept.shape[0], width + PAD), np.float32)
    keys, numbers = np.empty(width, np.uint32), np.empty(width, np.uint32)
    below = np.empty(_BUCKETS + 1, np.int32)
    for row in range(rows):
        _load_deltas(deltas, base, inputs, row * width)
        for k in range(kept.shape[0]):
            delta = deltas[k, :width]
            for i in range(width):
                keys[i] = bits_of(delta[i]) & _SIGN
            _count_below(below, keys)
            _draw(numbers, first + row * width, random_keys[k])
            span = (spans[k, 1] - spans[k, 0]) * 4294967296.0
            least = spans[k, 0] * 4294967296.0 + (0.0 if width > 1 else span / 2)
            step = span / (width - 1) if width > 1 else 0.0
            _keep_by_rank(kept[k, row * width : (row + 1) * width], keys, numbers, below, least, step)


def list_by_rank(
    inputs: Arrays, rows: int, width: int, first: int, keys: NDArray[np.uint64], spans: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """A mask [k, rows * width]: an element is kept with a probability that grows with its rank in its row, from
    `spans[k, 0]` for the smallest magnitude to `spans[k, 1]` for the largest. `first` is the first element's index.
    """
    kept = np.empty((len(keys), rows * width), np.bool_)
    _list_by_rank(inputs, rows, width, first, keys, spans, kept)
    return kept


# ---- the result ---------------------------------------------------------------------------------------


@compiled
def _add(base: Any, deltas: Any, scale: Any, normalize: Any, weights: Any) -> None:
    """base += scale * sum of deltas, over the sum of the weights where that is asked for."""
    total = np.float32(0)
    for k in range(deltas.shape[0]):
        total += weights[k]
    factor = scale / total if normalize and abs(total) >= np.float32(1e-8) else scale
    sums = deltas[0, : base.size]
    for k in range(1, deltas.shape[0]):
        delta = deltas[k, : base.size]
        for i in range(base.size):
            sums[i] += delta[i]
    for i in range(base.size):
        base[i] += factor * sums[i]


@compiled
def _add_agreeing(base: Any, deltas: Any, factors: Any, scale: Any, normalize: Any, weights: Any, scratch: Any) -> None:
    """base += scale * sum of factor * those deltas that have the sign of the sum of all, over their weights' sum."""
    size = base.size
    signs, sums, divisors = scratch[0, :size], scratch[1, :size], scratch[2, :size]
    signs[:] = np.float32(0)
    for k in range(deltas.shape[0]):
        delta = deltas[k, :size]
        for i in range(size):
            signs[i] += delta[i]
    for i in range(size):
        signs[i] = np.float32(1) if signs[i] >= np.float32(0) else np.float32(-1)
    sums[:] = np.float32(0)
    divisors[:] = np.float32(0)
    for k in range(deltas.shape[0]):
        delta, factor, weight = deltas[k, :size], factors[k], weights[k]
        for i in range(size):
            agrees = delta[i] * signs[i] > np.float32(0)
            sums[i] += factor * delta[i] if agrees else np.float32(0)
            divisors[i] += weight if agrees else np.float32(0)
    if normalize:
        for i in range(size):
            sums[i] /= divisors[i] if divisors[i] != np.float32(0) else np.float32(1)
    for i in range(size):
        base[i] += scale * sums[i]


@compiled
def _store(values: Any, address: Any, code: Any) -> None:
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


@compiled
def _mix(
    inputs: Any,
    count: Any,
    first: Any,
    mask: Any,
    factors: Any,
    weights: Any,
    scale: Any,
    elect: Any,
    late: Any,
    normalize: Any,
    out: Any,
    out_code: Any,
    out_size: Any,
) -> None:
    models = inputs[0].size - 1
    base = np.empty(CHUNK, np.float32)
    scratch = np.empty((3, CHUNK + PAD), np.float32)
    ones = np.ones(models, np.float32)
    deltas = np.empty((models, CHUNK + PAD), np.float32)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        _load_deltas(deltas, base[:size], inputs, start)
        for k in range(models):
            delta = deltas[k, :size]
            _apply(delta, k, start, first + start, mask)
            factor = np.float32(1) if late else factors[k]
            for i in range(size):
                delta[i] *= factor
        if elect:
            _add_agreeing(base[:size], deltas, factors if late else ones, scale, normalize, weights, scratch)
        else:
            _add(base[:size], deltas, scale, normalize, weights)
        _store(base[:size], out + np.uint64(start) * out_size, out_code)


def mix(
    inputs: Arrays,
    first: int,
    mask: Any,
    factors: NDArray[np.float32],
    weights: NDArray[np.float32],
    scale: float,
    elect: bool,
    late: bool,
    normalize: bool,
    out: Bytes,
    out_dtype: str,
) -> None:
    """`out` = base + scale * the sum of factor * masked delta; with `elect` of those that agree with its sign (`late`:
    with the sign of the sum without factors); with `normalize` over the sum of the weights that took part. `first` is
    the index of the first element in the tensor.
    """
    size = ITEMSIZE[out_dtype]
    _mix(
        inputs,
        out.size // size,
        first,
        mask,
        factors,
        weights,
        np.float32(scale),
        elect,
        late,
        normalize,
        np.uint64(out.ctypes.data),
        CODES[out_dtype],
        np.uint64(size),
    )


# ---- dot products -------------------------------------------------------------------------------------


@compiled
def _widened(out: Any, address: Any, code: Any) -> None:
    """The array of type `code` at `address` as float64."""
    if code == 3:
        doubles = carray(to_float64(address), out.size)
        for i in range(out.size):
            out[i] = doubles[i]
        return
    floats = np.empty(out.size, np.float32)
    _load(floats, address, code)
    for i in range(out.size):
        out[i] = np.float64(floats[i])


@compiled
def _dots(inputs: Any, count: Any, first: Any, width: Any, has_base: Any, found: Any) -> None:
    addresses, codes, sizes = inputs
    models = addresses.size - np.int64(has_base)
    rows = np.empty((addresses.size, CHUNK + PAD))
    start = 0
    while start < count:
        row = (first + start) // width
        size = min(CHUNK, count - start, (row + 1) * width - first - start)
        for k in range(addresses.size):
            _widened(rows[k, :size], addresses[k] + np.uint64(start) * sizes[k], codes[k])
        if has_base:
            base = rows[models, :size]
            for k in range(models):
                values = rows[k, :size]
                for i in range(size):
                    values[i] -= base[i]
        for a in range(models):
            for b in range(a, models):
                total = dot(rows[a, :size], rows[b, :size])
                found[row, a, b] += total
                if a != b:
                    found[row, b, a] += total
        start += size


def dots(inputs: Arrays, count: int, first: int, width: int, has_base: bool, found: NDArray[np.float64]) -> None:
    """Add the dot products of arrays, of each row of `width` elements, to `found` [rows, n, n]; with `has_base` of what
    they differ by from the last array. `first` is the index of the first element. In float64.
    """
    _dots(inputs, count, first, width, has_base, found)


# ---- swaps --------------------------------------------------------------------------------------------


@compiled
def _swap(inputs: Any, count: Any, t: Any, out: Any, out_code: Any, out_size: Any) -> None:
    base = np.empty(CHUNK, np.float32)
    deltas = np.empty((1, CHUNK + PAD), np.float32)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        _load_deltas(deltas, base[:size], inputs, start)
        delta = deltas[0, :size]
        for i in range(size):
            weight = t / max(abs(delta[i]), np.float32(1e-6))
            base[i] += min(weight, np.float32(1)) * delta[i]
        _store(base[:size], out + np.uint64(start) * out_size, out_code)


def swap(inputs: Arrays, t: float, out: Bytes, out_dtype: str) -> None:
    """`out` = the first input + w * the difference of the second from it, w = t over its magnitude, at most 1."""
    size = ITEMSIZE[out_dtype]
    count = out.size // size
    _swap(inputs, count, np.float32(t), np.uint64(out.ctypes.data), CODES[out_dtype], np.uint64(size))

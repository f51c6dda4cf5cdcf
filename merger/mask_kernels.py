"""Which elements of task vectors stay, and their sum with the base: kernels. Knows bit patterns; knows no tensors.

A mask of each model keeps elements by their rank in the tensor, by chance, or from a table. In float32, as
`merger.delta_kernels`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merger.decomposition import dot
from merger.delta_kernels import CHUNK, PAD, SIGN, Inputs, keys_of, load_deltas, store
from merger.kernels import CODES, ITEMSIZE, Bytes, bits_of, compiled
from merger.noise import philox

# ---- masks --------------------------------------------------------------------------------------------

# How a mask chooses, by element: all of them, by keys, by random numbers, or from a table.
ALL, RANKED, RANDOM, LISTED = 0, 1, 2, 3


@compiled
def _keep_keys(delta: Any, low: Any, high: Any) -> None:
    """Zero what has no key from `low` to below `high`."""
    span = np.uint32(high - low)
    for i in range(delta.size):
        delta[i] = delta[i] if np.uint32((bits_of(delta[i]) & SIGN) - low) < span else np.float32(0)


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
def draw(numbers: Any, first: Any, key: Any) -> None:
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
    draw(numbers, first, key)
    for i in range(delta.size):
        delta[i] = delta[i] if numbers[i] < limit else np.float32(0)


@compiled
def _keep_listed(delta: Any, kept: Any) -> None:
    """Zero what is not kept, and multiply the rest by what the list says of it."""
    for i in range(delta.size):
        delta[i] = delta[i] * np.float32(kept[i]) if kept[i] else np.float32(0)


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
        load_deltas(deltas, base[:size], inputs, start)
        for k in range(totals.shape[0]):
            delta = deltas[k, :size]
            totals[k, 0] += _sum_abs(delta)
            _apply(delta, k, start, first + start, mask)
            totals[k, 1] += _sum_squares(delta) if squares else _sum_abs(delta)


def sum_kept(
    inputs: Inputs, count: int, first: int, mask: Any, totals: NDArray[np.float64], *, squares: bool = False
) -> None:
    """Add the sums of magnitudes, of all and of those that the mask keeps (or of their squares), to `totals` [k, 2]."""
    _sum_kept(inputs.kernel, count, first, mask, squares, totals)


@compiled
def _list_by_variance(inputs: Any, count: Any, first: Any, bound: Any, kept: Any) -> None:
    base = np.empty(CHUNK, np.float32)
    deltas = np.empty((inputs[0].size - 1, CHUNK + PAD), np.float32)
    keys = np.empty((1, CHUNK + PAD), np.uint32)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        load_deltas(deltas, base[:size], inputs, start)
        keys_of(keys, deltas, size, True)
        for i in range(size):
            key = np.int64(keys[0, i])
            kept[start + i] = key > bound[0] or (key == bound[0] and first + start + i <= bound[1])


def list_by_variance(inputs: Inputs, count: int, first: int, bound: Sequence[int]) -> NDArray[np.bool_]:
    """The elements whose variance over the models reaches a bound, a key and an index."""
    kept = np.empty(count, np.bool_)
    _list_by_variance(inputs.kernel, count, first, np.array(bound, np.int64), kept)
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
        load_deltas(deltas, base[:size], inputs, start)
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
        store(base[:size], out + np.uint64(start) * out_size, out_code)


def mix(
    inputs: Inputs,
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
        inputs.kernel,
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

"""Masks that keep elements by chance, the larger ones of a row rather: tables of them. Knows bit patterns; knows no
tensors.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from merger.delta_kernels import PAD, SIGN, Inputs, load_deltas
from merger.kernels import bits_of, compiled
from merger.mask_kernels import draw

_BUCKETS, _BUCKET = 16384, np.uint32(17)  # of keys with the same fourteen upper bits


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


# ---- every rank ---------------------------------------------------------------------------------------

_DIGIT = 11  # bits that one pass of a radix sort looks at; three are enough for a key


@compiled
def _sort_all(ranks: Any, keys: Any, order: Any, other: Any, counts: Any) -> None:
    """ranks[i] = how many of the keys are smaller than that of i, or equal and later."""
    for i in range(keys.size):
        order[i] = np.uint32(keys.size - 1 - i)
    for digit in range(3):
        shift = np.uint32(digit * _DIGIT)
        counts[:] = 0
        for i in range(keys.size):
            counts[((keys[i] >> shift) & np.uint32((1 << _DIGIT) - 1)) + 1] += 1
        for i in range(counts.size - 1):
            counts[i + 1] += counts[i]
        for j in range(keys.size):
            i = order[j]
            place = (keys[i] >> shift) & np.uint32((1 << _DIGIT) - 1)
            other[counts[place]] = i
            counts[place] += 1
        order[:] = other
    for j in range(keys.size):
        ranks[order[j]] = j


@compiled
def _divide_by_rank(kept: Any, numbers: Any, ranks: Any, least: Any, step: Any) -> None:
    """kept[i] = one over the probability least + step * rank, in units of 2^-32, where the number is below that."""
    for i in range(numbers.size):
        probability = least + step * ranks[i]
        kept[i] = np.float32(4294967296.0 / probability if np.float64(numbers[i]) < probability else 0.0)


# ---- the table ----------------------------------------------------------------------------------------


@compiled
def _list_by_rank(
    inputs: Any, rows: Any, width: Any, first: Any, random_keys: Any, spans: Any, kept: Any, shares: Any
) -> None:
    base = np.empty(width, np.float32)
    deltas = np.empty((spans.shape[0], width + PAD), np.float32)
    keys, numbers = np.empty(width, np.uint32), np.empty(width, np.uint32)
    below, counts = np.empty(_BUCKETS + 1, np.int32), np.empty((1 << _DIGIT) + 1, np.int64)
    ranks, order, other = np.empty(width, np.int64), np.empty(width, np.uint32), np.empty(width, np.uint32)
    for row in range(rows):
        load_deltas(deltas, base, inputs, row * width)
        for k in range(spans.shape[0]):
            delta = deltas[k, :width]
            for i in range(width):
                keys[i] = bits_of(delta[i]) & SIGN
            draw(numbers, first + row * width, random_keys[k])
            span = (spans[k, 1] - spans[k, 0]) * 4294967296.0
            least = spans[k, 0] * 4294967296.0 + (0.0 if width > 1 else span / 2)
            step = span / (width - 1) if width > 1 else 0.0
            if shares.size:
                _sort_all(ranks, keys, order, other, counts)
                _divide_by_rank(shares[k, row * width : (row + 1) * width], numbers, ranks, least, step)
            else:
                _count_below(below, keys)
                _keep_by_rank(kept[k, row * width : (row + 1) * width], keys, numbers, below, least, step)


def list_by_rank(
    inputs: Inputs,
    rows: int,
    width: int,
    first: int,
    keys: NDArray[np.uint64],
    spans: NDArray[np.float64],
    *,
    divided: bool,
) -> NDArray[np.bool_] | NDArray[np.float32]:
    """A mask [k, rows * width]: an element is kept with a probability that grows with its rank in its row, from
    `spans[k, 0]` for the smallest magnitude to `spans[k, 1]` for the largest. `divided`: one over this probability for
    those that are kept, 0 for others. `first` is the first element's index.
    """
    kept = np.empty((0 if divided else len(keys), rows * width), np.bool_)
    shares = np.empty((len(keys) if divided else 0, rows * width), np.float32)
    _list_by_rank(inputs.kernel, rows, width, first, keys, spans, kept, shares)
    return shares if divided else kept

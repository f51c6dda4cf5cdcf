"""Which element has a rank among all of a tensor: exact, in constant memory. Knows keys; knows no methods.

A histogram finds the bin of 2^14 neighbouring keys that the element lies in, a second pass looks at those in the bin.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from merger.delta_kernels import Inputs, collect_keys, count_keys
from merger.expression import Evaluate

BLOCK = 1 << 18  # elements that are looked at at once
_SHIFT, _BINS = 14, 1 << 17  # 2^31 keys; a zero's is left out
_ROOM = 1 << 18  # keys of one bin that are kept; where there are more, they are counted once more
ROOM = 12 * (_BINS + _ROOM)  # bytes for each row of keys: two tables, or keys and their indices


class Bound(NamedTuple):
    """A key and an index: what has a larger key reaches it, and what has that key up to that index."""

    key: int
    last: int


EVERYTHING, NOTHING = Bound(0, 1 << 62), Bound(1 << 31, -1)

Counts = Callable[[int], Sequence[int]]  # how many are to reach each bound, given how many keys are not zero


class Tensors(NamedTuple):
    """The base and its fine-tunes as they are looked at: how to get elements, their types, and how many they are."""

    evaluate: Evaluate
    dtypes: Sequence[str]
    size: int


def bounds_of(tensors: Tensors, wanted: Sequence[Counts], by_variance: bool = False) -> list[list[Bound]]:
    """For each row of keys, the bounds that so many elements reach. Rows are the magnitudes of the differences from the
    base, or one of variances over the models.
    """
    tables = _histogram(tensors, len(wanted), by_variance, np.ones(len(wanted), np.uint32), _SHIFT, _BINS)
    counts = [[int(count) for count in row(int(table.sum()))] for row, table in zip(wanted, tables, strict=True)]
    found = [[NOTHING if count <= 0 else EVERYTHING for count in row] for row in counts]
    left = [
        (row, i, *_bin(tables[row], count))
        for row, some in enumerate(counts)
        for i, count in enumerate(some)
        if 0 < count < tables[row].sum()
    ]
    for number in range(max((i for _, i, *_ in left), default=-1) + 1):
        for row, i, bound in _refined(tensors, [part for part in left if part[1] == number], by_variance, len(wanted)):
            found[row][i] = bound
    return found


def _bin(table: NDArray[np.int64], count: int) -> tuple[int, int]:
    """The bin that the element of a rank (from 1, the largest first) lies in, and its rank there."""
    reached = np.cumsum(table[::-1])
    place = int(np.searchsorted(reached, count))
    return len(table) - 1 - place, count - (int(reached[place - 1]) if place else 0)


def _histogram(
    tensors: Tensors, rows: int, by_variance: bool, low: NDArray[np.uint32], shift: int, bins: int
) -> NDArray[np.int64]:
    total, part = np.zeros((rows, bins), np.int64), np.zeros((rows, bins), np.uint32)
    for start in range(0, tensors.size, BLOCK):
        if start % (BLOCK << 12) == 0:  # before a count can pass 2^32
            total += part
            part[:] = 0
        stop = min(start + BLOCK, tensors.size)
        inputs = Inputs(tensors.evaluate(start, stop), tensors.dtypes)
        count_keys(inputs, stop - start, by_variance, low, shift, part)
    return total + part


Part = tuple[int, int, int, int]  # row, number of the bound, bin, rank in the bin


def _refined(tensors: Tensors, parts: Sequence[Part], by_variance: bool, rows: int) -> list[tuple[int, int, Bound]]:
    """The bounds that lie in given bins, at most one of each row."""
    low, high = np.full(rows, 1 << 31, np.uint32), np.full(rows, 1 << 31, np.uint32)
    for row, _, place, _ in parts:
        low[row], high[row] = 1 + (place << _SHIFT), 1 + ((place + 1) << _SHIFT)
    keys, places, filled = _collected(tensors, by_variance, low, high)
    found = []
    for row, i, _, rank in parts:
        if filled[row] <= _ROOM:
            bound = _ranked(keys[row, : filled[row]], places[row, : filled[row]], rank)
        else:
            bound = _counted(tensors, row, rows, by_variance, low, rank)
        found.append((row, i, bound))
    return found


def _collected(
    tensors: Tensors, by_variance: bool, low: NDArray[np.uint32], high: NDArray[np.uint32]
) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]:
    """The keys in the bins with their indices, in the order of these."""
    room = min(_ROOM, tensors.size)
    keys, places = np.empty((len(low), room), np.uint32), np.empty((len(low), room), np.int64)
    filled = np.zeros(len(low), np.int64)
    for start in range(0, tensors.size, BLOCK):
        stop = min(start + BLOCK, tensors.size)
        inputs = Inputs(tensors.evaluate(start, stop), tensors.dtypes)
        collect_keys(inputs, stop - start, start, by_variance, low, high, keys, places, filled)
    return keys, places, filled


def _ranked(keys: NDArray[np.uint32], places: NDArray[np.int64], rank: int) -> Bound:
    """The key of a rank (from 1, the largest first), and the index up to which equal ones reach it."""
    key = np.partition(keys, len(keys) - rank)[len(keys) - rank]
    above = int((keys > key).sum())
    return Bound(int(key), int(places[keys == key][rank - above - 1]))


def _counted(tensors: Tensors, row: int, rows: int, by_variance: bool, low: NDArray[np.uint32], rank: int) -> Bound:
    """The same where a bin holds more than there is room for: by one more histogram, and a look for the index."""
    table = _histogram(tensors, rows, by_variance, low, 0, 1 << _SHIFT)[row]
    place, rank = _bin(table, rank)
    key = int(low[row]) + place
    low, high = np.full(rows, 1 << 31, np.uint32), np.full(rows, 1 << 31, np.uint32)
    low[row], high[row] = key, key + 1
    keys, places = np.empty((rows, BLOCK), np.uint32), np.empty((rows, BLOCK), np.int64)
    for start in range(0, tensors.size, BLOCK):
        stop, filled = min(start + BLOCK, tensors.size), np.zeros(rows, np.int64)
        inputs = Inputs(tensors.evaluate(start, stop), tensors.dtypes)
        collect_keys(inputs, stop - start, start, by_variance, low, high, keys, places, filled)
        if filled[row] >= rank:
            return Bound(key, int(places[row, rank - 1]))
        rank -= int(filled[row])
    raise AssertionError("a histogram counted what is not there")

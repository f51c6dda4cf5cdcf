"""Parts of tensors: rows, columns, rows for columns. Knows how they lie in files; knows nothing of models."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NoReturn, final

import numpy as np

from merger.drawn import Noise
from merger.dtypes import DTYPES
from merger.errors import UnsupportedModel
from merger.expression import MARGIN, ByteRange, Expression, Fetch, Filled, Joined, Stored, WeightedSum, join
from merger.given import Given
from merger.kernels import Bytes
from merger.scaled import Scaled
from merger.whole import Part


@final
@dataclass(frozen=True, slots=True)
class Columns(Expression):
    """Columns `first` to `first + shape[1]` of a stored matrix. Whole rows between them are read."""

    dtype: str
    shape: tuple[int, ...]
    of: Stored
    first: int

    def leaves(self) -> Iterator[Stored]:
        yield self.of

    def _span(self, start: int, stop: int) -> ByteRange:
        """From the first row of the elements to the last one."""
        (width, pitch) = self.shape[1], self.of.shape[1]
        top, bottom = start // width, (stop - 1) // width
        return self.of.range(top * pitch + self.first, bottom * pitch + self.first + width)

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        if start < stop:
            yield self._span(start, stop)

    def memory(self, elements: int) -> int:
        pitch = self.of.shape[1]
        return (elements * (1 + -(-pitch // self.shape[1])) + 2 * pitch) * self.itemsize + MARGIN

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        width, pitch = self.shape[1] * self.itemsize, self.of.shape[1] * self.itemsize
        top, bottom = start // self.shape[1], (stop - 1) // self.shape[1]
        data = fetch(self._span(start, stop))
        rows = np.lib.stride_tricks.as_strided(data, (bottom - top + 1, width), (pitch, 1))
        skipped = (start - top * self.shape[1]) * self.itemsize
        return np.ascontiguousarray(rows).reshape(-1)[skipped : skipped + (stop - start) * self.itemsize]


@final
@dataclass(frozen=True, slots=True)
class Transposed(Expression):
    """Stored matrices one above the other, with rows for columns. Pieces of all rows are read, in whole pages."""

    dtype: str
    shape: tuple[int, ...]
    of: tuple[Stored, ...]

    def leaves(self) -> Iterator[Stored]:
        return iter(self.of)

    def _columns(self, start: int, stop: int) -> tuple[int, int]:
        """The columns of the stored matrices that hold the elements."""
        return start // self.shape[1], (stop - 1) // self.shape[1] + 1

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        first, last = self._columns(start, stop)
        pitch = self.shape[0]
        for matrix in self.of:
            for row in range(matrix.shape[0] if start < stop else 0):
                yield matrix.range(row * pitch + first, row * pitch + last)

    def memory(self, elements: int) -> int:
        return (3 * elements + 6 * self.shape[1]) * self.itemsize + self.shape[1] * MARGIN

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        pieces = [fetch(part).reshape(-1, self.itemsize) for part in self.reads(start, stop)]
        turned = np.stack(pieces, axis=1).reshape(-1)
        skipped = (start - self._columns(start, stop)[0] * self.shape[1]) * self.itemsize
        return turned[skipped : skipped + (stop - start) * self.itemsize]


def rows(whole: Expression, first: int, last: int) -> Expression:
    """Rows `first` to `last` (along the first axis) of a tensor. Raises UnsupportedModel for elements of less than a
    byte.
    """
    shape = (last - first, *whole.shape[1:])
    if shape == whole.shape:
        return whole
    row = math.prod(whole.shape[1:])
    made: Expression
    _check_bytes(whole)
    match whole:
        case Stored():
            made = replace(whole, shape=shape, offset=whole.offset + first * row * whole.itemsize)
        case Columns():
            of = rows(whole.of, first, last)
            made = replace(whole, shape=shape, of=of) if isinstance(of, Stored) else of
        case Filled():
            made = replace(whole, shape=shape)
        case Scaled():
            top = whole.top + first * row // shape[-1]
            made = replace(whole, shape=shape, of=rows(whole.of, first, last), top=top)
        case Noise():
            made = replace(whole, shape=shape, first=whole.first + first * row)
        case Given():
            made = whole.rows(first, last)
        case WeightedSum():
            terms = tuple((weight, rows(term, first, last)) for weight, term in whole.terms)
            made = replace(whole, shape=shape, terms=terms)
        case Joined() if all(part.shape[1:] == whole.shape[1:] for part in whole.parts):
            made = _rows_of_joined(whole, first, last, shape)
        case _:
            made = Part(whole.dtype, shape, whole, first * row)
    return made


def _rows_of_joined(whole: Joined, first: int, last: int, shape: tuple[int, ...]) -> Expression:
    parts, begin = [], 0
    for part in whole.parts:
        end = begin + part.shape[0]
        if begin < last and first < end:
            parts.append(rows(part, max(first, begin) - begin, min(last, end) - begin))
        begin = end
    return parts[0] if len(parts) == 1 else join(parts, shape)


def stretch(whole: Expression, first: int, shape: tuple[int, ...]) -> Expression:
    """The elements of a tensor from `first` on that fill a shape: one of those that it is joined of, or a `Part`."""
    if isinstance(whole, Joined):
        begin = 0
        for part in whole.parts:
            if begin == first and part.shape == shape:
                return part
            begin += part.size
    return Part(whole.dtype, shape, whole, first)


def columns(whole: Expression, first: int, last: int) -> Expression:
    """Columns `first` to `last` of a matrix. Raises UnsupportedModel where it cannot be divided."""
    shape = (whole.shape[0], last - first)
    if shape == whole.shape:
        return whole
    made: Expression
    _check_bytes(whole)
    match whole:
        case Stored():
            made = Columns(whole.dtype, shape, whole, first)
        case Columns():
            made = replace(whole, shape=shape, first=whole.first + first)
        case Scaled():
            made = replace(whole, shape=shape, of=columns(whole.of, first, last), left=whole.left + first)
        case Filled():
            made = replace(whole, shape=shape)
        case WeightedSum():
            terms = tuple((weight, columns(term, first, last)) for weight, term in whole.terms)
            made = replace(whole, shape=shape, terms=terms)
        case Joined() if all(part.shape[1:] == whole.shape[1:] for part in whole.parts):
            made = join([columns(part, first, last) for part in whole.parts], shape)
        case _:
            _refuse(whole)
    return made


def transposed(whole: Expression) -> Expression:
    """A matrix with rows for columns. Raises UnsupportedModel where it cannot be turned."""
    shape = whole.shape[::-1]
    made: Expression
    _check_bytes(whole)
    match whole:
        case Stored():
            made = Transposed(whole.dtype, shape, (whole,))
        case Filled():
            made = replace(whole, shape=shape)
        case WeightedSum():
            made = replace(whole, shape=shape, terms=tuple((weight, transposed(term)) for weight, term in whole.terms))
        case Joined():
            stored = tuple(part for part in whole.parts if isinstance(part, Stored))
            made = (
                Transposed(whole.dtype, shape, stored)
                if len(stored) == len(whole.parts)
                else transposed(_sum_of_joined(whole))
            )
        case _:
            _refuse(whole)
    return made


def _sum_of_joined(whole: Joined) -> WeightedSum:
    """Joined sums with the same weights as a sum of joined terms."""
    sums = [part for part in whole.parts if isinstance(part, WeightedSum)]
    weights = {tuple(weight for weight, _ in part.terms) for part in sums}
    if len(sums) < len(whole.parts) or len(weights) != 1:
        _refuse(whole)
    terms = zip(*([term for _, term in part.terms] for part in sums), strict=True)
    joined = tuple(join(parts, whole.shape) for parts in terms)
    return WeightedSum(whole.dtype, whole.shape, tuple(zip(weights.pop(), joined, strict=True)))


def _check_bytes(whole: Expression) -> None:
    """Elements of less than a byte have no place of their own."""
    if DTYPES[whole.dtype].bits < 8:
        _refuse(whole)


def _refuse(whole: Expression) -> NoReturn:
    raise UnsupportedModel(
        f"a tensor that is computed in this way ({type(whole).__name__}) cannot be divided or turned on the fly",
        where="source",
        remedy="Run the inner recipe into a folder of its own first.",
    )

"""How an output tensor is made from stored ones.

Knows dtypes, shapes and arithmetic; knows nothing of names, files' contents or threads.

An expression is evaluated for any range of its elements, in row-major order, from bytes that somebody else has read:
first `reads` says which bytes a range needs, then `write` makes the range from them. Elements of types narrower
than a byte are counted in bytes.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple, final

import numpy as np

from merger.dtypes import DTYPES
from merger.kernels import Bytes, count_non_finite, weighted_sum
from merger.remote import Remote


@dataclass(frozen=True, eq=False, slots=True)
class File:
    """A file of stored tensors as it was when it was planned; compared by identity."""

    path: Path | Remote
    size: int
    mtime_ns: int
    header_sha256: str


PAGE = 4096  # bytes: what is read widens to whole pages at both ends
MARGIN = 2 * PAGE


class ByteRange(NamedTuple):
    """Bytes `start` to `stop` of a file, which hold values of a dtype."""

    file: File
    start: int
    stop: int
    dtype: str


Fetch = Callable[[ByteRange], Bytes]


class Expression(ABC):
    """How to make one tensor: its dtype (a name of the format), its shape, and the values of any range of elements."""

    __slots__ = ()
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many elements; those narrower than a byte are counted in bytes."""
        return self.nbytes // self.itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].bits // 8

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].alignment

    @property
    def read_size(self) -> int:
        """Bytes that are read to make the whole."""
        return sum(part.stop - part.start for part in self.reads(0, self.size))

    @abstractmethod
    def leaves(self) -> Iterator["Stored"]:
        """The stored tensors that it is made from, in the order in which they count."""

    @abstractmethod
    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        """The bytes that elements `start` to `stop` are made from."""

    @abstractmethod
    def memory(self, elements: int) -> int:
        """The most bytes that making `elements` elements takes beside the output, as a + b * elements: what is read,
        in whole pages, and copies of it.
        """

    def measures(self) -> Iterator["Measure"]:
        """What must be known about whole tensors before any element can be made."""
        return iter(())

    def measured(self, found: Mapping["Measure", Sequence[float]]) -> "Expression":
        """The same with the numbers that its measures came to."""
        return self

    @abstractmethod
    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        """Elements `start` to `stop` in `dtype`: fresh memory, or a view of what was fetched."""

    def write(self, start: int, stop: int, fetch: Fetch, out: Bytes) -> int:
        """Fill `out` with elements `start` to `stop`; returns how many of them are NaN or infinite."""
        out[:] = self.values(start, stop, fetch)
        return count_non_finite(out, self.dtype) if DTYPES[self.dtype].is_float else 0


Evaluate = Callable[[int, int], list[Bytes]]


class Measure(ABC):
    """Numbers about whole expressions, which a first pass over them finds."""

    __slots__ = ()
    inputs: tuple[Expression, ...]

    @property
    @abstractmethod
    def memory(self) -> int:
        """The most bytes that finding them takes: what is read, and what is kept meanwhile."""

    def reading(self, elements: int) -> int:
        """The bytes that so many elements of every input take."""
        return sum(tensor.memory(min(elements, tensor.size)) for tensor in self.inputs)

    @abstractmethod
    def compute(self, evaluate: Evaluate) -> Sequence[float]:
        """The numbers; `evaluate` gives the elements from one to another of every input, in that one's dtype. What it
        gave before is overwritten.
        """


# ---- what is stored -----------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class Stored(Expression):
    """A tensor as it stands in a file, its first byte at `offset`."""

    dtype: str
    shape: tuple[int, ...]
    file: File
    offset: int

    def leaves(self) -> Iterator["Stored"]:
        yield self

    def range(self, start: int, stop: int) -> ByteRange:
        size = self.itemsize
        return ByteRange(self.file, self.offset + start * size, self.offset + stop * size, self.dtype)

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        yield self.range(start, stop)

    def memory(self, elements: int) -> int:
        return elements * self.itemsize + MARGIN

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        return fetch(self.range(start, stop))


# ---- what is made -------------------------------------------------------------------------------------


class Made(Expression):
    """Values that nothing is read for."""

    __slots__ = ()

    def leaves(self) -> Iterator[Stored]:
        return iter(())

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        return iter(())

    def memory(self, elements: int) -> int:
        return 0


@final
@dataclass(frozen=True, slots=True)
class Filled(Made):
    """One number everywhere."""

    dtype: str
    shape: tuple[int, ...]
    value: float = 0.0

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        out = np.zeros((stop - start) * self.itemsize, np.uint8)
        if self.value:
            numbers = np.full(stop - start, self.value)
            weighted_sum([(1.0, numbers.view(np.uint8), "F64")], out, self.dtype)
        return out


@final
@dataclass(frozen=True, slots=True)
class WeightedSum(Expression):
    """The sum of weight * expression over floating expressions of one shape, rounded once to `dtype`."""

    dtype: str
    shape: tuple[int, ...]
    terms: tuple[tuple[float, Expression], ...]

    def leaves(self) -> Iterator[Stored]:
        return chain.from_iterable(term.leaves() for _, term in self.terms)

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        return chain.from_iterable(term.reads(start, stop) for _, term in self.terms)

    def memory(self, elements: int) -> int:
        return sum(term.memory(elements) for _, term in self.terms)

    def measures(self) -> Iterator[Measure]:
        return chain.from_iterable(term.measures() for _, term in self.terms)

    def measured(self, found: Mapping[Measure, Sequence[float]]) -> Expression:
        return replace(self, terms=tuple((weight, term.measured(found)) for weight, term in self.terms))

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        out = np.empty((stop - start) * self.itemsize, np.uint8)
        self.write(start, stop, fetch, out)
        return out

    def write(self, start: int, stop: int, fetch: Fetch, out: Bytes) -> int:
        values = [(weight, term.values(start, stop, fetch), term.dtype) for weight, term in self.terms]
        return weighted_sum(values, out, self.dtype)


@final
@dataclass(frozen=True, slots=True)
class Identical(Expression):
    """Tensors that must hold the same bytes, as integer buffers do: the first, once `merger.plan` has compared them."""

    dtype: str
    shape: tuple[int, ...]
    first: Stored
    others: tuple[Stored, ...]

    def leaves(self) -> Iterator[Stored]:
        return self.first.leaves()

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        return self.first.reads(start, stop)

    def memory(self, elements: int) -> int:
        return self.first.memory(elements)

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        return self.first.values(start, stop, fetch)


@final
@dataclass(frozen=True, slots=True)
class Joined(Expression):
    """Expressions of one dtype, one after the other in memory: tensors stacked along their first axis."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Expression, ...]
    ends: tuple[int, ...]  # elements up to the end of each part

    def leaves(self) -> Iterator[Stored]:
        return chain.from_iterable(part.leaves() for part in self.parts)

    def _within(self, start: int, stop: int) -> Iterator[tuple[Expression, int, int]]:
        """The parts of which elements `start` to `stop` are made, each with its own elements."""
        for i in range(bisect_right(self.ends, start), len(self.parts)):
            begin = self.ends[i] - self.parts[i].size
            if begin >= stop:
                return
            yield self.parts[i], max(start, begin) - begin, min(stop, self.ends[i]) - begin

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        return chain.from_iterable(part.reads(a, b) for part, a, b in self._within(start, stop))

    def memory(self, elements: int) -> int:
        fixed = sum(part.memory(0) for part in self.parts)
        return fixed + elements * (self.itemsize + max(part.memory(1) - part.memory(0) for part in self.parts))

    def measures(self) -> Iterator[Measure]:
        return chain.from_iterable(part.measures() for part in self.parts)

    def measured(self, found: Mapping[Measure, Sequence[float]]) -> Expression:
        return replace(self, parts=tuple(part.measured(found) for part in self.parts))

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        parts = [part.values(a, b, fetch) for part, a, b in self._within(start, stop)]
        return np.concatenate(parts) if parts else np.empty(0, np.uint8)

    def write(self, start: int, stop: int, fetch: Fetch, out: Bytes) -> int:
        bad = position = 0
        for part, a, b in self._within(start, stop):
            size = (b - a) * self.itemsize
            bad += part.write(a, b, fetch, out[position : position + size])
            position += size
        return bad


def join(parts: Sequence[Expression], shape: tuple[int, ...]) -> Expression:
    """Expressions of one dtype one after the other in memory, as a tensor of this shape."""
    if len({part.dtype for part in parts}) != 1:
        raise ValueError(f"parts of several dtypes: {sorted({part.dtype for part in parts})}")
    if sum(math.prod(part.shape) for part in parts) != math.prod(shape):
        raise ValueError(f"parts of {[part.shape for part in parts]} do not make {shape}")
    return Joined(parts[0].dtype, shape, tuple(parts), tuple(accumulate(part.size for part in parts)))


# ---- sums ---------------------------------------------------------------------------------------------


def combine(terms: Sequence[tuple[float, Expression]], dtype: str) -> Expression:
    """The sum of weight * expression over floating expressions of one shape, as `dtype`.

    Sums of sums become one sum, so that nested averages are accumulated and rounded once; a tensor that
    comes twice is read once; zero weights are left out. One tensor of weight 1 in its own dtype is itself.
    """
    joined = _combine_joined(terms, dtype)
    if joined:
        return joined
    weights: dict[Expression, float] = {}
    for weight, term in _flatten(terms):
        weights[term] = weights.get(term, 0.0) + weight
    kept = tuple((weight, term) for term, weight in weights.items() if weight != 0.0)
    if not kept:
        raise ValueError("every weight is zero")
    if len(kept) == 1 and kept[0][0] == 1.0 and kept[0][1].dtype == dtype:
        return kept[0][1]
    return WeightedSum(dtype, kept[0][1].shape, kept)


def _combine_joined(terms: Sequence[tuple[float, Expression]], dtype: str) -> Expression | None:
    """The sum part by part, where all terms are joined of parts of the same shapes."""
    wholes = [(weight, term) for weight, term in terms if isinstance(term, Joined)]
    if len(wholes) < len(terms) or len({tuple(part.shape for part in whole.parts) for _, whole in wholes}) != 1:
        return None
    columns_of = zip(*(whole.parts for _, whole in wholes), strict=True)
    weights = [weight for weight, _ in wholes]
    return join([combine(list(zip(weights, parts, strict=True)), dtype) for parts in columns_of], wholes[0][1].shape)


def _flatten(terms: Iterable[tuple[float, Expression]]) -> Iterator[tuple[float, Expression]]:
    for weight, expression in terms:
        match expression:
            case WeightedSum():
                yield from ((weight * inner, term) for inner, term in expression.terms)
            case Identical():
                raise TypeError(f"cannot take part in a sum: {expression}")
            case _:
                yield weight, expression


def cast(expression: Expression, dtype: str) -> Expression:
    """A floating expression in another floating dtype, rounded to nearest, ties to even, from the exact sum."""
    return expression if expression.dtype == dtype else combine([(1.0, expression)], dtype)


def scaled(expression: Expression, factor: float) -> Expression:
    """A floating expression times a factor, rounded once."""
    return expression if factor == 1.0 else combine([(factor, expression)], expression.dtype)

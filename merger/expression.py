"""How an output tensor is made from stored ones.

Knows dtypes, shapes and arithmetic; knows nothing of names, files' contents or threads.

An expression is evaluated for any range of its elements, from bytes that somebody else has read: first
`reads` says which bytes a range needs, then `write` makes the range from them. Elements of types narrower
than a byte are counted in bytes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

from merger.dtypes import DTYPES
from merger.kernels import Bytes, count_non_finite, weighted_sum


@dataclass(frozen=True, eq=False, slots=True)
class File:
    """A file of stored tensors as it was when it was planned; compared by identity."""

    path: Path
    size: int
    mtime_ns: int
    header_sha256: str


class ByteRange(NamedTuple):
    """Bytes `start` to `stop` of a file."""

    file: File
    start: int
    stop: int


Fetch = Callable[[ByteRange], Bytes]


class Expression(ABC):
    """How to make one tensor: its dtype (a name of the format), its shape, and the values of any range of elements."""

    __slots__ = ()
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].bits // 8

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].alignment

    @abstractmethod
    def leaves(self) -> Iterator["Stored"]:
        """The stored tensors that are read, in the order in which they count."""

    @abstractmethod
    def write(self, start: int, stop: int, fetch: Fetch, out: Bytes) -> int:
        """Fill `out` with elements `start` to `stop`; returns how many of them are NaN or infinite."""

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        """The bytes that elements `start` to `stop` are made from."""
        return (leaf.range(start, stop) for leaf in self.leaves())


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
        return ByteRange(self.file, self.offset + start * self.itemsize, self.offset + stop * self.itemsize)

    def write(self, start: int, stop: int, fetch: Fetch, out: Bytes) -> int:
        out[:] = fetch(self.range(start, stop))
        return count_non_finite(out, self.dtype) if DTYPES[self.dtype].is_float else 0


@final
@dataclass(frozen=True, slots=True)
class WeightedSum(Expression):
    """The sum of weight * stored tensor over floating tensors of one shape, rounded once to `dtype`."""

    dtype: str
    shape: tuple[int, ...]
    terms: tuple[tuple[float, Stored], ...]

    def leaves(self) -> Iterator[Stored]:
        return (stored for _, stored in self.terms)

    def write(self, start: int, stop: int, fetch: Fetch, out: Bytes) -> int:
        values = [(weight, fetch(stored.range(start, stop)), stored.dtype) for weight, stored in self.terms]
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

    def write(self, start: int, stop: int, fetch: Fetch, out: Bytes) -> int:
        return self.first.write(start, stop, fetch, out)


def combine(terms: Sequence[tuple[float, Expression]], dtype: str) -> Expression:
    """The sum of weight * expression over floating expressions of one shape, as `dtype`.

    Sums of sums become one sum, so that nested averages are accumulated and rounded once; a tensor that
    comes twice is read once; zero weights are left out. One tensor of weight 1 in its own dtype is itself.
    """
    weights: dict[Stored, float] = {}
    for weight, stored in _flatten(terms):
        weights[stored] = weights.get(stored, 0.0) + weight
    kept = tuple((weight, stored) for stored, weight in weights.items() if weight != 0.0)
    if not kept:
        raise ValueError("every weight is zero")
    if len(kept) == 1 and kept[0][0] == 1.0 and kept[0][1].dtype == dtype:
        return kept[0][1]
    return WeightedSum(dtype, kept[0][1].shape, kept)


def _flatten(terms: Iterable[tuple[float, Expression]]) -> Iterator[tuple[float, Stored]]:
    for weight, expression in terms:
        match expression:
            case Stored():
                yield weight, expression
            case WeightedSum():
                yield from ((weight * inner, stored) for inner, stored in expression.terms)
            case _:
                raise TypeError(f"cannot take part in a sum: {expression}")


def cast(expression: Expression, dtype: str) -> Expression:
    """A floating expression in another floating dtype, rounded to nearest, ties to even, from the exact sum."""
    return expression if expression.dtype == dtype else combine([(1.0, expression)], dtype)

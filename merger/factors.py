"""Products of thin matrices, and their best approximation of a lower rank. Knows matrices; knows nothing of adapters.

A product is never formed whole: any range of its elements is made from some rows of the left factor and all of the
right one, in float64, as a term of sums.
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import final

import numpy as np

from merger.decomposition import Matrix, absorb, multiply, svd, triangular
from merger.errors import UnsupportedModel
from merger.expression import (
    ByteRange,
    Evaluate,
    Expression,
    Fetch,
    Filled,
    Made,
    Measure,
    Stored,
    cast,
    combine,
    join,
)
from merger.kernels import Bytes


@final
@dataclass(frozen=True, slots=True)
class Numbers(Made):
    """A small matrix of float64 that is known already."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        return np.frombuffer(self.content, np.uint8)[8 * start : 8 * stop]


def numbers(matrix: Matrix) -> Numbers:
    return Numbers("F64", matrix.shape, matrix.tobytes())


@final
@dataclass(frozen=True, slots=True)
class Product(Expression):
    """left [m, r] times right [r, n]; `turned`: with rows for columns, [n, m]. All in float64.

    All of the factor that gives the columns is read and held for every range: 8 r n bytes and what it is made from.
    """

    dtype: str
    shape: tuple[int, ...]
    left: Expression
    right: Expression
    turned: bool = False

    def leaves(self) -> Iterator[Stored]:
        return chain(self.left.leaves(), self.right.leaves())

    @property
    def _whole(self) -> Expression:
        return self.left if self.turned else self.right

    def _ranges(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The elements of the other factor that the rows of elements `start` to `stop` are made from."""
        top, bottom = start // self.shape[1], (stop - 1) // self.shape[1] + 1
        rank, width = self.right.shape
        if self.turned:
            return [(k * width + top, k * width + bottom) for k in range(rank)]
        return [(top * rank, bottom * rank)]

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        if start >= stop:
            return
        other = self.right if self.turned else self.left
        for a, b in self._ranges(start, stop):
            yield from other.reads(a, b)
        yield from self._whole.reads(0, self._whole.size)

    def memory(self, elements: int) -> int:
        other, whole = (self.right, self.left) if self.turned else (self.left, self.right)
        rank, pieces = self.right.shape[0], self.right.shape[0] if self.turned else 1
        fixed, each = other.memory(0), other.memory(1) - other.memory(0) + 2 * 8
        rows = elements * -(-rank // self.shape[1]) + 2 * rank
        return whole.memory(whole.size) + 2 * 8 * whole.size + pieces * fixed + each * rows + 8 * elements

    def measures(self) -> Iterator[Measure]:
        return chain(self.left.measures(), self.right.measures())

    def measured(self, found: Mapping[Measure, Sequence[float]]) -> Expression:
        return replace(self, left=self.left.measured(found), right=self.right.measured(found))

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        whole = self._whole.values(0, self._whole.size, fetch).view(np.float64).reshape(self._whole.shape)
        other = self.right if self.turned else self.left
        parts = [other.values(a, b, fetch).view(np.float64) for a, b in self._ranges(start, stop)]
        first = start % self.shape[1]
        if self.turned:
            return multiply(np.stack(parts, axis=1), whole.T, first, stop - start).view(np.uint8)
        return multiply(parts[0].reshape(-1, whole.shape[0]), whole, first, stop - start).view(np.uint8)


def product(left: Expression, right: Expression, *, turned: bool = False) -> Expression:
    """The product of two matrices, in float64; `turned`: with rows for columns."""
    shape = (left.shape[0], right.shape[1])
    return Product("F64", shape[::-1] if turned else shape, cast(left, "F64"), cast(right, "F64"), turned)


# ---- factors of sums ----------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class Beside(Expression):
    """Matrices of one dtype and one height side by side."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Expression, ...]

    def leaves(self) -> Iterator[Stored]:
        return chain.from_iterable(part.leaves() for part in self.parts)

    def _rows(self, start: int, stop: int) -> tuple[int, int]:
        return start // self.shape[1], -(-stop // self.shape[1])

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        top, bottom = self._rows(start, stop)
        for part in self.parts if start < stop else ():
            yield from part.reads(top * part.shape[1], bottom * part.shape[1])

    def memory(self, elements: int) -> int:
        each = max(part.memory(1) - part.memory(0) for part in self.parts) + 3 * self.itemsize
        return sum(part.memory(0) for part in self.parts) + each * (elements + 2 * self.shape[1])

    def measures(self) -> Iterator[Measure]:
        return chain.from_iterable(part.measures() for part in self.parts)

    def measured(self, found: Mapping[Measure, Sequence[float]]) -> Expression:
        return replace(self, parts=tuple(part.measured(found) for part in self.parts))

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        top, bottom = self._rows(start, stop)
        size = self.itemsize
        rows = [
            part.values(top * part.shape[1], bottom * part.shape[1], fetch).reshape(bottom - top, -1)
            for part in self.parts
        ]
        skipped = (start - top * self.shape[1]) * size
        whole: Bytes = np.concatenate(rows, axis=1).reshape(-1)
        return whole[skipped : skipped + (stop - start) * size]


Terms = Sequence[tuple[float, Expression, Expression]]  # weight, left [m, r], right [r, n]


def stacked(terms: Terms, rank: int | None = None) -> tuple[Expression, Expression]:
    """One left and one right factor, in float64, whose product is the sum of weight * left * right; zeros fill them up
    to `rank`. The weights go to the left ones.
    """
    height, width = terms[0][1].shape[0], terms[0][2].shape[1]
    lefts = [combine([(weight, left)], "F64") for weight, left, _ in terms]
    rights = [cast(right, "F64") for *_, right in terms]
    found = sum(right.shape[0] for right in rights)
    if rank is not None and rank > found:
        lefts.append(Filled("F64", (height, rank - found)))
        rights.append(Filled("F64", (rank - found, width)))
        found = rank
    if len(lefts) == 1:
        return lefts[0], rights[0]
    return Beside("F64", (height, found), tuple(lefts)), join(rights, (found, width))


# ---- a lower rank -------------------------------------------------------------------------------------

_ROWS = 2048  # of a factor at a time


@final
@dataclass(frozen=True, slots=True, eq=False)
class Truncation(Measure):
    """How to come from the factors of left * right to those of its best approximation of a rank (Eckart and Young
    1936): matrices T and S for which left T times S right is it. Compared by identity.

    With left = P L and right^T = Q R, L R^T = U s V^T: T = R^T V s^-1/2 and S = s^-1/2 U^T L, of the largest values.
    Only L and R are formed, from blocks of rows: 8 r (r + 2048) bytes and four matrices of r^2.
    """

    inputs: tuple[Expression]  # left and right, one after the other
    left: tuple[int, int]
    right: tuple[int, int]
    rank: int

    @property
    def memory(self) -> int:
        inner = self.left[1]
        return self.reading(_ROWS * inner) + 8 * inner * (5 * inner + 2 * _ROWS)

    def compute(self, evaluate: Evaluate) -> Sequence[float]:
        """S and T^T, row after row, then the squared norms of the approximation and of the whole."""
        (height, inner), (_, width) = self.left, self.right
        left, right, begin = triangular(inner), triangular(inner), height * inner
        for start, stop in pairwise([*range(0, height, _ROWS), height]):
            [values] = evaluate(start * inner, stop * inner)
            left = absorb(left, values.view(np.float64).reshape(-1, inner).T)
        for start, stop in pairwise([*range(0, width, _ROWS), width]):
            rows = np.empty((inner, stop - start))
            for k in range(inner):
                [values] = evaluate(begin + k * width + start, begin + k * width + stop)
                rows[k] = values.view(np.float64)
            right = absorb(right, rows)
        return array("d", self._found(left, right).tobytes())

    def _found(self, left: Matrix, right: Matrix) -> Matrix:
        inner = len(left)
        up, values, down = svd(multiply(left, right.T).reshape(inner, inner))
        kept = values[: self.rank]
        scale = np.where(kept > 0, 1.0 / np.sqrt(np.where(kept > 0, kept, 1.0)), 0.0)[:, None]
        above = scale * multiply(up[: self.rank], left).reshape(-1, inner)
        below = scale * multiply(down[: self.rank], right).reshape(-1, inner)
        sign = np.array([-1.0 if row[np.abs(row).argmax()] < 0 else 1.0 for row in above])[:, None]
        squares = list(accumulate(float(value) ** 2 for value in values))
        norms = np.array([squares[len(kept) - 1], squares[-1]])
        return np.concatenate([(sign * above).reshape(-1), (sign * below).reshape(-1), norms])


@final
@dataclass(frozen=True, slots=True)
class Truncated(Expression):
    """A factor of the approximation: the left one or the right one, once it is measured. In float64."""

    dtype: str
    shape: tuple[int, ...]
    factor: Expression
    truncation: Truncation
    is_left: bool

    def leaves(self) -> Iterator[Stored]:
        return self.factor.leaves()

    def _with(self, content: bytes) -> Product:
        """The factor with a matrix beside it: T behind the left one, S before the right one."""
        matrix = Numbers("F64", (self.truncation.rank, self.truncation.left[1]), content)
        if not self.is_left:
            return Product("F64", self.shape, matrix, self.factor)
        turned = np.frombuffer(content).reshape(matrix.shape).T
        return Product("F64", self.shape, self.factor, numbers(np.ascontiguousarray(turned)))

    @property
    def _unknown(self) -> bytes:
        return bytes(8 * self.truncation.rank * self.truncation.left[1])

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        return self._with(self._unknown).reads(start, stop)

    def memory(self, elements: int) -> int:
        return self._with(self._unknown).memory(elements)

    def measures(self) -> Iterator[Measure]:
        yield self.truncation

    def measured(self, found: Mapping[Measure, Sequence[float]]) -> Expression:
        size = self.truncation.rank * self.truncation.left[1]
        known = np.array(found[self.truncation])
        return self._with((known[size : 2 * size] if self.is_left else known[:size]).tobytes())

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        raise ValueError("was not measured")


def truncated(left: Expression, right: Expression, rank: int) -> tuple[Expression, Expression]:
    """The factors, in float64, of the best approximation of left * right of a rank below that of the factors.

    Raises UnsupportedModel where those are approximations themselves.
    """
    if any(True for _ in chain(left.measures(), right.measures())):
        raise UnsupportedModel(
            "what is measured already cannot be measured again on the fly",
            where="rank",
            remedy="Run the inner recipe into a folder of its own first.",
        )
    left, right = cast(left, "F64"), cast(right, "F64")
    (height, inner), (_, width) = left.shape, right.shape
    both = join([left, right], (inner * (height + width),))
    truncation = Truncation((both,), (height, inner), (inner, width), rank)
    return (
        Truncated("F64", (height, rank), left, truncation, True),
        Truncated("F64", (rank, width), right, truncation, False),
    )

"""Sums whose weights follow from the angles between tensors: interpolations on spheres. Knows tensors as vectors; knows
no recipes.

All that such a rule looks at are the dot products of the tensors, or of what they differ by from a base: one pass finds
them, and the weights of a plain sum follow.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import final

import numpy as np
from numpy.typing import NDArray

from merger.delta_kernels import Inputs, dots
from merger.expression import ByteRange, Evaluate, Expression, Fetch, Measure, Stored, WeightedSum, combine
from merger.kernels import Bytes, weighted_sum
from merger.thresholds import BLOCK

Gram = NDArray[np.float64]  # [n, n]: the dot products


class Curve(ABC):
    """How tensors are blended, given their dot products. Values only, so that it travels."""

    @abstractmethod
    def weights(self, gram: Gram) -> tuple[float, ...]:
        """The weights of the tensors, or of their differences from the base."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class DotProducts(Measure):
    """The dot products of tensors, or of what they differ by from a base, which comes last; by rows of matrices where
    that is asked for. In float64, in one order. Compared by identity.
    """

    inputs: tuple[Expression, ...]
    has_base: bool
    by_row: bool = False

    @property
    def memory(self) -> int:
        rows = math.prod(self.inputs[0].shape[:-1]) if self.by_row else 1
        return self.reading(BLOCK) + 40 * rows * len(self.inputs) ** 2  # a matrix, and its numbers as a list

    def compute(self, evaluate: Evaluate) -> Sequence[float]:
        """Gram matrices [rows, n, n], element after element; one row where the tensors are taken whole."""
        size, count = self.inputs[0].size, len(self.inputs) - self.has_base
        width = self.inputs[0].shape[-1] if self.by_row and self.inputs[0].shape else max(size, 1)
        found = np.zeros((-(-size // width), count, count))
        dtypes = [tensor.dtype for tensor in self.inputs]
        step = min(BLOCK, width) if width >= BLOCK or not self.by_row else BLOCK // width * width
        for start in range(0, size, step):
            stop = min(start + step, size)
            dots(Inputs(evaluate(start, stop), dtypes), stop - start, start, width, self.has_base, found)
        result: list[float] = found.reshape(-1).tolist()
        return result


@final
@dataclass(frozen=True, slots=True)
class Blend(Expression):
    """A sum of tensors, or of a base and what they differ by from it, along a curve. Once it is measured it is a plain
    weighted sum, or one by rows.
    """

    dtype: str
    shape: tuple[int, ...]
    tensors: tuple[Expression, ...]
    base: Expression | None
    curve: Curve
    products: DotProducts

    @property
    def _sum(self) -> WeightedSum:
        """A sum of the same tensors."""
        terms = (*self.tensors, *([self.base] if self.base else []))
        return WeightedSum(self.dtype, self.shape, tuple((1.0, term) for term in terms))

    def leaves(self) -> Iterator[Stored]:
        return self._sum.leaves()

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        return self._sum.reads(start, stop)

    def memory(self, elements: int) -> int:
        rows = -(-elements // self.shape[-1]) + 1 if self.products.by_row and self.shape else 0
        return self._sum.memory(elements) + 8 * len(self.tensors) * rows

    def measures(self) -> Iterator[Measure]:
        inner = list(self._sum.measures())
        yield from inner or [self.products]

    def measured(self, found: Mapping[Measure, Sequence[float]]) -> Expression:
        if self.products not in found:
            return self._with_inner(found)
        count = len(self.tensors)
        grams = np.array(found[self.products]).reshape(-1, count, count)
        weights = np.array([self.curve.weights(gram) for gram in grams])
        if self.products.by_row:
            return RowSum(self.dtype, self.shape, self.tensors, self.base, weights)
        terms = [(float(weight), tensor) for weight, tensor in zip(weights[0], self.tensors, strict=True)]
        if self.base:
            terms.append((1.0 - float(weights[0].sum()), self.base))
        if not any(weight for weight, _ in terms):
            return WeightedSum(self.dtype, self.shape, ((0.0, self.tensors[0]),))
        return combine(terms, self.dtype)

    def _with_inner(self, found: Mapping[Measure, Sequence[float]]) -> Expression:
        if not any(True for _ in self._sum.measures()):
            return self
        tensors = tuple(tensor.measured(found) for tensor in self.tensors)
        base = self.base.measured(found) if self.base else None
        products = replace(self.products, inputs=(*tensors, *([base] if base else [])))
        return replace(self, tensors=tensors, base=base, products=products)

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        raise ValueError("was not measured")


@final
@dataclass(frozen=True, slots=True, eq=False)
class RowSum(Expression):
    """A base and differences from it, or tensors, each row with weights of its own. Rows are made one after the other,
    each as a plain weighted sum.
    """

    dtype: str
    shape: tuple[int, ...]
    tensors: tuple[Expression, ...]
    base: Expression | None
    weights: NDArray[np.float64]  # [rows, n]

    @property
    def _terms(self) -> tuple[Expression, ...]:
        return (*self.tensors, *([self.base] if self.base else []))

    def leaves(self) -> Iterator[Stored]:
        return chain.from_iterable(term.leaves() for term in self._terms)

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        return chain.from_iterable(term.reads(start, stop) for term in self._terms)

    def memory(self, elements: int) -> int:
        return sum(term.memory(elements) for term in self._terms)

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        out = np.empty((stop - start) * self.itemsize, np.uint8)
        self.write(start, stop, fetch, out)
        return out

    def write(self, start: int, stop: int, fetch: Fetch, out: Bytes) -> int:
        values = [term.values(start, stop, fetch) for term in self._terms]
        width, bad = self.shape[-1], 0
        position = start
        while position < stop:
            row = position // width
            end = min((row + 1) * width, stop)
            weights = [*self.weights[row], *([1.0 - float(self.weights[row].sum())] if self.base else [])]
            parts = [
                (float(weight), value[(position - start) * term.itemsize : (end - start) * term.itemsize], term.dtype)
                for weight, value, term in zip(weights, values, self._terms, strict=True)
            ]
            bad += weighted_sum(
                parts, out[(position - start) * self.itemsize : (end - start) * self.itemsize], self.dtype
            )
            position = end
        return bad


def blended(
    tensors: Sequence[Expression], base: Expression | None, curve: Curve, dtype: str, *, by_row: bool = False
) -> Expression:
    """Tensors along a curve, or a base and what they differ by from it; each row of the last axis for itself where
    that is asked for.
    """
    products = DotProducts((*tensors, *([base] if base else [])), base is not None, by_row)
    return Blend(dtype, tensors[0].shape, tuple(tensors), base, curve, products)

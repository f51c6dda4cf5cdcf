"""Means of tensors that are weighed element by element, by importances that are stored beside them. Knows tensors;
knows nothing of where importances come from.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple, final

import numpy as np

from merger.expression import ByteRange, Expression, Fetch, Measure, Stored
from merger.kernels import Bytes
from merger.weighing_kernels import weighed_mean


class Weight(NamedTuple):
    """How much an element of a tensor counts: weight * max(floor, factor * importance)."""

    weight: float
    factor: float
    floor: float


@final
@dataclass(frozen=True, slots=True)
class Weighed(Expression):
    """The sum of weight * importance * tensor over that of weight * importance, in float64, rounded once to `dtype`."""

    dtype: str
    shape: tuple[int, ...]
    tensors: tuple[Expression, ...]
    importances: tuple[Expression, ...]
    weights: tuple[Weight, ...]

    @property
    def _inputs(self) -> tuple[Expression, ...]:
        return (*self.tensors, *self.importances)

    def leaves(self) -> Iterator[Stored]:
        return chain.from_iterable(tensor.leaves() for tensor in self._inputs)

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        return chain.from_iterable(tensor.reads(start, stop) for tensor in self._inputs)

    def memory(self, elements: int) -> int:
        return sum(tensor.memory(elements) for tensor in self._inputs)

    def measures(self) -> Iterator[Measure]:
        return chain.from_iterable(tensor.measures() for tensor in self._inputs)

    def measured(self, found: Mapping[Measure, Sequence[float]]) -> Expression:
        return replace(self, tensors=tuple(tensor.measured(found) for tensor in self.tensors))

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        out = np.empty((stop - start) * self.itemsize, np.uint8)
        self.write(start, stop, fetch, out)
        return out

    def write(self, start: int, stop: int, fetch: Fetch, out: Bytes) -> int:
        values, importances = (
            [(tensor.values(start, stop, fetch), tensor.dtype) for tensor in side]
            for side in (self.tensors, self.importances)
        )
        weights, factors, floors = (np.array(column, np.float64) for column in zip(*self.weights, strict=True))
        return weighed_mean(values, importances, (factors, floors, weights), out, self.dtype)

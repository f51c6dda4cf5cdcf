"""Values that are drawn at random. Knows distributions; knows nothing of models.

Numbers follow from a key and an element's index (`merger.noise`), so they are the same whoever draws them, in any
order.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from merger.expression import ByteRange, Evaluate, Expression, Fetch, Made, Measure, Stored
from merger.kernels import Bytes, add_moments, weighted_sum
from merger.noise import Key, normal, uniform

_BLOCK = 1 << 18  # elements

Mask = NDArray[np.bool_]


@final
@dataclass(frozen=True, slots=True)
class Noise(Made):
    """Standard normal numbers of a key, or numbers uniform between -1 and 1, from the number `first` on, in float64: a
    term of sums.
    """

    dtype: str
    shape: tuple[int, ...]
    key: Key
    first: int = 0
    kind: Literal["normal", "uniform"] = "normal"

    def memory(self, elements: int) -> int:
        return 8 * elements

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        draw = normal if self.kind == "normal" else uniform
        return draw(self.key, self.first + start, stop - start)


def noise(shape: tuple[int, ...], key: Key, kind: Literal["normal", "uniform"] = "normal") -> Noise:
    """Standard normal numbers of a shape, or numbers uniform between -1 and 1."""
    return Noise("F64", shape, key, kind=kind)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Moments(Measure):
    """Mean and standard deviation (of the population) of the rows (axis 0) or columns (axis 1) of a matrix that a mask
    chooses, in float64; compared by identity.
    """

    inputs: tuple[Expression]
    chosen: Mask
    axis: int

    @property
    def memory(self) -> int:
        return self.reading(_BLOCK) + 24 * _BLOCK  # indices and the mask of the elements

    def compute(self, evaluate: Evaluate) -> Sequence[float]:
        [matrix] = self.inputs
        width = matrix.shape[1]
        count = int(self.chosen.sum()) * matrix.shape[1 - self.axis]
        if not count:
            return 0.0, 0.0
        totals = np.zeros(2)
        for start in range(0, matrix.size, _BLOCK):
            stop = min(start + _BLOCK, matrix.size)
            [values] = evaluate(start, stop)
            add_moments(values, matrix.dtype, _mask(self.chosen, self.axis, width, start, stop), totals)
        mean = float(totals[0]) / count
        variance = float(totals[1]) / count - mean * mean
        return mean, max(0.0, variance) ** 0.5


def _mask(chosen: Mask, axis: int, width: int, start: int, stop: int) -> Mask:
    """The mask of elements `start` to `stop` of a matrix, of which rows or columns are chosen."""
    index = np.arange(start, stop)
    return chosen[index // width if axis == 0 else index % width]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Redrawn(Expression):
    """A matrix of which some rows or columns are drawn anew, from a normal distribution with the mean and the standard
    deviation of what stood there (Drop-Upcycling, arXiv 2502.19261, section 3); compared by identity.
    """

    dtype: str
    shape: tuple[int, ...]
    kept: Expression
    moments: Moments
    noise: Noise
    found: Sequence[float] | None = None  # mean and standard deviation, once they are measured

    def leaves(self) -> Iterator[Stored]:
        return self.kept.leaves()

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        return self.kept.reads(start, stop)

    def memory(self, elements: int) -> int:
        return self.kept.memory(elements) + elements * (3 * 8 + 1 + 2 * self.itemsize)

    def measures(self) -> Iterator[Measure]:
        inner = list(self.kept.measures())
        yield from inner
        if self.found is None and not inner:
            yield self.moments

    def measured(self, found: Mapping[Measure, Sequence[float]]) -> Expression:
        kept = self.kept.measured(found)
        if kept is not self.kept:
            moments = replace(self.moments, inputs=(kept,))
            return replace(self, kept=kept, moments=moments, found=found.get(self.moments, self.found))
        return replace(self, found=found.get(self.moments, self.found))

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        if self.found is None:
            raise ValueError("was not measured")
        mean, deviation = self.found
        numbers = self.noise.values(start, stop, fetch)
        centre = np.full(stop - start, mean).view(np.uint8)
        drawn = np.empty((stop - start) * self.itemsize, np.uint8)
        weighted_sum([(deviation, numbers, "F64"), (1.0, centre, "F64")], drawn, self.dtype)
        mask = _mask(self.moments.chosen, self.moments.axis, self.shape[1], start, stop)
        kept = self.kept.values(start, stop, fetch)
        element: Any = f"V{self.itemsize}"
        result: Bytes = np.where(mask, drawn.view(element), kept.view(element)).view(np.uint8)
        return result


def redrawn(kept: Expression, chosen: Mask, axis: int, key: Key) -> Expression:
    """The matrix with the chosen rows (axis 0) or columns (axis 1) drawn anew; itself where none is chosen."""
    if not chosen.any():
        return kept
    return Redrawn(kept.dtype, kept.shape, kept, Moments((kept,), chosen, axis), noise(kept.shape, key))

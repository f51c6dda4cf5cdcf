"""Interpolation that goes the further the closer two values are (NearSwap). Knows elements; knows no recipes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import final

import numpy as np

from merger.delta_kernels import Inputs, swap
from merger.expression import ByteRange, Expression, Fetch, Measure, Stored
from merger.kernels import Bytes, count_non_finite


@final
@dataclass(frozen=True, slots=True)
class Swapped(Expression):
    """base + w (other - base) with w = t / |other - base|, at most 1 (nearswap.py of mergekit 0.1.5). In float32."""

    dtype: str
    shape: tuple[int, ...]
    base: Expression
    other: Expression
    t: float

    def leaves(self) -> Iterator[Stored]:
        return chain(self.base.leaves(), self.other.leaves())

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        return chain(self.base.reads(start, stop), self.other.reads(start, stop))

    def memory(self, elements: int) -> int:
        return self.base.memory(elements) + self.other.memory(elements)

    def measures(self) -> Iterator[Measure]:
        return chain(self.base.measures(), self.other.measures())

    def measured(self, found: Mapping[Measure, Sequence[float]]) -> Expression:
        return replace(self, base=self.base.measured(found), other=self.other.measured(found))

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        out = np.empty((stop - start) * self.itemsize, np.uint8)
        self.write(start, stop, fetch, out)
        return out

    def write(self, start: int, stop: int, fetch: Fetch, out: Bytes) -> int:
        pair = (self.base, self.other)
        inputs = Inputs([tensor.values(start, stop, fetch) for tensor in pair], [tensor.dtype for tensor in pair])
        swap(inputs, self.t, out, self.dtype)
        return count_non_finite(out, self.dtype)


def swapped(base: Expression, other: Expression, t: float, dtype: str) -> Expression:
    """Two tensors of one shape, the closer the more the other: where they differ by `t` or less, it is the other."""
    return Swapped(dtype, base.shape, base, other, t)

"""Sums of task vectors behind masks that tell where a task counts (TALL masks, arXiv 2405.07813). Elementwise.

Knows the formula; knows nothing of models or files.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from merger.expression import ByteRange, Expression, Fetch, Measure, Stored
from merger.kernels import Bytes, weighted_sum

Numbers = NDArray[np.float64]


@final
@dataclass(frozen=True, slots=True)
class MaskedSum(Expression):
    """base + scale * mask * T with T the sum of the tasks (float64, sums of fine-tunes less the base), rounded once.

    Task t counts at an element where |t| >= spread * |T - t|. The mask is 1 where at least `agreeing` tasks count, or
    where the one called `alone` does.
    """

    dtype: str
    shape: tuple[int, ...]
    base: Expression
    tasks: tuple[Expression, ...]
    spread: float
    agreeing: int
    scale: float
    alone: int | None = None

    def leaves(self) -> Iterator[Stored]:
        return chain(self.base.leaves(), chain.from_iterable(task.leaves() for task in self.tasks))

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        return chain.from_iterable(tensor.reads(start, stop) for tensor in (self.base, *self.tasks))

    def memory(self, elements: int) -> int:
        read = sum(tensor.memory(elements) for tensor in (self.base, *self.tasks))
        return read + elements * (8 * (len(self.tasks) + 5) + 2)

    def measures(self) -> Iterator[Measure]:
        return chain.from_iterable(tensor.measures() for tensor in (self.base, *self.tasks))

    def measured(self, found: Mapping[Measure, Any]) -> Expression:
        tasks = tuple(task.measured(found) for task in self.tasks)
        return replace(self, base=self.base.measured(found), tasks=tasks)

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        tasks = [task.values(start, stop, fetch).view(np.float64) for task in self.tasks]
        total: Numbers = np.sum(tasks, axis=0)
        change = np.where(self._mask(tasks, total), total, 0.0)
        out = np.empty((stop - start) * self.itemsize, np.uint8)
        terms = [
            (1.0, self.base.values(start, stop, fetch), self.base.dtype),
            (self.scale, change.view(np.uint8), "F64"),
        ]
        weighted_sum(terms, out, self.dtype)
        return out

    def _mask(self, tasks: list[Numbers], total: Numbers) -> NDArray[np.bool_]:
        if self.alone is not None:
            return self._counts(tasks[self.alone], total)
        agree = np.zeros(total.shape, np.int16)
        for task in tasks:
            agree += self._counts(task, total)
        return agree >= self.agreeing

    def _counts(self, task: Numbers, total: Numbers) -> NDArray[np.bool_]:
        counts: NDArray[np.bool_] = np.abs(task) >= self.spread * np.abs(total - task)
        return counts

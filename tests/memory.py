"""Tensors in memory as expressions, for tests of what is made from them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from merger.expression import ByteRange, Expression, Fetch, Stored
from merger.kernels import Bytes


@dataclass(frozen=True, eq=False)
class InMemory(Expression):
    """Bytes that are there already."""

    content: Bytes
    dtype: str
    shape: tuple[int, ...]

    def leaves(self) -> Iterator[Stored]:
        return iter(())

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        return iter(())

    def memory(self, elements: int) -> int:
        return 0

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        return self.content[start * self.itemsize : stop * self.itemsize]


def as_bytes(tensor: torch.Tensor) -> Bytes:
    """A tensor's values as bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def evaluate(expression: Expression, start: int = 0, stop: int | None = None) -> Bytes:
    """Elements of an expression over tensors in memory, measured as often as it asks for."""
    while measures := list(expression.measures()):
        found = {
            measure: measure.compute(lambda a, b, of=measure.inputs: [t.values(a, b, None) for t in of])
            for measure in measures
        }
        expression = expression.measured(found)
    out = np.empty(
        (expression.size if stop is None else stop) * expression.itemsize - start * expression.itemsize, np.uint8
    )
    expression.write(start, expression.size if stop is None else stop, None, out)
    return out

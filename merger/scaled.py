"""Tensors of eight-bit values with scales, as the values that they stand for. Knows blocks; knows nothing of configs.

A scale belongs to a block of rows and columns: to a whole matrix, to a row, or to 128 by 128 elements as in
DeepSeek-V3 (arXiv 2412.19437, section 3.3). Blocks at the right and at the lower edge may be cut off.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import final

import numpy as np

from merger.expression import MARGIN, ByteRange, Expression, Fetch, Stored
from merger.kernels import Bytes, weighted_sum
from merger.scaled_kernels import Floats, as_float32, multiply_by_scales


@dataclass(frozen=True, slots=True)
class Blocks:
    """Which scale belongs to which element: matrices of `height` rows and `width` columns, one above the other, are
    each divided into blocks of `rows` and `columns`.
    """

    height: int
    width: int
    rows: int
    columns: int

    @property
    def grid(self) -> tuple[int, int]:
        """How many blocks of a matrix there are, from top to bottom and from left to right."""
        return -(-self.height // self.rows), -(-self.width // self.columns)

    def row_of(self, row: int) -> int:
        """The row of blocks that a row lies in, both counted through all matrices."""
        matrix, inside = divmod(row, self.height)
        return matrix * self.grid[0] + inside // self.rows


@final
@dataclass(frozen=True, slots=True)
class Scaled(Expression):
    """Stored values times the scales of their blocks: the float32 product, rounded once to `dtype`.

    `of` may be a part of what the blocks divide, beginning at row `top` and column `left`.
    """

    dtype: str
    shape: tuple[int, ...]
    of: Expression
    scales: Stored
    blocks: Blocks
    top: int = 0
    left: int = 0

    def leaves(self) -> Iterator[Stored]:
        return chain(self.of.leaves(), [self.scales])

    @property
    def _width(self) -> int:
        return self.shape[-1] if self.shape else 1

    def _scales(self, start: int, stop: int) -> tuple[int, int]:
        """The scales, by number, of all rows of blocks that the elements lie in."""
        first, last = (self.blocks.row_of(element // self._width + self.top) for element in (start, stop - 1))
        return first * self.blocks.grid[1], (last + 1) * self.blocks.grid[1]

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        if start < stop:
            yield from self.of.reads(start, stop)
            yield self.scales.range(*self._scales(start, stop))

    def memory(self, elements: int) -> int:
        """The codes, the scales twice, the products, and their copy in `dtype`."""
        lines, line = self.blocks.grid[0], self.blocks.grid[1] * (self.scales.itemsize + 4)
        each = -(-line * lines // max(1, self.blocks.height * self._width))
        return self.of.memory(elements) + 4 * line + MARGIN + elements * (4 + self.itemsize + each)

    def _products(self, start: int, stop: int, fetch: Fetch) -> Floats:
        first, last = self._scales(start, stop)
        return multiply_by_scales(
            self.of.values(start, stop, fetch),
            self.of.dtype,
            as_float32(fetch(self.scales.range(first, last)), self.scales.dtype),
            start=start,
            width=self._width,
            place=(self.top, self.left, first),
            block=(self.blocks.rows, self.blocks.columns),
            grid=(self.blocks.height, *self.blocks.grid),
        )

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        out = np.empty((stop - start) * self.itemsize, np.uint8)
        self.write(start, stop, fetch, out)
        return out

    def write(self, start: int, stop: int, fetch: Fetch, out: Bytes) -> int:
        if start == stop:
            return 0
        return weighted_sum([(1.0, self._products(start, stop, fetch).view(np.uint8), "F32")], out, self.dtype)

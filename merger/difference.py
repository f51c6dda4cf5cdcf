"""How far two checkpoints are apart. Knows tensors and sums of squares; draws and prints nothing.

Sums are float64 over fixed blocks, added in the order of the blocks: the same figures for any number of threads.
"""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from merger.architecture import layer_of
from merger.checkpoint import Checkpoint
from merger.dtypes import DTYPES
from merger.errors import IncompatibleSources
from merger.expression import Expression, Stored
from merger.host import processors
from merger.kernels import compare
from merger.reader import OpenFiles, read
from merger.scaled import Scaled
from merger.storage.disk import page_aligned

_BLOCK = 1 << 20  # elements


@dataclass(frozen=True)
class Distance:
    """Sums over pairs of values a, b: of a^2, b^2, ab and (a - b)^2, the largest |a - b|, and the number of pairs."""

    elements: int = 0
    a_squared: float = 0.0
    b_squared: float = 0.0
    product: float = 0.0
    difference_squared: float = 0.0
    largest: float = 0.0

    def __add__(self, other: Self) -> "Distance":
        return Distance(
            self.elements + other.elements,
            self.a_squared + other.a_squared,
            self.b_squared + other.b_squared,
            self.product + other.product,
            self.difference_squared + other.difference_squared,
            max(self.largest, other.largest),
        )

    @property
    def relative(self) -> float:
        """|a - b| / |a|; 0 where both are zero, infinite where only a is."""
        if self.difference_squared == 0:
            return 0.0
        return math.sqrt(self.difference_squared / self.a_squared) if self.a_squared else math.inf

    @property
    def cosine(self) -> float:
        """The cosine of the angle between a and b; 1 where they are equal, 0 where one of them is zero."""
        if self.difference_squared == 0:
            return 1.0
        norms = math.sqrt(self.a_squared) * math.sqrt(self.b_squared)
        return max(-1.0, min(1.0, self.product / norms)) if norms else 0.0


@dataclass(frozen=True)
class Pair:
    """A floating tensor as two checkpoints have it, in one shape."""

    name: str
    a: Expression
    b: Expression


def pairs_of(a: Checkpoint, b: Checkpoint) -> list[Pair]:
    """The floating tensors that two stored checkpoints share, dequantized ones among them.

    Raises IncompatibleSources where shapes differ.
    """
    found = []
    for name, first in a.tensors.items():
        other = b.tensors.get(name)
        if not isinstance(first, Stored | Scaled) or not isinstance(other, Stored | Scaled):
            continue
        if first.shape != other.shape:
            shapes = f"{list(first.shape)} in {a.label} and {list(other.shape)} in {b.label}"
            raise IncompatibleSources(f"has the shape {shapes}", where=f"tensor {name!r}")
        if DTYPES[first.dtype].is_float and DTYPES[other.dtype].is_float:
            found.append(Pair(name, first, other))
    return found


def measure(pairs: Sequence[Pair], limit: int | None = None) -> dict[str, Distance]:
    """The distance of every pair, by name; with `limit` over the first so many elements of each.

    Raises ReadFailed and SourceChanged.
    """
    leaves = (leaf for pair in pairs for tensor in (pair.a, pair.b) for leaf in tensor.leaves())
    files = OpenFiles(cached={str(leaf.file.path) for leaf in leaves})
    try:
        with ThreadPoolExecutor(processors()) as pool:
            return {pair.name: _tensor(pool, files, pair, limit) for pair in pairs}
    finally:
        files.close()


def _tensor(pool: Executor, files: OpenFiles, pair: Pair, limit: int | None) -> Distance:
    size = math.prod(pair.a.shape)
    size = size if limit is None else min(size, limit)
    blocks = pool.map(lambda start: _block(files, pair, start, min(start + _BLOCK, size)), range(0, size, _BLOCK))
    return sum(blocks, Distance())


def _block(files: OpenFiles, pair: Pair, start: int, stop: int) -> Distance:
    values = []
    for tensor in (pair.a, pair.b):
        found = read(set(tensor.reads(start, stop)), files, page_aligned(tensor.memory(stop - start)))
        values.append(tensor.values(start, stop, found.__getitem__))
    return Distance(stop - start, *compare(values[0], pair.a.dtype, values[1], pair.b.dtype))


def by_layer(distances: Mapping[str, Distance]) -> dict[str, Distance]:
    """Distances added up over the tensors of each layer, in the order of the tensors' names."""
    layers: dict[str, Distance] = {}
    for name, distance in distances.items():
        layer = layer_of(name)
        layers[layer] = layers.get(layer, Distance()) + distance
    return layers

"""Sums of what fine-tunes differ from their base by, after a mask has chosen among the elements. Knows tensors and
masks; knows nothing of recipes.

One expression makes task arithmetic with random masks (DARE), with trimmed ones (TIES), without the largest either
(Breadcrumbs) and with probabilities that follow ranks (DELLA), each with or without an election of signs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain
from typing import Any, Literal, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from merger.delta_kernels import Inputs
from merger.expression import ByteRange, Evaluate, Expression, Fetch, Measure, Stored, cast, join
from merger.kernels import Bytes, count_non_finite
from merger.mask_kernels import ALL, LISTED, RANDOM, RANKED, list_by_variance, mix, sum_kept
from merger.noise import Key
from merger.rank_kernels import list_by_rank
from merger.thresholds import BLOCK, EVERYTHING, NOTHING, ROOM, Bound, Tensors, bounds_of


class Mask(NamedTuple):
    """Which elements of a model's difference stay, by their magnitudes.

    `reaching` and `beyond`: those among the so many largest, but for the largest of these. Else with a probability that
    grows from `least` for the smallest of a row to `most` for the largest: for all elements the same where they are
    equal. Or those that vary most over the models. Everything stays where nothing is said.
    """

    reaching: int | None = None
    beyond: int = 0
    least: float = 1.0
    most: float = 1.0
    key: Key = (0, 0)
    divided: bool = False  # what stays by a probability that follows ranks, by that
    varying: float = 1.0  # the share of elements, of those that vary over the models at all, that vary most

    @property
    def kind(self) -> int:
        if self.varying < 1.0:
            return LISTED
        if self.reaching is not None:
            return RANKED
        if self.least == self.most:
            return ALL if self.least >= 1.0 else RANDOM
        return LISTED


class Model(NamedTuple):
    """A fine-tune, its weight, and the mask of what it differs by."""

    tensor: Expression
    weight: float
    mask: Mask


_NUMBERS = 5  # for each model: two bounds of a key and an index, a factor


Election = Literal["weighted", "plain"]
Factors = Literal["one", "magnitudes", "energies"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Study(Measure):
    """The bounds of the masks, and a factor for each model: one; what brings the sum of magnitudes that is left back to
    what there was; or its share of all squares that are left. Compared by identity.
    """

    inputs: tuple[Expression, ...]  # the base, then the models
    masks: tuple[Mask, ...]
    factors: Factors

    @property
    def memory(self) -> int:
        return self.reading(BLOCK) + ROOM * len(self.masks)

    def compute(self, evaluate: Evaluate) -> Sequence[float]:
        """For each model the key and index that are reached, those that are not, and the factor."""
        tensors = Tensors(evaluate, [tensor.dtype for tensor in self.inputs], self.inputs[0].size)
        bounds = self._bounds(tensors)
        factors = self._factors(tensors, bounds)
        rows = [(*low, *high, factor) for (low, high), factor in zip(bounds, factors, strict=True)]
        return [float(number) for row in rows for number in row]

    def _bounds(self, tensors: Tensors) -> list[list[Bound]]:
        """The lower and the upper bound of each mask that ranks."""
        varying = self.masks[0].varying
        if varying < 1.0:
            [[low]] = bounds_of(tensors, [lambda some: [int(some * max(0.0, varying))]], by_variance=True)
            return [[low, NOTHING] for _ in self.masks]
        if not any(mask.kind == RANKED for mask in self.masks):
            return [[EVERYTHING, NOTHING] for _ in self.masks]
        return bounds_of(tensors, [partial(_counts, mask, tensors.size) for mask in self.masks])

    def _factors(self, tensors: Tensors, bounds: Sequence[Sequence[Bound]]) -> list[float]:
        if self.factors == "one":
            return [1.0] * len(self.masks)
        totals = self._totals(tensors, bounds)
        if self.factors == "energies":
            return _shares(totals[:, 1] / max(1, tensors.size))
        return [float(a / b) if min(a, b) >= 1e-7 else 1.0 for a, b in totals]

    def _totals(self, tensors: Tensors, bounds: Sequence[Sequence[Bound]]) -> NDArray[np.float64]:
        """The sums of magnitudes and of what is left of them, or of squares, a row each."""
        totals = np.zeros((len(self.masks), 2))
        width = self.inputs[0].shape[-1] if self.inputs[0].shape else 1
        step = max(1, BLOCK // width) * width
        for start in range(0, tensors.size, step):
            stop = min(start + step, tensors.size)
            inputs = Inputs(tensors.evaluate(start, stop), tensors.dtypes)
            mask = _arrays_of(self.masks, bounds, inputs, start, stop, width)
            sum_kept(inputs, stop - start, start, mask, totals, squares=self.factors == "energies")
        return totals


def _counts(mask: Mask, size: int, _some: int) -> Sequence[int]:
    return size if mask.reaching is None else mask.reaching, mask.beyond


def _shares(energies: NDArray[np.float64]) -> list[float]:
    """Each one's share of all; the same for all where there is nearly nothing (sce.py)."""
    total = float(energies.sum())
    return [1.0 / len(energies)] * len(energies) if total < 1e-6 else [float(energy) / total for energy in energies]


def _arrays_of(
    masks: Sequence[Mask], bounds: Sequence[Sequence[Bound]], inputs: Inputs, start: int, stop: int, width: int
) -> Any:
    """Masks as the kernels take them; `inputs` hold whole rows where a mask follows ranks in these."""
    kinds = np.array([mask.kind for mask in masks], np.int64)
    keys = np.array([mask.key for mask in masks], np.uint64).reshape(-1, 2)
    limits = np.array([min(round(mask.least * 2**32), 1 << 32) for mask in masks], np.uint64)
    listed: Any = np.empty((len(masks), 0), np.bool_)
    if masks[0].varying < 1.0:
        listed = np.repeat(list_by_variance(inputs, stop - start, start, bounds[0][0])[None], len(masks), axis=0)
    elif LISTED in kinds:
        spans = np.array([(mask.least, mask.most) for mask in masks])
        divided = any(mask.divided for mask in masks)
        listed = list_by_rank(inputs, (stop - start) // width, width, start, keys, spans, divided=divided)
    numbers = np.array([(*low, *high) for low, high in bounds], np.int64).reshape(-1, 4)
    return kinds, numbers, keys, limits, listed


@final
@dataclass(frozen=True, slots=True)
class Mixed(Expression):
    """base + scale * the sum of weight * factor * what a mask leaves of each model's difference.

    `elect`: of the models whose sign at an element is that of the sum there (an empty sum's is +), which is that of the
    weighted differences or of the plain ones. `normalize`: over the sum of the weights that took part. In float32,
    rounded once to `dtype`.
    """

    dtype: str
    shape: tuple[int, ...]
    base: Expression
    models: tuple[Model, ...]
    scale: float
    elect: Election | None
    normalize: bool
    study: Study | None
    found: Sequence[float] | None = None
    offset: int = 0  # of the first element, where the study is of several tensors, one after the other

    @property
    def _inputs(self) -> tuple[Expression, ...]:
        return (self.base, *(model.tensor for model in self.models))

    @property
    def _row(self) -> int:
        """The elements that must be seen together: a row where a mask follows ranks, else one."""
        by_rank = any(model.mask.kind == LISTED and model.mask.varying >= 1.0 for model in self.models)
        return self.shape[-1] if self.shape and by_rank else 1

    def _whole(self, start: int, stop: int) -> tuple[int, int]:
        return start // self._row * self._row, -(-stop // self._row) * self._row

    def leaves(self) -> Iterator[Stored]:
        return chain.from_iterable(tensor.leaves() for tensor in self._inputs)

    def reads(self, start: int, stop: int) -> Iterator[ByteRange]:
        first, last = self._whole(start, stop)
        return chain.from_iterable(tensor.reads(first, last) for tensor in self._inputs)

    def memory(self, elements: int) -> int:
        rows = elements + 2 * (self._row - 1)
        listed = (5 * len(self.models) + self.itemsize) * rows if any(m.mask.kind == LISTED for m in self.models) else 0
        return sum(tensor.memory(rows) for tensor in self._inputs) + listed

    def measures(self) -> Iterator[Measure]:
        inner = list(chain.from_iterable(tensor.measures() for tensor in self._inputs))
        if inner:
            yield from inner
        elif self.study and self.found is None:
            yield self.study

    def measured(self, found: Mapping[Measure, Sequence[float]]) -> Expression:
        if self.study and self.study in found:
            return replace(self, found=found[self.study])
        if not any(True for tensor in self._inputs for _ in tensor.measures()):
            return self
        base = self.base.measured(found)
        models = tuple(model._replace(tensor=model.tensor.measured(found)) for model in self.models)
        study = self.study and replace(self.study, inputs=(base, *(model.tensor for model in models)))
        return replace(self, base=base, models=models, study=study)

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        out = np.empty((stop - start) * self.itemsize, np.uint8)
        self.write(start, stop, fetch, out)
        return out

    def write(self, start: int, stop: int, fetch: Fetch, out: Bytes) -> int:
        first, last = self._whole(start, stop)
        whole = out if (first, last) == (start, stop) else np.empty((last - first) * self.itemsize, np.uint8)
        values = [tensor.values(first, last, fetch) for tensor in self._inputs]
        inputs = Inputs(values, [tensor.dtype for tensor in self._inputs])
        bounds, factors = self._known()
        masks = [model.mask for model in self.models]
        factors = factors * [model.weight for model in self.models]
        shares = self.study is not None and self.study.factors == "energies"
        weights = factors if shares else np.array([model.weight for model in self.models])
        mix(
            inputs,
            first,
            _arrays_of(masks, bounds, inputs, first, last, self._row),
            factors.astype(np.float32),
            weights.astype(np.float32),
            self.scale,
            self.elect is not None,
            self.elect == "plain",
            self.normalize,
            whole,
            self.dtype,
        )
        if whole is not out:
            out[:] = whole[(start - first) * self.itemsize : (stop - first) * self.itemsize]
        return count_non_finite(out, self.dtype)

    def _known(self) -> tuple[list[list[Bound]], NDArray[np.float64]]:
        """The bounds and the factors, as they were measured."""
        if self.study is None:
            return [[EVERYTHING, NOTHING] for _ in self.models], np.ones(len(self.models))
        if self.found is None:
            raise ValueError("was not measured")
        rows = np.array(self.found).reshape(-1, _NUMBERS)
        bounds = [[Bound(int(a), int(b) - self.offset), Bound(int(c), int(d) - self.offset)] for a, b, c, d, _ in rows]
        return bounds, rows[:, 4]


def mixed(
    base: Expression,
    models: Sequence[Model],
    dtype: str,
    *,
    scale: float = 1.0,
    elect: Election | None = None,
    normalize: bool = False,
    factors: Factors = "one",
    study: tuple[Study, int] | None = None,
) -> Expression:
    """A base and the masked differences of models from it, all of one shape, as `dtype`; see `Mixed` and `Study`, which
    may be one of several tensors, with the number of elements before this one.
    """
    if study:
        return Mixed(dtype, base.shape, base, tuple(models), scale, elect, normalize, study[0], None, study[1])
    masks = tuple(model.mask for model in models)
    if factors == "magnitudes" and all(mask.kind == ALL for mask in masks):
        factors = "one"
    ranks = any(mask.kind == RANKED or mask.varying < 1.0 for mask in masks)
    inputs = (base, *(model.tensor for model in models))
    own = Study(inputs, masks, factors) if ranks or factors != "one" else None
    return Mixed(dtype, base.shape, base, tuple(models), scale, elect, normalize, own)


def trimmed_together(
    tensors: Mapping[str, tuple[Expression, Sequence[Expression]]], density: float
) -> tuple[Study, Mapping[str, int]]:
    """A study of several tensors as one vector, each name's base and models, of which the largest magnitudes of each
    model stay; and the number of elements before each. What is measured itself cannot be studied so.
    """
    offsets = dict(zip(tensors, accumulate((base.size for base, _ in tensors.values()), initial=0), strict=False))
    columns = zip(*((base, *models) for base, models in tensors.values()), strict=True)
    size = sum(base.size for base, _ in tensors.values())
    inputs = tuple(join([cast(part, "F32") for part in column], (size,)) for column in columns)
    mask = Mask(reaching=max(1, int(density * size)))
    return Study(inputs, (mask,) * (len(inputs) - 1), "one"), offsets

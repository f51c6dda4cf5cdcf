"""Merges of fine-tunes by the singular values of what they changed: TSV, Iso-C, Iso-CTS, WUDI, calibration.

Knows which tensors are matrices, what each formula costs and how recipes name it; the formulas are `merger.spectra`'s.
Matrices are decomposed whole; everything else (norms, biases, fused experts, convolutions) is the mean of the changes.
"""

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, Literal, final

from pydantic import Field, field_validator

from merger import spectra
from merger.architecture import embedding_of, is_running_statistic
from merger.checkpoint import Checkpoint, Part
from merger.dtypes import DTYPES
from merger.errors import NotInstalled, RecipeError
from merger.expression import Expression, Filled, Identical, combine
from merger.methods.fine_tunes import Entries, opened, sum_of_fine_tunes
from merger.methods.method import Method, Source, Sources, open_source
from merger.whole import Function, Tensors, Whole, loading

EXPERIMENTAL = (
    "experimental: a study of merging language models found that methods of this kind often make them worse than plain "
    "task arithmetic, sometimes far worse (arXiv 2511.21437); measure the result"
)


# ---- the tensors of fine-tunes ------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A base and its fine-tunes: what a sum of them makes, and for each of its floating tensors the base's and theirs,
    with the weights that the recipe gives them.
    """

    sum: Checkpoint
    base: Checkpoint
    models: Sequence[Checkpoint]
    weights: Sequence[float]

    @staticmethod
    def tensor(model: Checkpoint, name: str) -> Expression:
        """A model's tensor; of a head that is tied the embedding."""
        return model.tensors.get(name) or model.tensors[embedding_of(model.tensors) or name]

    def tasks(self, name: str) -> tuple[Expression, ...]:
        """The weighted task vectors, in float64."""
        base, models = self.tensor(self.base, name), (self.tensor(model, name) for model in self.models)
        pairs = zip(self.weights, models, strict=True)
        return tuple(
            Filled("F64", base.shape) if model == base else combine([(weight, model), (-weight, base)], "F64")
            for weight, model in pairs
        )

    def total(self, name: str) -> Expression:
        """Their sum, which may be of nothing."""
        tasks = self.tasks(name)
        return combine([*((1.0, task) for task in tasks), (1.0, Filled("F64", tasks[0].shape))], "F64")

    def is_changed(self, name: str) -> bool:
        """Whether any of them has another tensor than the base, not the very same one."""
        base = self.tensor(self.base, name)
        return any(self.tensor(model, name) != base for model in self.models)

    def mean(self, name: str, scale: float) -> Expression:
        """The base plus the scaled mean of the task vectors."""
        share = scale / len(self.models)
        terms = [(share * w, self.tensor(model, name)) for w, model in zip(self.weights, self.models, strict=True)]
        rest = 1.0 - share * sum(self.weights)
        return combine([*terms, (rest, self.tensor(self.base, name))], self.sum.tensors[name].dtype)

    def changed(self, name: str, change: Expression, scale: float) -> Expression:
        """The base plus the scaled change."""
        return combine([(1.0, self.tensor(self.base, name)), (scale, change)], self.sum.tensors[name].dtype)

    def floating(self) -> list[str]:
        """The tensors that are merged: all but integers and statistics of batch normalisation."""
        return [
            name
            for name, tensor in self.sum.tensors.items()
            if DTYPES[tensor.dtype].is_float and not isinstance(tensor, Identical) and not is_running_statistic(name)
        ]


def family_of(sources: Sources, base: "str | Method", entries: Any) -> Family:
    """The base and the models that a recipe names, seen to stem from one. Raises RequestError."""
    origin = open_source(sources, base)
    models, weights = opened(sources, entries)
    pairs = [(model, weight) for model, weight in zip(models, weights, strict=True) if weight != 0.0]
    if not pairs:
        raise RecipeError("every weight is zero", where="models")
    even = 0.5 / len(pairs)
    total = sum_of_fine_tunes([model for model, _ in pairs], [even] * len(pairs), origin, 0.5)
    shares = [*((model, weight) for model, weight in pairs), (origin, 1.0 - sum(weight for _, weight in pairs))]
    parts = tuple(Part(part.source, share * part.weight) for model, share in shares for part in model.parts)
    return Family(replace(total, parts=parts), origin, [m for m, _ in pairs], [w for _, w in pairs])


# ---- what is called with whole matrices ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Merge(Function):
    """A formula of `merger.spectra` with its numbers. `words` of 8 bytes beside what is loaded follow from m and n."""

    count: int

    @abstractmethod
    def words(self, m: int, n: int) -> int:
        """Numbers that are held beside the task vector that was loaded last."""

    def memory(self, inputs: Sequence[Expression]) -> int:
        m, n = inputs[0].shape
        return max(loading(tensor) for tensor in inputs) + 8 * self.words(m, n)


def _svd_words(m: int, n: int) -> int:
    """What a decomposition takes: a copy of the matrix, its factors, and what LAPACK's gesdd works with."""
    k = min(m, n)
    return m * n + k * (m + n) + 6 * k * k


@final
@dataclass(frozen=True, slots=True)
class Tsv(Merge):
    def words(self, m: int, n: int) -> int:
        k = min(m, n)
        return _svd_words(m, n) + 2 * m * n + 3 * k * (m + n) + 2 * k * k

    def __call__(self, tensors: Tensors) -> Any:
        return spectra.tsv(tensors.load, self.count)


@final
@dataclass(frozen=True, slots=True)
class IsoC(Merge):
    def words(self, m: int, n: int) -> int:
        return _svd_words(m, n) + 2 * m * n

    def __call__(self, tensors: Tensors) -> Any:
        return spectra.iso_c(tensors.load(0))


@final
@dataclass(frozen=True, slots=True)
class IsoCts(Merge):
    fraction: float

    def words(self, m: int, n: int) -> int:
        k = min(m, n)
        return _svd_words(m, n) + 6 * m * n + 3 * k * (m + n) + 2 * k * k

    def __call__(self, tensors: Tensors) -> Any:
        return spectra.iso_cts(tensors.load, self.count, self.fraction)


@final
@dataclass(frozen=True, slots=True)
class Wudi(Merge):
    steps: int | None
    rate: float

    def words(self, m: int, n: int) -> int:
        if self.steps is not None:
            return 3 * n * n + 10 * m * n
        tall = self.count * m
        return _svd_words(tall, n) + 2 * tall * n + tall * m + m * (min(tall, n) + n)

    def __call__(self, tensors: Tensors) -> Any:
        if self.steps is None:
            return spectra.wudi(tensors.load, self.count)
        return spectra.wudi_by_steps(tensors.load, self.count, self.steps, self.rate)


@final
@dataclass(frozen=True, slots=True)
class Calibration(Merge):
    alpha: float

    def words(self, m: int, n: int) -> int:
        return _svd_words(m, n) + 3 * m * n + 3 * min(m, n) * n

    def __call__(self, tensors: Tensors) -> Any:
        return spectra.svc(tensors.load, self.count, self.alpha)


# ---- the methods --------------------------------------------------------------------------------------


class Spectral(Method):
    """What the methods have in common."""

    base: Source = Field(description="The model that all fine-tunes started from.")
    models: Entries = Field(description="The fine-tunes: a pattern, or a list of models with or without a `weight`.")
    scale: float = Field(default=1.0, description="A factor for the merged change.")
    averaged: list[str] = Field(
        default=[],
        description="Regular expressions: matrices whose name one is found in are averaged too, as embeddings that are "
        "too large to decompose.",
    )
    experimental: ClassVar[bool] = True

    @field_validator("averaged")
    @classmethod
    def _are_patterns(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return patterns

    @abstractmethod
    def change(self, family: Family, name: str) -> tuple[tuple[Expression, ...], Function]:
        """What a matrix's change is made from, and by what."""

    def decomposes(self, _shape: tuple[int, ...], _count: int) -> bool:
        """Whether a matrix of this shape can be decomposed among so many tasks."""
        return True

    def build(self, sources: Sources) -> Checkpoint:
        if find_spec("torch") is None:
            raise NotInstalled("decompositions of matrices need torch", where="torch")
        family = family_of(sources, self.base, self.models)
        tensors = {**family.sum.tensors, **{name: self._tensor(family, name) for name in family.floating()}}
        averaged = [name for name in family.floating() if not self._is_whole(family, name)]
        notes = [EXPERIMENTAL, f"{len(averaged)} of {len(tensors)} tensors are no matrices to decompose: their mean"]
        return replace(family.sum, tensors=tensors, notes=(*family.sum.notes, *notes))

    def _is_whole(self, family: Family, name: str) -> bool:
        shape = family.sum.tensors[name].shape
        if len(shape) != 2 or any(re.search(pattern, name) for pattern in self.averaged):
            return False
        return min(shape) > 0 and self.decomposes(shape, len(family.models))

    def _tensor(self, family: Family, name: str) -> Expression:
        if not self._is_whole(family, name) or not family.is_changed(name):
            return family.mean(name, self.scale)
        inputs, function = self.change(family, name)
        change: Expression = Whole(_dtype(family, name), inputs[0].shape, inputs, function, name)
        return family.changed(name, self.calibrated(family, name, change), self.scale)

    def calibrated(self, _family: Family, _name: str, change: Expression) -> Expression:
        """The change, or what calibration makes of it."""
        return change


def _dtype(family: Family, name: str) -> str:
    """Changes are kept in float32 until they are added to the base; of models in float64 in that."""
    return "F64" if family.sum.tensors[name].dtype == "F64" else "F32"


class Calibrated(Spectral):
    """Methods whose result can be calibrated. Iso's cannot: equal singular values have no directions of their own."""

    svc: bool = Field(
        default=False,
        description="Calibrate the merged change: singular directions that the tasks share are not counted twice "
        "(arXiv 2602.05536).",
    )

    def calibrated(self, family: Family, name: str, change: Expression) -> Expression:
        if not self.svc:
            return change
        inputs = (combine([(1.0, change)], "F64"), *family.tasks(name))
        function = Calibration(len(family.models), 1.0)
        return Whole(_dtype(family, name), change.shape, inputs, function, f"{name} (calibrated)")


def _example(method: str, more: str = "") -> str:
    return (
        f"method: {method}\nbase: models/base\nmodels: [models/code, models/math]\n{more}output: {{path: out/{method}}}"
    )


class TsvM(Calibrated):
    """TSV-M: of each fine-tune the largest singular directions, made orthogonal to each other. Experimental."""

    method: Literal["tsv"] = "tsv"

    paper: ClassVar[str] = "Task singular vectors, arXiv 2412.00081"
    example: ClassVar[str] = _example("tsv")

    def decomposes(self, shape: tuple[int, ...], count: int) -> bool:
        return count <= min(shape)

    def change(self, family: Family, name: str) -> tuple[tuple[Expression, ...], Function]:
        return family.tasks(name), Tsv(len(family.models))


class IsotropicC(Spectral):
    """Iso-C: the sum of the changes with all of its singular values made equal. Experimental."""

    method: Literal["iso_c"] = "iso_c"

    paper: ClassVar[str] = "No task left behind, arXiv 2502.04959"
    example: ClassVar[str] = _example("iso_c")

    def change(self, family: Family, name: str) -> tuple[tuple[Expression, ...], Function]:
        return (family.total(name),), IsoC(len(family.models))


class IsotropicCts(Spectral):
    """Iso-CTS: common directions of the sum and some of each task's own, with equal singular values. Experimental."""

    method: Literal["iso_cts"] = "iso_cts"
    common: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.8, description="The share of the directions that are the sum's; the tasks add the others."
    )

    paper: ClassVar[str] = "No task left behind, arXiv 2502.04959"
    example: ClassVar[str] = _example("iso_cts", "common: 0.8\n")

    def change(self, family: Family, name: str) -> tuple[tuple[Expression, ...], Function]:
        inputs = (family.total(name), *family.tasks(name))
        return inputs, IsoCts(len(family.models), self.common)


class WudiMerging(Calibrated):
    """WUDI: the change that disturbs each task least within the span of its own. Experimental."""

    method: Literal["wudi"] = "wudi"
    steps: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Steps of Adam from the sum of the changes, 300 in the paper, which stops before the minimum; "
        "without, the minimum itself in closed form.",
    )
    rate: Annotated[float, Field(gt=0)] = Field(default=1e-5, description="The learning rate of these steps.")

    paper: ClassVar[str] = "WUDI-merging, arXiv 2503.08099"
    example: ClassVar[str] = _example("wudi", "steps: 300\n")

    def change(self, family: Family, name: str) -> tuple[tuple[Expression, ...], Function]:
        return family.tasks(name), Wudi(len(family.models), self.steps, self.rate)


class SingularValueCalibration(Spectral):
    """SVC: task arithmetic whose singular directions are scaled down where several tasks share them. Experimental."""

    method: Literal["svc"] = "svc"
    alpha: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="The least that a task counts in a direction; 1 only ever scales down."
    )

    paper: ClassVar[str] = "Singular value calibration, arXiv 2602.05536"
    example: ClassVar[str] = _example("svc")

    def change(self, family: Family, name: str) -> tuple[tuple[Expression, ...], Function]:
        inputs = (family.total(name), *family.tasks(name))
        return inputs, Calibration(len(family.models), self.alpha)

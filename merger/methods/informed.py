"""Merges that statistics of each model on text inform: Fisher-weighted averages and regression means.

Knows which tensors a formula is for and how recipes name it; statistics are opened and checked by `merger.statistics`,
made by `merger statistics`.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, Literal, Self, final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from merger.checkpoint import Checkpoint, Kin
from merger.dtypes import promote
from merger.errors import IncompatibleSources, NotInstalled
from merger.expression import Expression, combine
from merger.methods.merges import fine_tunes_merged
from merger.methods.method import Method, Sources
from merger.quantized import dequantized
from merger.regression import regression_mean
from merger.statistics import Kind, Statistics, observed, open_statistics
from merger.weighed import Weighed, Weight
from merger.whole import Function, Tensors, Whole, loading

EXPERIMENTAL = (
    "experimental: that statistics make a better merge than a plain average was shown for classifiers, and is not "
    "known of large language models; measure the result"
)


class Informed(BaseModel):
    """A model with its statistics."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    source: str = Field(description="The model, as it is stored: a folder, a name on the Hub, an address in a store.")
    statistics: str = Field(description="The folder that `merger statistics` made of it, here or there.")
    weight: float = Field(default=1.0, ge=0, description="How much its statistics count.")


@dataclass(frozen=True)
class Member:
    """A model that counts, its statistics and its weight."""

    model: Checkpoint
    statistics: Statistics
    weight: float


@dataclass(frozen=True)
class Group:
    """The tensors of one name, their statistics, and the share of each model in a plain mean."""

    name: str
    tensors: tuple[Expression, ...]
    statistics: tuple[Expression, ...]
    members: Sequence[Member]
    shares: tuple[float, ...]
    dtype: str


class ByStatistics(Method):
    """What the methods have in common."""

    models: list[Informed] = Field(min_length=1, description="Fine-tunes of one model, each with its statistics.")
    experimental: ClassVar[bool] = True
    kind: ClassVar[Kind]

    @model_validator(mode="after")
    def _something_counts(self) -> Self:
        if not any(model.weight for model in self.models):
            raise ValueError("every weight is zero")
        return self

    def build(self, sources: Sources) -> Checkpoint:
        members = [_opened(sources, model, self.kind) for model in self.models if model.weight]
        total = sum(member.weight for member in members)
        shares = tuple(member.weight / total for member in members)
        averaged: list[str] = []

        def merge(name: str, tensors: Sequence[Expression]) -> Expression:
            dtype = promote(frozenset(tensor.dtype for tensor in tensors))
            own = _of_all(members, name)
            if own is not None:
                return self.merged(Group(name, tuple(tensors), own, members, shares, dtype))
            averaged.append(name)
            return combine(list(zip(shares, tensors, strict=True)), dtype)

        made = fine_tunes_merged([member.model for member in members], None, merge, shares)
        first = f", {averaged[0]} first" if averaged else ""
        notes = (EXPERIMENTAL, f"{len(averaged)} of {len(made.tensors)} tensors have no statistics{first}: their mean")
        kin = Kin(tuple(member.model for member in members))
        return replace(made, notes=(*made.notes, *notes), kin=(*made.kin, kin))

    @abstractmethod
    def merged(self, group: Group) -> Expression:
        """The tensors of a group as one."""


def _opened(sources: Sources, given: Informed, kind: Kind) -> Member:
    """A model and its statistics, which fit it as far as headers tell. Raises RequestError."""
    [of_model], [of_statistics] = sources.members([given.source]), sources.members([given.statistics])
    stored, beside = sources.open(of_model), sources.open(of_statistics)
    model = dequantized(stored)
    statistics = open_statistics(beside, kind, model)
    return Member(observed(model, stored, beside, statistics.manifest.model.digest), statistics, given.weight)


def _of_all(members: Sequence[Member], name: str) -> tuple[Expression, ...] | None:
    """The statistics of a tensor in every model, None where there are none in any. Raises IncompatibleSources."""
    found = [member.statistics.find(name) for member in members]
    kept = tuple(expression for expression in found if expression is not None)
    if kept and len(kept) < len(found):
        a, b = (next(m for m, own in zip(members, found, strict=True) if (own is None) is no) for no in (True, False))
        raise IncompatibleSources(
            f"has statistics in {b.statistics.label} and none in {a.statistics.label}",
            where=f"tensor {name!r}",
            remedy="Make the statistics of all models with one version of transformers.",
        )
    return kept or None


def _example(method: str, more: str) -> str:
    rows = "".join(f"  - {{source: models/{name}, statistics: {method}/{name}}}\n" for name in ("code", "math"))
    return f"method: {method}\nmodels:\n{rows}{more}output: {{path: out/{method}}}"


class FisherMerging(ByStatistics):
    """Fisher merging: each number the mean of the models', weighed by how much their predictions depend on it."""

    method: Literal["fisher"] = "fisher"
    normalize: bool = Field(
        default=True,
        description="Divide the Fisher information of each model by its mean over the model, so that none outweighs "
        "the others as a whole.",
    )
    floor: Annotated[float, Field(gt=0)] = Field(
        default=1e-6, description="The least that a number counts, in parts of the mean Fisher information."
    )

    paper: ClassVar[str] = "Merging models with Fisher-weighted averaging, arXiv 2111.09832"
    example: ClassVar[str] = _example("fisher", "floor: 1.0e-6\n")
    kind: ClassVar[Kind] = "fisher"

    def merged(self, group: Group) -> Expression:
        means = [member.statistics.manifest.mean or 1.0 for member in group.members]  # 0 where all numbers are
        pairs = list(zip(group.shares, means, strict=True))
        common = sum(share * mean for share, mean in pairs)
        weights = tuple(Weight(share, 1.0 / (mean if self.normalize else common), self.floor) for share, mean in pairs)
        return Weighed(group.dtype, group.tensors[0].shape, group.tensors, group.statistics, weights)


@final
@dataclass(frozen=True, slots=True)
class Regression(Function):
    """`merger.regression` with its numbers."""

    shares: tuple[float, ...]
    weights: tuple[float, ...]
    alpha: float

    def memory(self, inputs: Sequence[Expression]) -> int:
        """What was loaded last, and in float64 at most five matrices of the layer's and seven of the Gram's shape."""
        m, n = inputs[0].shape
        return max(loading(tensor) for tensor in inputs) + 8 * (5 * m * n + 7 * n * n)

    def __call__(self, tensors: Tensors) -> Any:
        return regression_mean(tensors.load, self.shares, self.weights, self.alpha)


class RegMean(ByStatistics):
    """RegMean: each linear layer the one whose outputs are nearest to those of the models' on their own inputs."""

    method: Literal["regmean"] = "regmean"
    alpha: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.9,
        description="A factor for Gram matrices off their diagonal; 0 looks at each input for itself, 1 is the exact "
        "least squares.",
    )
    by_tokens: bool = Field(
        default=False,
        description="Whether models count by the number of tokens of their statistics too, as if all text were one.",
    )

    paper: ClassVar[str] = "Dataless knowledge fusion by merging weights of language models, arXiv 2212.09849"
    example: ClassVar[str] = _example("regmean", "alpha: 0.9\n")
    kind: ClassVar[Kind] = "gram"

    def build(self, sources: Sources) -> Checkpoint:
        if find_spec("torch") is None:
            raise NotInstalled("equations of whole matrices need torch", where="torch")
        return super().build(sources)

    def merged(self, group: Group) -> Expression:
        tokens = [member.statistics.manifest.data.tokens if self.by_tokens else 1 for member in group.members]
        weights = tuple(share * count for share, count in zip(group.shares, tokens, strict=True))
        function = Regression(group.shares, weights, self.alpha)
        return Whole(group.dtype, group.tensors[0].shape, (*group.tensors, *group.statistics), function, group.name)

"""Merges of fine-tunes beyond the weighted sum: by rank, by sign, by chance.

Knows the recipes' fields and which definition they follow; the arithmetic is in `merger.methods.task_vectors` and
`merger.deltas`. A mergekit configuration has the same merges with numbers for each tensor and layer.

Where the paper of a method and mergekit 0.1.5 differ, `definition` says which is meant; the paper's where nothing is
said.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from merger.checkpoint import Checkpoint
from merger.deltas import Mask, Model, Study, mixed, trimmed_together
from merger.dtypes import DTYPES, promote
from merger.errors import RecipeError, UnsupportedModel
from merger.expression import Expression
from merger.methods.combination import combined
from merger.methods.fine_tunes import Entries, check_function, opened
from merger.methods.merging import RULES
from merger.methods.method import Method, Source, Sources, open_source
from merger.methods.rules import Group, Rule, Value
from merger.noise import key_of

Definition = Literal["paper", "mergekit"]
Numbers = Mapping[str, Value]


def by_rule(
    rule: Rule,
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    shared: Numbers,
    each: Mapping[str, Sequence[Value]],
    seed: int = 0,
    shares: Sequence[float] = (),
) -> Checkpoint:
    """Models, and a base, merged by a rule of mergekit's; config and side files come from the first model. `shares` are
    what the report says of the models and the base, the weights where nothing is given.

    Raises RequestError.
    """
    check_count(rule, len(models), base is not None)
    everything = {**{name: parameter.default for name, parameter in rule.shared.items()}, **shared}
    count = len(models)
    numbers = {name: tuple(each.get(name, (parameter.default,) * count)) for name, parameter in rule.each.items()}

    def merge(name: str, tensors: Sequence[Expression]) -> Expression:
        dtype = promote(frozenset(tensor.dtype for tensor in tensors))
        own, rest = tuple(tensors[:count]), tensors[count:]
        return rule.make(Group(name, own, rest[0] if rest else None, everything, numbers, dtype, dtype, seed))

    weights = [float(weight or 0.0) for weight in numbers.get("weight", (1.0 / count,) * count)]
    return fine_tunes_merged(models, base, merge, shares or [*weights, 1.0])


def check_count(rule: Rule, count: int, has_base: bool) -> None:
    """See that a rule takes so many models. Raises RecipeError."""
    try:
        rule.check_count(count, has_base)
    except ValueError as error:
        raise RecipeError(str(error), where="models") from error


def fine_tunes_merged(
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    merge: Callable[[str, Sequence[Expression]], Expression],
    shares: Sequence[float],
) -> Checkpoint:
    """Models of one origin merged tensor by tensor, the base's tensor the last. `shares` are what the report says of
    them, and of the base. Raises RequestError.
    """
    everyone = [*models, *([base] if base else [])]
    for other in everyone[1:]:
        check_function(everyone[0], other)
    try:
        return combined(everyone, shares[: len(everyone)], merge)
    except ValueError as error:
        raise RecipeError(str(error), where="models") from error


# ---- task vectors -------------------------------------------------------------------------------------


class OnBase(Method):
    """A merge of what fine-tunes differ from their base by."""

    base: Source = Field(description="The model that all fine-tunes started from.")
    models: Entries = Field(description="The fine-tunes: a pattern, or a list of models with or without a `weight`.")

    def build(self, sources: Sources) -> Checkpoint:
        base = open_source(sources, self.base)
        models, weights = opened(sources, self.models)
        return self.merged(base, models, weights)

    @abstractmethod
    def merged(self, base: Checkpoint, models: Sequence[Checkpoint], weights: Sequence[float]) -> Checkpoint:
        """The fine-tunes with their weights, merged."""


_SCALE = "A factor for what is added to the base (lambda of the paper)."
_SEED = "Of the random masks."


class Ties(OnBase):
    """TIES: of each fine-tune the largest changes, of each weight the sign that most of them want, and their mean."""

    method: Literal["ties"] = "ties"
    density: float = Field(default=0.2, gt=0, le=1, description="The share of changes that is kept.")
    scale: float = Field(default=1.0, description=_SCALE)
    trim: Literal["tensor", "model"] = Field(
        default="tensor",
        description="The share of each tensor, as mergekit has it, or of the whole model, as in the paper: every part "
        "of a job then looks at the whole model first.",
    )
    definition: Definition = Field(
        default="paper", description="paper: weights count after the election of signs. mergekit: before it."
    )

    paper: ClassVar[str] = "TIES-Merging, arXiv 2306.01708"
    example: ClassVar[str] = (
        "method: ties\nbase: models/base\nmodels: [models/code, models/math]\ndensity: 0.2\noutput: {path: out/ties}"
    )

    def merged(self, base: Checkpoint, models: Sequence[Checkpoint], weights: Sequence[float]) -> Checkpoint:
        studies = self._study(base, models) if self.trim == "model" else None
        election: Literal["plain", "weighted"] = "plain" if self.definition == "paper" else "weighted"

        def merge(name: str, tensors: Sequence[Expression]) -> Expression:
            *tuned, origin = tensors
            kept = Mask(reaching=max(1, int(self.density * origin.size)))
            return mixed(
                origin,
                [Model(tensor, weight, kept) for tensor, weight in zip(tuned, weights, strict=True)],
                promote(frozenset(tensor.dtype for tensor in tensors)),
                scale=self.scale,
                elect=election,
                normalize=True,
                study=(studies[0], studies[1][name]) if studies else None,
            )

        return fine_tunes_merged(models, base, merge, [*weights, 1.0])

    def _study(self, base: Checkpoint, models: Sequence[Checkpoint]) -> tuple[Study, Mapping[str, int]]:
        """The largest changes of the whole model."""
        tensors = {
            name: (tensor, [model.tensors[name] for model in models])
            for name, tensor in base.tensors.items()
            if DTYPES[tensor.dtype].is_float and all(name in model.tensors for model in models)
        }
        if any(True for own, others in tensors.values() for tensor in (own, *others) for _ in tensor.measures()):
            raise UnsupportedModel(
                "what is measured already cannot be trimmed as one model on the fly",
                where="trim",
                remedy="Run the inner recipe into a folder of its own first.",
            )
        return trimmed_together(tensors, self.density)


class Dare(OnBase):
    """DARE: a random share of each fine-tune's changes is dropped, and the rest made larger to stand in for them."""

    method: Literal["dare"] = "dare"
    density: float = Field(
        default=0.5, gt=0, le=1, description="The share of changes that is kept: 1 - p of the paper."
    )
    elect: bool = Field(default=False, description="Whether signs are elected, as in TIES.")
    scale: float = Field(default=1.0, description=_SCALE)
    seed: int = Field(default=0, ge=0, description=_SEED)
    definition: Definition = Field(
        default="paper",
        description="paper: what is left is divided by the density. mergekit: brought to the sum of magnitudes that "
        "there was.",
    )

    paper: ClassVar[str] = "Language models are super Mario, arXiv 2311.03099"
    example: ClassVar[str] = (
        "method: dare\nbase: models/base\nmodels: [models/code, models/math]\ndensity: 0.3\noutput: {path: out/dare}"
    )

    def merged(self, base: Checkpoint, models: Sequence[Checkpoint], weights: Sequence[float]) -> Checkpoint:
        def merge(name: str, tensors: Sequence[Expression]) -> Expression:
            *tuned, origin = tensors
            masks = [
                Mask(least=self.density, most=self.density, key=key_of(self.seed, f"{name}\0{i}"))
                for i in range(len(tuned))
            ]
            return mixed(
                origin,
                [Model(*entry) for entry in zip(tuned, weights, masks, strict=True)],
                promote(frozenset(tensor.dtype for tensor in tensors)),
                scale=self.scale / (self.density if self.definition == "paper" else 1.0),
                elect="weighted" if self.elect else None,
                factors="one" if self.definition == "paper" else "magnitudes",
            )

        return fine_tunes_merged(models, base, merge, [*weights, 1.0])


class Della(OnBase):
    """DELLA: changes are dropped at random, the larger ones of a row less often, and the rest made larger to stand in
    for them.
    """

    method: Literal["della"] = "della"
    density: float = Field(default=0.5, gt=0, le=1, description="The share of changes that is kept.")
    epsilon: float = Field(
        default=0.15,
        ge=0,
        lt=1,
        description="How far the probabilities of a row go apart: in all in the paper, either way in mergekit.",
    )
    elect: bool = Field(default=True, description="Whether signs are elected, as in TIES.")
    scale: float = Field(default=1.0, description=_SCALE)
    seed: int = Field(default=0, ge=0, description=_SEED)
    definition: Definition = Field(
        default="paper",
        description="paper: each change that is left is divided by its own probability, and weights count after the "
        "election. mergekit: they are brought to the sum of magnitudes that there was, weights count before it.",
    )

    paper: ClassVar[str] = "DELLA-Merging, arXiv 2406.11617"
    example: ClassVar[str] = (
        "method: della\nbase: models/base\nmodels: [models/code, models/math]\ndensity: 0.5\nepsilon: 0.1\n"
        "output: {path: out/della}"
    )

    def merged(self, base: Checkpoint, models: Sequence[Checkpoint], weights: Sequence[float]) -> Checkpoint:
        if self.definition == "mergekit":
            count = len(models)
            each = {"weight": weights, "density": (self.density,) * count, "epsilon": (self.epsilon,) * count}
            rule = RULES["della" if self.elect else "della_linear"]
            return by_rule(rule, models, base, {"lambda": self.scale}, each, self.seed)
        least, most = self._span()

        def merge(name: str, tensors: Sequence[Expression]) -> Expression:
            *tuned, origin = tensors
            keys = [key_of(self.seed, f"{name}\0{i}") for i in range(len(tuned))]
            masks = [Mask(least=least, most=most, key=key, divided=True) for key in keys]
            return mixed(
                origin,
                [Model(*entry) for entry in zip(tuned, weights, masks, strict=True)],
                promote(frozenset(tensor.dtype for tensor in tensors)),
                scale=self.scale / (1.0 if least < most else self.density),
                elect="plain" if self.elect else None,
                normalize=self.elect,
            )

        return fine_tunes_merged(models, base, merge, [*weights, 1.0])

    def _span(self) -> tuple[float, float]:
        """The probabilities of the smallest and the largest change of a row. Raises RecipeError."""
        if self.density == 1.0:
            return 1.0, 1.0
        least, most = self.density - self.epsilon / 2, self.density + self.epsilon / 2
        if least <= 0 or most > 1:
            problem = f"density {self.density:g} and epsilon {self.epsilon:g}: probabilities from {least:g} to {most:g}"
            raise RecipeError(problem, where="epsilon", remedy="They must lie above 0 and at most be 1.")
        return least, most


class Breadcrumbs(OnBase):
    """Model Breadcrumbs: neither the smallest nor the very largest changes of each tensor, summed."""

    method: Literal["breadcrumbs"] = "breadcrumbs"
    density: float = Field(default=0.9, gt=0, le=1, description="The share of changes that is kept.")
    gamma: float = Field(default=0.01, ge=0, lt=1, description="The share of the largest that is dropped.")
    elect: bool = Field(default=False, description="Whether signs are elected, as in TIES.")
    scale: float = Field(default=1.0, description=_SCALE)

    paper: ClassVar[str] = "Model Breadcrumbs, arXiv 2312.06795"
    example: ClassVar[str] = (
        "method: breadcrumbs\nbase: models/base\nmodels: [models/code, models/math]\ndensity: 0.85\n"
        "output: {path: out/breadcrumbs}"
    )

    def merged(self, base: Checkpoint, models: Sequence[Checkpoint], weights: Sequence[float]) -> Checkpoint:
        count = len(models)
        each = {"weight": weights, "density": (self.density,) * count, "gamma": (self.gamma,) * count}
        rule = RULES["breadcrumbs_ties" if self.elect else "breadcrumbs"]
        return by_rule(rule, models, base, {"lambda": self.scale}, each)


class Sce(OnBase):
    """SCE: the weights that vary most over the fine-tunes, each fine-tune by its share of the squares, minority signs
    erased.
    """

    method: Literal["sce"] = "sce"
    select: float = Field(default=1.0, gt=0, le=1, description="The share of weights, of those that vary, to select.")

    paper: ClassVar[str] = "FuseChat, arXiv 2408.07990"
    example: ClassVar[str] = (
        "method: sce\nbase: models/base\nmodels: [models/code, models/math]\nselect: 0.1\noutput: {path: out/sce}"
    )

    def merged(self, base: Checkpoint, models: Sequence[Checkpoint], weights: Sequence[float]) -> Checkpoint:
        if set(weights) != {1.0}:
            raise RecipeError("are found by SCE itself: leave them out", where="models: weight")
        return by_rule(RULES["sce"], models, base, {"select_topk": self.select}, {})

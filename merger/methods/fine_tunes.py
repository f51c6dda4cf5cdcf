"""Sums of fine-tunes of one model: task arithmetic and what is written with it.

Knows the formulas' weights and what must hold before they mean anything; the arithmetic is elsewhere.

Weights of fine-tunes of one model may be added because training from one point leaves them in one basin of the loss
(Neyshabur et al. 2020, arXiv 2008.11687). Models of different origin have no such thing in common, though their shapes
may fit: what tells them apart is refused here, or in `merger.preflight` where only their values tell.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Union

from pydantic import BaseModel, ConfigDict, Discriminator, Field, SerializeAsAny, Tag, field_validator

from merger import configs
from merger.architecture import changes_function, differences
from merger.checkpoint import Checkpoint, Kin
from merger.errors import IncompatibleSources, NotInstalled, RecipeError, UnsupportedModel
from merger.methods.combination import weighted_sum
from merger.methods.method import Method, Source, Sources, open_all, open_source


class Weighted(BaseModel):
    """A model and the weight with which it counts."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    source: Source = Field(description="The model, or a recipe that makes it.")
    weight: float = Field(default=1.0, description="Its weight; a negative one takes away what the model has learnt.")


def _kind_of_entry(value: object) -> str:
    if isinstance(value, str):
        return "reference"
    return (
        "weighted" if isinstance(value, Weighted) or (isinstance(value, dict) and "method" not in value) else "recipe"
    )


Entry = Annotated[
    Union[
        Annotated[str, Tag("reference")],
        Annotated[SerializeAsAny[Method], Tag("recipe")],
        Annotated[Weighted, Tag("weighted")],
    ],
    Discriminator(_kind_of_entry),
]
Entries = Annotated[
    Union[Annotated[str, Tag("pattern")], Annotated[list[Entry], Tag("list")]],
    Discriminator(lambda value: "pattern" if isinstance(value, str) else "list"),
]


def opened(
    sources: Sources, entries: "str | Sequence[str | Method | Weighted]"
) -> tuple[list[Checkpoint], list[float]]:
    """The models that a pattern or a list names, and their weights (1 where none is given). Raises RequestError."""
    if isinstance(entries, str):
        models = open_all(sources, entries)
        return models, [1.0] * len(models)
    pairs = [(entry.source, entry.weight) if isinstance(entry, Weighted) else (entry, 1.0) for entry in entries]
    return [open_source(sources, source) for source, _ in pairs], [weight for _, weight in pairs]


def sum_of_fine_tunes(
    models: Sequence[Checkpoint], weights: Sequence[float], base: Checkpoint | None = None, base_weight: float = 0.0
) -> Checkpoint:
    """The sum of weight * model, and of the base where it counts; config and side files come from the first model.

    Raises IncompatibleSources where a config tells that the models do not stem from one.
    """
    for other in [*models[1:], *([base] if base else [])]:
        check_function(models[0], other)
    terms = [(model, weight) for model, weight in zip(models, weights, strict=True) if weight != 0.0]
    terms += [(base, base_weight)] if base and base_weight != 0.0 else []
    if not terms:
        raise RecipeError("every weight is zero", where="models")
    made = weighted_sum([model for model, _ in terms], [weight for _, weight in terms])
    kin = Kin(tuple(models), base)
    return replace(made.with_side_files_of(models[0]), kin=(*made.kin, kin))


def check_function(first: Checkpoint, other: Checkpoint) -> None:
    """See that two configs, every default written out, describe one function of the weights."""
    if first.config is None or other.config is None:
        return
    odd = [key for key in differences(first.config, other.config) if changes_function(key)]
    if not odd:
        return
    try:
        a, b = (configs.resolved(model.config, model.label) for model in (first, other))
        found = {key: pair for key, pair in differences(a, b).items() if changes_function(key)}
    except (NotInstalled, UnsupportedModel):  # a family of its own: what both configs state counts
        found = {k: v for k, v in differences(first.config, other.config).items() if k in odd and None not in v}
    if found:
        key, (a_value, b_value) = next(iter(found.items()))
        raise IncompatibleSources(
            f"{key} is {a_value!r} in {first.label} and {b_value!r} in {other.label}: they do not stem from one model",
            where="config.json",
            remedy="Only fine-tunes of one model can be added. Leave the odd one out.",
        )


# ---- the methods --------------------------------------------------------------------------------------


class TaskArithmetic(Method):
    """Task arithmetic: the base plus the weighted differences of fine-tunes from it; negative weights unlearn."""

    method: Literal["task_arithmetic"] = "task_arithmetic"
    base: Source = Field(description="The model that all fine-tunes started from.")
    models: Entries = Field(description="The fine-tunes: a pattern, or a list of models with or without a `weight`.")
    scale: float = Field(default=1.0, description="A factor for all differences (lambda of the paper).")

    paper: ClassVar[str] = "Editing models with task arithmetic, arXiv 2212.04089"
    example: ClassVar[str] = (
        "method: task_arithmetic\nbase: models/base\nmodels:\n  - {source: models/code, weight: 0.6}\n"
        "  - {source: models/toxic, weight: -0.3}\noutput: {path: out/arithmetic}"
    )

    def build(self, sources: Sources) -> Checkpoint:
        base = open_source(sources, self.base)
        models, weights = opened(sources, self.models)
        scaled = [self.scale * weight for weight in weights]
        return sum_of_fine_tunes(models, scaled, base, 1.0 - sum(scaled))


class WiseFt(Method):
    """WiSE-FT: a model on the line from the base to its fine-tune; often more robust than either."""

    method: Literal["wise_ft"] = "wise_ft"
    base: Source = Field(description="The model before fine-tuning.")
    fine_tuned: Source = Field(description="The model after it.")
    alpha: float = Field(default=0.5, description="0 is the base, 1 the fine-tune; beyond either is allowed.")

    paper: ClassVar[str] = "Robust fine-tuning of zero-shot models, arXiv 2109.01903"
    example: ClassVar[str] = (
        "method: wise_ft\nbase: models/base\nfine_tuned: models/tuned\nalpha: 0.5\noutput: {path: out/wise}"
    )

    def build(self, sources: Sources) -> Checkpoint:
        base, tuned = open_source(sources, self.base), open_source(sources, self.fine_tuned)
        return sum_of_fine_tunes([tuned], [self.alpha], base, 1.0 - self.alpha)


class Interpolate(Method):
    """A model on the line between two models, or beyond it."""

    method: Literal["interpolate"] = "interpolate"
    sources: list[Source] = Field(min_length=2, max_length=2, description="The two models, of one origin.")
    t: float = Field(default=0.5, description="0 is the first model, 1 the second.")

    paper: ClassVar[str] = "Linear mode connectivity and the lottery ticket hypothesis, arXiv 1912.05671"
    example: ClassVar[str] = "method: interpolate\nsources: [models/a, models/b]\nt: 0.3\noutput: {path: out/between}"

    def build(self, sources: Sources) -> Checkpoint:
        models = [open_source(sources, source) for source in self.sources]
        return sum_of_fine_tunes(models, [1.0 - self.t, self.t])


class RewardedSoup(Method):
    """Rewarded soup: fine-tunes for different rewards, summed by how much each reward is preferred."""

    method: Literal["rewarded_soup"] = "rewarded_soup"
    models: list[Weighted] = Field(min_length=2, description="Each fine-tune with the weight of its reward, 0 to 1.")

    paper: ClassVar[str] = "Rewarded soups, arXiv 2306.04488"
    example: ClassVar[str] = (
        "method: rewarded_soup\nmodels:\n  - {source: models/helpful, weight: 0.7}\n"
        "  - {source: models/harmless, weight: 0.3}\noutput: {path: out/rewarded}"
    )

    @field_validator("models")
    @classmethod
    def _on_the_simplex(cls, models: list[Weighted]) -> list[Weighted]:
        weights = [model.weight for model in models]
        if min(weights) < 0 or abs(sum(weights) - 1.0) > 1e-6:
            raise ValueError(f"the weights are preferences: none below 0, and they sum to 1, not {sum(weights):g}")
        return models

    def build(self, sources: Sources) -> Checkpoint:
        return sum_of_fine_tunes(*opened(sources, self.models))

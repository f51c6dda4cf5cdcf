"""The recipes of the averaging family.

Knows their fields and where their weights come from; the arithmetic is elsewhere.
"""

import re
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from merger.checkpoint import Checkpoint
from merger.errors import RecipeError
from merger.evaluation import Alignment, Measured
from merger.methods import coefficients
from merger.methods.alignment import AlignExperts
from merger.methods.combination import weighted_sum
from merger.methods.method import Checkpoints, Choice, Means, Member, Method, Sources

Fraction = Annotated[float, Field(gt=0, lt=1)]
SigmaRel = Annotated[float, Field(gt=0.005, lt=coefficients.MAX_SIGMA_REL)]


class Averaging(Method):
    """A weighted sum of the checkpoints of a run, with weights that follow from their steps."""

    checkpoints: Checkpoints = Field(
        description="A pattern such as runs/tiny/step-*, taken in natural order, "
        "or a list of models and recipes, oldest first."
    )
    steps: list[int] | None = Field(
        default=None, description="The training step of each checkpoint, where the names do not end in it."
    )

    #: Whether the checkpoints must be the stations of one run, in order.
    is_ordered: ClassVar[bool] = True

    @abstractmethod
    def weights(self, steps: Sequence[int]) -> coefficients.Weights:
        """One weight a checkpoint; they sum to 1. Raises ValueError where the checkpoints do not allow it."""

    def build(self, sources: Sources) -> Checkpoint:
        members = sources.members(self.checkpoints)
        steps, known = steps_of(members, self.steps, is_ordered=self.is_ordered)
        try:
            weights = self.weights(steps)
        except ValueError as error:
            raise RecipeError(str(error), where=self.method) from error
        chosen = [(member, weight) for member, weight in zip(members, weights, strict=True) if weight != 0.0]
        result = weighted_sum([sources.open(member) for member, _ in chosen], [weight for _, weight in chosen])
        if self.is_ordered and not known:
            note = "the names do not tell the training steps: the checkpoints count as 1, 2, 3, ... in their order"
            return result.noting(note)
        return result


def steps_of(
    members: Sequence[Member], given: Sequence[int] | None, *, is_ordered: bool
) -> tuple[tuple[int, ...], bool]:
    """The steps of the members, and whether they are known: those given, else those of their names, else 1, 2, 3, ...

    Raises RecipeError where their number is wrong, or where they must increase and do not.
    """
    if given is not None and len(given) != len(members):
        raise RecipeError(f"has {len(given)} entries for {len(members)} checkpoints", where="steps")
    found = list(given) if given is not None else [member.step for member in members]
    steps = [step for step in found if step is not None]
    if len(steps) < len(members):
        return tuple(range(1, len(members) + 1)), False
    for (a, b), member in zip(pairwise(steps), members[1:], strict=False):
        if is_ordered and b <= a:
            raise RecipeError(
                f"{member} is at step {b}, after step {a}: checkpoints of a run come oldest first, each step once",
                where="checkpoints",
                remedy="Put them in order, narrow the pattern, or state `steps`.",
            )
    return tuple(steps), True


class Average(Averaging):
    """The mean of checkpoints, or their sum with given weights."""

    method: Literal["average"] = "average"
    weights_: list[float] | None = Field(
        default=None, alias="weights", description="One weight a checkpoint; uniform without."
    )
    normalize: bool = Field(default=True, description="Divide the weights by their sum.")
    align_experts: bool = Field(
        default=False,
        description="Of mixtures that were trained apart: bring the experts of each into the first's order first.",
    )

    paper: ClassVar[str] = "Model soups, arXiv 2203.05482"
    example: ClassVar[str] = (
        "method: average\ncheckpoints: [models/a, models/b, models/c]\n"
        "weights: [0.5, 0.3, 0.2]\noutput: {path: out/average}"
    )
    is_ordered: ClassVar[bool] = False

    def evaluations(self) -> tuple[Measured, ...]:
        return (Alignment(),) if self.align_experts else ()

    def chosen(self, means: Means) -> tuple[Method, tuple[Choice, ...]]:
        if not self.align_experts:
            return self, ()
        first, *others = (member.origin for member in means.sources.members(self.checkpoints))
        aligned = [AlignExperts(source=other, like=first).chosen(means)[0] for other in others]
        return self.model_copy(update={"checkpoints": [first, *aligned], "align_experts": False}), ()

    def build(self, sources: Sources) -> Checkpoint:
        if not self.align_experts:
            return super().build(sources)
        first, *others = (member.origin for member in sources.members(self.checkpoints))
        aligned = [AlignExperts(source=other, like=first) for other in others]
        return self.model_copy(update={"checkpoints": [first, *aligned], "align_experts": False}).build(sources)

    def weights(self, steps: Sequence[int]) -> coefficients.Weights:
        given = self.weights_ if self.weights_ is not None else [1.0] * len(steps)
        if len(given) != len(steps):
            raise ValueError(f"{len(given)} weights were given for {len(steps)} checkpoints")
        return coefficients.normalized(given) if self.normalize else tuple(given)


class Swa(Averaging):
    """Stochastic weight averaging: the mean of the checkpoints from a step on."""

    method: Literal["swa"] = "swa"
    start: int | str = Field(
        default="75%", description="The first step that counts, or a share of the last step as in 75%."
    )
    every: int | None = Field(
        default=None, ge=1, description="Take only steps that are a multiple of this after the start."
    )

    paper: ClassVar[str] = "Averaging weights leads to wider optima, arXiv 1803.05407"
    example: ClassVar[str] = "method: swa\ncheckpoints: runs/tiny/step-*\nstart: 50%\noutput: {path: out/swa}"

    @field_validator("start")
    @classmethod
    def _step_or_share(cls, start: int | str) -> int | str:
        if isinstance(start, str) and start.isdigit():
            return int(start)
        if isinstance(start, str) and not re.fullmatch(r"\d{1,2}(\.\d+)?%|100%", start):
            raise ValueError("must be a step, or a share of the last step such as 75%")
        return start

    def weights(self, steps: Sequence[int]) -> coefficients.Weights:
        if isinstance(self.start, int):
            return coefficients.swa(steps, self.start, self.every)
        share = float(self.start.rstrip("%")) / 100
        first = next(step for step in steps if step >= share * steps[-1])
        return coefficients.swa(steps, first, self.every)


class Ema(Averaging):
    """An exponential moving average over the checkpoints, with decays that follow their spacing on request."""

    method: Literal["ema"] = "ema"
    decay: Fraction = Field(description="How much of the average stays when the next checkpoint comes in.")
    decay_steps: int | None = Field(
        default=None,
        ge=1,
        description="The training steps that `decay` stands for: "
        "a gap of g steps then decays by decay^(g / decay_steps). "
        "Without it every checkpoint counts as one, whatever the spacing.",
    )
    bias_correction: bool = Field(
        default=False,
        description="Start from zero and divide by what has been gathered, instead of from the first checkpoint.",
    )
    warmup: Literal["none", "ratio", "power"] = Field(
        default="none",
        description="Smaller decays at first: ratio is (1 + t) / (10 + t), power is 1 - (1 + t / inv_gamma)^-power.",
    )
    inv_gamma: float = Field(default=1.0, gt=0, description="For warmup: power.")
    power: float = Field(default=2 / 3, gt=0, description="For warmup: power.")

    paper: ClassVar[str] = "How to scale your EMA, arXiv 2307.13813; warm-ups as in timm and diffusers"
    example: ClassVar[str] = "method: ema\ncheckpoints: runs/tiny/step-*\ndecay: 0.8\noutput: {path: out/ema}"

    def weights(self, steps: Sequence[int]) -> coefficients.Weights:
        return coefficients.ema(steps, self._decay_at, bias_correction=self.bias_correction)

    def _decay_at(self, t: int, gap: int) -> float:
        decay = float(self.decay ** (gap / self.decay_steps)) if self.decay_steps else self.decay
        if self.warmup == "ratio":
            return min(decay, (1 + t) / (10 + t))
        if self.warmup == "power":
            return min(decay, 1 - float((1 + t / self.inv_gamma) ** -self.power))
        return decay


class Lawa(Averaging):
    """Latest weight averaging: the mean of exactly the k newest checkpoints."""

    method: Literal["lawa"] = "lawa"
    k: int = Field(default=6, ge=1, description="How many checkpoints.")
    interval: int | None = Field(
        default=None, ge=1, description="How many training steps they are apart; consecutive without."
    )
    end: int | None = Field(default=None, description="The step of the newest that counts; the last without.")

    paper: ClassVar[str] = "Stop wasting my time, arXiv 2209.14981; Early weight averaging, arXiv 2306.03241"
    example: ClassVar[str] = "method: lawa\ncheckpoints: runs/tiny/step-*\nk: 6\noutput: {path: out/lawa}"

    def weights(self, steps: Sequence[int]) -> coefficients.Weights:
        return coefficients.lawa(steps, self.k, self.interval, self.end)


def _gamma(sigma_rel: float | None, gamma: float | None) -> float:
    return gamma if gamma is not None else coefficients.gamma_of(sigma_rel or coefficients.MAX_SIGMA_REL)


class PowerEma(Averaging):
    """A power-function EMA: its width grows with the training, sampled at the checkpoints."""

    method: Literal["power_ema"] = "power_ema"
    sigma_rel: SigmaRel | None = Field(
        default=None, description="Width of the average relative to the training so far, such as 0.1."
    )
    gamma: float | None = Field(default=None, ge=0, description="The exponent itself, instead of sigma_rel.")

    paper: ClassVar[str] = "Analyzing and improving the training dynamics of diffusion models, arXiv 2312.02696"
    example: ClassVar[str] = (
        "method: power_ema\ncheckpoints: runs/tiny/step-*\nsigma_rel: 0.1\noutput: {path: out/power-ema}"
    )

    @model_validator(mode="after")
    def _one_width(self) -> Self:
        if (self.sigma_rel is None) == (self.gamma is None):
            raise ValueError("needs exactly one of sigma_rel and gamma")
        return self

    def weights(self, steps: Sequence[int]) -> coefficients.Weights:
        return coefficients.power_ema(steps, _gamma(self.sigma_rel, self.gamma))


class Pma(Averaging):
    """Pre-trained model averaging: the newest n checkpoints of a stable phase, equally spaced."""

    method: Literal["pma"] = "pma"
    n: int | None = Field(default=None, ge=1, description="How many of the newest checkpoints; all without.")
    weighting: Literal["uniform", "linear", "ema"] = Field(
        default="uniform", description="SMA, WMA or EMA of the paper."
    )
    alpha: Fraction = Field(default=0.2, description="For weighting: ema, the weight of each newer checkpoint.")

    paper: ClassVar[str] = "Model merging in pre-training of large language models, arXiv 2505.12082"
    example: ClassVar[str] = (
        "method: pma\ncheckpoints: runs/tiny/step-*\nn: 10\nweighting: linear\noutput: {path: out/pma}"
    )

    def weights(self, steps: Sequence[int]) -> coefficients.Weights:
        n = self.n or len(steps)
        if n > len(steps):
            raise ValueError(f"n={n} needs {n} checkpoints; there are {len(steps)}")
        return (0.0,) * (len(steps) - n) + coefficients.pma(n, self.weighting, self.alpha)


class Wsm(Averaging):
    """Warmup-stable and merge: the average that stands in for a decay of the learning rate over the checkpoints."""

    method: Literal["wsm"] = "wsm"
    decay: Literal["linear", "cosine", "sqrt"] = Field(
        default="linear", description="The decay that is replaced; linear is the plain mean."
    )
    n: int | None = Field(default=None, ge=1, description="How many of the newest checkpoints; all without.")

    paper: ClassVar[str] = "WSM: decay-free learning rate schedule via checkpoint merging, arXiv 2507.17634"
    example: ClassVar[str] = "method: wsm\ncheckpoints: runs/tiny/step-*\ndecay: sqrt\noutput: {path: out/wsm}"

    def weights(self, steps: Sequence[int]) -> coefficients.Weights:
        n = self.n or len(steps)
        if n > len(steps):
            raise ValueError(f"n={n} needs {n} checkpoints; there are {len(steps)}")
        return (0.0,) * (len(steps) - n) + coefficients.wsm(n, self.decay)


class Track(BaseModel):
    """Snapshots of one power-function EMA that was kept during training."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    sigma_rel: SigmaRel = Field(description="The width that was tracked.")
    checkpoints: Checkpoints
    steps: list[int] | None = None


class PosthocEma(Method):
    """Post-hoc EMA: an average of any width, rebuilt after training from snapshots of two tracked ones."""

    method: Literal["posthoc_ema"] = "posthoc_ema"
    tracks: list[Track] = Field(min_length=1, description="What was tracked: sigma_rel and checkpoints of each.")
    sigma_rel: SigmaRel = Field(description="The width that is wanted.")
    step: int | None = Field(default=None, description="The step at which it is wanted; the last snapshot's without.")

    paper: ClassVar[str] = (
        "Analyzing and improving the training dynamics of diffusion models, arXiv 2312.02696, section 3"
    )
    example: ClassVar[str] = (
        "method: posthoc_ema\ntracks:\n"
        "  - {sigma_rel: 0.05, checkpoints: runs/tiny/ema-0.05/step-*}\n"
        "  - {sigma_rel: 0.10, checkpoints: runs/tiny/ema-0.10/step-*}\n"
        "sigma_rel: 0.07\noutput: {path: out/posthoc}"
    )

    def build(self, sources: Sources) -> Checkpoint:
        members: list[Member] = []
        steps: list[int] = []
        gammas: list[float] = []
        for track in self.tracks:
            found = sources.members(track.checkpoints)
            at, known = steps_of(found, track.steps, is_ordered=True)
            if not known:
                raise RecipeError(
                    "the steps of the snapshots must be known",
                    where="tracks",
                    remedy="State `steps` in each track.",
                )
            members += found
            steps += at
            gammas += [coefficients.gamma_of(track.sigma_rel)] * len(found)
        target = self.step if self.step is not None else max(steps)
        try:
            weights = coefficients.posthoc_ema(steps, gammas, target, coefficients.gamma_of(self.sigma_rel))
        except ValueError as error:
            raise RecipeError(str(error), where=self.method) from error
        return weighted_sum([sources.open(member) for member in members], weights)

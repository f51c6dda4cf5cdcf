"""Averages of fine-tunes, chosen by what they score where the recipe asks for it.

Knows what each of these methods is made of; how models are chosen is elsewhere.
"""

import re
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from merger.baklava import Baklava
from merger.checkpoint import Checkpoint
from merger.errors import RecipeError, SourceError, UnsupportedModel
from merger.evaluation import Chooser, Harness, Measured
from merger.methods.fine_tunes import check_function, sum_of_fine_tunes
from merger.methods.method import Checkpoints, Choice, Means, Method, Source, Sources, open_all, open_source
from merger.methods.selection import greedy, learned
from merger.recycling import Recycling
from merger.stages import Training
from merger.tasks import package_of


class Selecting(Method):
    """The mean of models of which some may be left out, or count for more than others."""

    selection: Literal["uniform", "greedy", "learned"] = Field(
        default="uniform",
        description="uniform: all. greedy: from the best on, each that leaves the mean at least as good (`>=`). "
        "learned: with the weights that gradient descent finds.",
    )
    select_on: Chooser | None = Field(
        default=None, description="By what models are chosen: held-out data, others than those of `evaluate`."
    )
    learning_steps: int = Field(
        default=20, ge=1, description="Steps of `selection: learned`, each a pass over `select_on`, forward and back."
    )
    weights: list[Annotated[float, Field(ge=0)]] | None = Field(
        default=None, description="With `selection: uniform`: how much each model counts; equally without."
    )

    #: The field that holds the models.
    candidates: ClassVar[str] = "models"

    @model_validator(mode="after")
    def _data_to_choose_by(self) -> Self:
        if self.selection != "uniform" and self.select_on is None:
            raise ValueError(f"selection: {self.selection} chooses by a score: say in `select_on` by which")
        if self.selection != "uniform" and self.weights is not None:
            raise ValueError(f"selection: {self.selection} finds the weights itself: leave `weights` out")
        if self.selection == "learned" and isinstance(self.select_on, Harness):
            raise ValueError("selection: learned follows the gradient of a loss, which tasks of the harness have not")
        if self.weights is not None and not sum(self.weights):
            raise ValueError("all `weights` are zero")
        return self

    def evaluations(self) -> tuple[Measured, ...]:
        return (self.select_on,) if self.select_on and self.selection != "uniform" else ()

    def chosen(self, means: Means) -> tuple[Method, tuple[Choice, ...]]:
        if not self.evaluations() or self.select_on is None:
            return self, ()
        models = [member.origin for member in means.sources.members(getattr(self, self.candidates))]
        if self.selection == "greedy":
            kept, weights, choice = greedy(models, _mean, self.select_on, means.judge)
        else:
            kept, weights, choice = learned(models, _mean, self.select_on, means.judge, self.learning_steps)
        made = {self.candidates: kept, "weights": weights, "selection": "uniform", "select_on": None}
        return self.model_copy(update=made), (choice,)

    def mean(self, models: Sequence[Checkpoint], base: Checkpoint | None = None) -> Checkpoint:
        """The mean of all; where some will be left out, the plan says that it is not known yet which."""
        weights = self.weights or [1.0] * len(models)
        if len(weights) != len(models):
            raise RecipeError(f"are {len(weights)} for {len(models)} models", where="weights")
        made = sum_of_fine_tunes(models, [weight / sum(weights) for weight in weights], base)
        if not self.evaluations():
            return made
        return made.noting(f"this is the mean of all {len(models)}: what enters is chosen by score in the run")


def _mean(models: Sequence[str | Method], weights: list[float] | None) -> Method:
    return Soup(models=list(models), weights=weights)


# ---- the methods --------------------------------------------------------------------------------------


class Soup(Selecting):
    """The mean of fine-tunes of one model: of all of them, of those that do not lower the score (greedy), or with
    learned weights.
    """

    method: Literal["soup"] = "soup"
    models: Checkpoints = Field(description="The fine-tunes: a pattern or a list.")

    paper: ClassVar[str] = "Model soups, arXiv 2203.05482"
    example: ClassVar[str] = (
        "method: soup\nmodels: runs/tuned-*\nselection: greedy\n"
        "select_on: {task: text, data: data/validation.txt}\noutput: {path: out/soup}"
    )

    def build(self, sources: Sources) -> Checkpoint:
        return self.mean(open_all(sources, self.models))


class Ratatouille(Selecting):
    """Model Ratatouille: the mean of target fine-tunes that started from different auxiliary fine-tunes of one base."""

    method: Literal["ratatouille"] = "ratatouille"
    base: Source = Field(description="The pre-trained model that everything started from.")
    auxiliary: Checkpoints = Field(default=[], description="Fine-tunes of the base on auxiliary tasks; none is DiWA.")
    targets: Checkpoints = Field(
        default=[],
        description="Fine-tunes on the target task; run s starts from pool[s mod (n+1)], where 0 is the base.",
    )
    training: Recycling | None = Field(
        default=None, description="Instead of `auxiliary` and `targets`: the data of the tasks, to train them from."
    )

    paper: ClassVar[str] = "Model Ratatouille, arXiv 2212.10445"
    example: ClassVar[str] = (
        "method: ratatouille\nbase: models/base\nauxiliary: runs/auxiliary-*\ntargets: runs/target-*\n"
        "output: {path: out/ratatouille}"
    )
    candidates: ClassVar[str] = "targets"

    @model_validator(mode="after")
    def _models_or_data(self) -> Self:
        if bool(self.targets) == bool(self.training):
            raise ValueError("needs either `targets`, models, or `training`, data to make them from")
        if self.training and (self.auxiliary or not isinstance(self.base, str)):
            raise ValueError("`training` makes the auxiliary models itself, from a base that is a stored model")
        return self

    @property
    def trains(self) -> Training | None:
        return self.training

    def starts(self, _sources: Sources) -> list[str]:
        return [self.base] if isinstance(self.base, str) else []

    def chosen(self, means: Means) -> tuple[Method, tuple[Choice, ...]]:
        if self.training is None:
            return super().chosen(means)
        auxiliary, targets = means.trainer.trained(self.training, self.starts(means.sources))
        made = self.model_copy(update={"auxiliary": auxiliary, "targets": targets, "training": None})
        return made.chosen(means)

    def build(self, sources: Sources) -> Checkpoint:
        base = open_source(sources, self.base)
        if self.training:
            check_training(self.training, sources)
            return base.noting(f"{self.training.runs} targets will be trained from it first, and averaged")
        auxiliary = open_all(sources, self.auxiliary) if self.auxiliary else []
        for model in auxiliary:
            check_function(base, model)
        return self.mean(open_all(sources, self.targets), base)


def check_training(training: Training, sources: Sources) -> None:
    """See that the task of a training is installed, and that its data may be read. Raises RequestError."""
    package_of(training.task)
    for path in training.files:
        sources.admit(path)
        if not path.is_file():
            raise SourceError("is not there", where=str(path), remedy="Give the path of the data to train on.")


_REWARD_HEAD = re.compile(r"(^|\.)(score|classifier|reward_head|v_head|value_head)\b")


class Warm(Selecting):
    """WARM: the mean of reward models that were trained from one supervised run with one head."""

    method: Literal["warm"] = "warm"
    models: Checkpoints = Field(default=[], description="The reward models: a pattern or a list.")
    training: Baklava | None = Field(
        default=None, description="Instead of `models`: preferences, and the checkpoints to train them from."
    )

    paper: ClassVar[str] = "WARM: on the benefits of weight averaged reward models, arXiv 2401.12187"
    example: ClassVar[str] = "method: warm\nmodels: runs/reward-*\noutput: {path: out/warm}"

    @model_validator(mode="after")
    def _models_or_data(self) -> Self:
        if bool(self.models) == bool(self.training):
            raise ValueError("needs either `models` or `training`, data to make them from")
        return self

    @property
    def trains(self) -> Training | None:
        return self.training

    def starts(self, sources: Sources) -> list[str]:
        pool = sources.members(self.training.checkpoints) if self.training else ()
        return [str(member) for member in pool]

    def chosen(self, means: Means) -> tuple[Method, tuple[Choice, ...]]:
        if self.training is None:
            return super().chosen(means)
        _, models = means.trainer.trained(self.training, self.starts(means.sources))
        return self.model_copy(update={"models": models, "training": None}).chosen(means)

    def build(self, sources: Sources) -> Checkpoint:
        if self.training:
            return self._supervised(self.training, sources)
        models = open_all(sources, self.models)
        for model in models:
            if not any(_REWARD_HEAD.search(name) for name in model.tensors):
                raise UnsupportedModel(
                    "has no head that gives a reward (score, classifier, v_head)",
                    where=model.label,
                    remedy="WARM averages reward models with their heads; for other models use `soup`.",
                )
        return self.mean(models)

    def _supervised(self, training: Baklava, sources: Sources) -> Checkpoint:
        """The last checkpoint of the supervised run, seen to be of one run with the others."""
        check_training(training, sources)
        pool = open_all(sources, training.checkpoints)
        sum_of_fine_tunes(pool, [1.0 / len(pool)] * len(pool))
        used = min(len(pool), training.runs)
        note = f"{training.runs} reward models will be trained first, from {used} checkpoints, and averaged"
        unused = f"; the other {len(pool) - used} start none: `runs` is smaller" if used < len(pool) else ""
        return pool[-1].noting(note + unused)

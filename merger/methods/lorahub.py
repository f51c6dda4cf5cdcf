"""LoraHub: weights of adapters, found by what their sum scores. Knows what is weighed; measures nothing itself."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from merger.checkpoint import Checkpoint
from merger.errors import NotGoodEnough
from merger.evaluation import Chooser, Measured
from merger.methods.evolution import Bounds, Point, explore
from merger.methods.fine_tunes import Weighted
from merger.methods.lora import Combine, Lora
from merger.methods.method import Checkpoints, Choice, Means, Method, Source, Sources, Tried


class LoraHub(Method):
    """LoraHub: the weights of adapters that score best, found without gradients (CMA-ES) from a few examples."""

    method: Literal["lorahub"] = "lorahub"
    base: Source = Field(description="The model that the adapters belong to.")
    adapters: Checkpoints = Field(description="PEFT folders: a pattern or a list.")
    select_on: Chooser = Field(description="By what sums are compared: examples of the new task.")
    budget: Annotated[int, Field(ge=2)] = Field(default=40, description="How many sums to measure.")
    seed: int = Field(default=0, ge=0, description="The same seed proposes the same sums.")
    bounds: Bounds = Field(default=(-1.5, 1.5), description="Between what each weight lies; all begin at 0.")
    regularisation: float = Field(default=0.05, ge=0, description="What the mean of |weight| costs, in the metric.")
    combine: Combine = Field(
        default="factors", description="factors: summed apart, as in the paper. exact: the sum of the changes."
    )
    write: Literal["model", "adapter"] = Field(
        default="model", description="The base with the sum in it, or the sum alone as an adapter."
    )

    paper: ClassVar[str] = "LoraHub: efficient cross-task generalization via dynamic LoRA composition, arXiv 2307.13269"
    example: ClassVar[str] = (
        "method: lorahub\nbase: models/base\nadapters: adapters/*\n"
        "select_on: {task: text, data: data/few.jsonl}\nwrite: adapter\noutput: {path: out/adapter}"
    )

    @field_validator("bounds")
    @classmethod
    def _around_zero(cls, bounds: Bounds) -> Bounds:
        if not bounds[0] <= 0.0 <= bounds[1] or bounds[0] == bounds[1]:
            raise ValueError(f"0, where the search begins, does not lie between {bounds[0]:g} and {bounds[1]:g}")
        return bounds

    def evaluations(self) -> tuple[Measured, ...]:
        return (self.select_on,)

    def build(self, sources: Sources) -> Checkpoint:
        names = self._names(sources)
        self._sum(names, [1.0 / len(names)] * len(names), "model").build(sources)  # what would be measured
        made = self._sum(names, [1.0 / len(names)] * len(names), self.write).build(sources)
        return made.noting(f"this is the plain mean of all {len(names)}: their weights are searched in the run")

    def _names(self, sources: Sources) -> list[Any]:
        return [member.origin for member in sources.members(self.adapters)]

    def _sum(self, names: Sequence[Any], weights: Sequence[float], write: str) -> Lora:
        """The recipe of a sum; with `write: model` in the base."""
        entries: list[Any] = [Weighted(source=name, weight=weight) for name, weight in zip(names, weights, strict=True)]
        return Lora(adapters=entries, base=self.base if write == "model" else None, combine=self.combine)

    def chosen(self, means: Means) -> tuple[Method, tuple[Choice, ...]]:
        names = self._names(means.sources)
        places = [str(i) for i in range(len(names))]
        by, sign = self.select_on.by, 1.0 if self.select_on.lower_is_better else -1.0
        rows: list[tuple[list[float], Any, float]] = []

        def measure(points: Sequence[Point]) -> list[float]:
            weights = [[point[place] for place in places] for point in points]
            scores = means.judge.scores([self._sum(names, some, "model") for some in weights], self.select_on)
            costs = [sign * score.metrics[by] + self._cost(some) for score, some in zip(scores, weights, strict=True)]
            rows.extend((some, score.metrics, cost) for some, score, cost in zip(weights, scores, costs, strict=True))
            return costs

        explore(dict.fromkeys(places, self.bounds), dict.fromkeys(places, 0.0), self.budget, self.seed, measure)
        best = min(range(len(rows)), key=lambda i: (rows[i][2], i))
        if self.write == "adapter" and not any(rows[best][0]):
            raise NotGoodEnough(f"no sum of the adapters has a better {by} than the base alone", where="lorahub")
        steps = tuple(Tried(_told(some), metrics, i == best) for i, (some, metrics, _) in enumerate(rows))
        return self._sum(names, rows[best][0], self.write), (Choice("LoraHub", by, steps[:1], steps[1:]),)

    def _cost(self, weights: Sequence[float]) -> float:
        return self.regularisation * sum(map(abs, weights)) / len(weights)


def _told(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:g}" for weight in weights)

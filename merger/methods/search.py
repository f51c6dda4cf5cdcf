"""Search over the numbers of a recipe for those whose result scores best.

Knows a recipe's fields as places that hold numbers; how candidates are measured is elsewhere.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SerializeAsAny, model_validator

from merger.checkpoint import Checkpoint
from merger.evaluation import Chooser, Measured
from merger.methods.evolution import Bounds, explore
from merger.methods.method import Choice, Means, Method, Sources, Tried, is_open


class Search(Method):
    """The best of a recipe's variants: its numbers are searched with CMA-ES, one alone on an even grid."""

    method: Literal["search"] = "search"
    recipe: SerializeAsAny[Method] = Field(description="The recipe; the search begins at its numbers.")
    parameters: dict[str, Bounds] = Field(
        min_length=1, description="Which numbers, between what, as in {scale: [0, 1.5], 'models[0].weight': [0, 1]}."
    )
    select_on: Chooser = Field(description="By what variants are compared: other data than those of `evaluate`.")
    budget: Annotated[int, Field(ge=2)] = Field(default=40, description="How many variants to measure.")
    seed: int = Field(default=0, ge=0, description="The same seed proposes the same variants.")

    paper: ClassVar[str] = "Evolutionary optimization of model merging recipes, arXiv 2403.13187"
    example: ClassVar[str] = (
        "method: search\nrecipe: {method: wise_ft, base: models/base, fine_tuned: models/tuned}\n"
        "parameters: {alpha: [0, 1]}\nselect_on: {task: text, data: data/validation.txt}\n"
        "budget: 11\noutput: {path: out/best}"
    )

    @model_validator(mode="after")
    def _places_of_numbers(self) -> Self:
        if is_open(self.recipe):
            raise ValueError("the recipe within has choices of its own to make: search over a recipe without")
        content = _content(self.recipe)
        for place, (low, high) in self.parameters.items():
            found = _get(content, place)
            if isinstance(found, bool) or not isinstance(found, int | float):
                raise ValueError(f"{place!r} does not lead to a number of the recipe: write it out there first")
            if not low < high:
                raise ValueError(f"{place!r} lies between {low:g} and {high:g}: the first must be the smaller")
        return self

    def evaluations(self) -> tuple[Measured, ...]:
        return (self.select_on,)

    def build(self, sources: Sources) -> Checkpoint:
        made = self.recipe.build(sources)
        return made.noting(f"this is the recipe as it stands: {', '.join(self.parameters)} are searched in the run")

    def chosen(self, means: Means) -> tuple[Method, tuple[Choice, ...]]:
        content = _content(self.recipe)
        begin = {place: float(_get(content, place)) for place in self.parameters}
        rows: list[tuple[dict[str, float], Any]] = []

        def measure(points: Sequence[dict[str, float]]) -> list[float]:
            scores = means.judge.scores([_with(self.recipe, point) for point in points], self.select_on)
            rows.extend((point, score.metrics) for point, score in zip(points, scores, strict=True))
            return [sign * score.metrics[by] for score in scores]

        by, sign = self.select_on.by, 1.0 if self.select_on.lower_is_better else -1.0
        explore(self.parameters, begin, self.budget, self.seed, measure)
        best = min(range(len(rows)), key=lambda i: (sign * rows[i][1][by], i))
        steps = tuple(Tried(_told(point), metrics, i == best) for i, (point, metrics) in enumerate(rows))
        return _with(self.recipe, rows[best][0]), (Choice("search", by, steps[:1], steps[1:]),)


# ---- places in a recipe -------------------------------------------------------------------------------


def _content(recipe: Method) -> dict[str, Any]:
    return {"method": recipe.method, **recipe.model_dump(mode="json", by_alias=True, exclude_none=True)}


def _keys(place: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", place)]


def _get(content: Any, place: str) -> Any:
    """What is at a place such as `models[0].weight`, or None."""
    for key in _keys(place):
        try:
            content = content[key]
        except (KeyError, IndexError, TypeError):
            return None
    return content


def _with(recipe: Method, point: dict[str, float]) -> Method:
    """The recipe with other numbers at some places."""
    content = _content(recipe)
    for place, value in point.items():
        *parents, last = _keys(place)
        holder: Any = content
        for key in parents:
            holder = holder[key]
        holder[last] = value
    return Method.model_validate(content)


def _told(point: dict[str, float]) -> str:
    return ", ".join(f"{place} {value:g}" for place, value in point.items())

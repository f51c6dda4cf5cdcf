"""Merges of fine-tunes behind masks that tell which of them each number matters to. Knows recipes; the formula is
`merger.masked`'s.
"""

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from merger.checkpoint import Checkpoint
from merger.errors import RecipeError
from merger.masked import MaskedSum
from merger.methods.fine_tunes import Entries
from merger.methods.method import Method, Source, Sources
from merger.methods.spectral import EXPERIMENTAL, Family, family_of

Spread = Annotated[float, Field(ge=0)]


class ConsensusTa(Method):
    """Consensus task arithmetic: the sum of the changes, but for numbers that fewer than k tasks care for.
    Experimental.
    """

    method: Literal["consensus_ta"] = "consensus_ta"
    base: Source = Field(description="The model that all fine-tunes started from.")
    models: Entries = Field(description="The fine-tunes: a pattern, or a list of models with or without a `weight`.")
    k: Annotated[int, Field(ge=0)] = Field(default=2, description="So many tasks must care; 0 is task arithmetic.")
    spread: Spread = Field(
        default=0.4,
        description="A task cares where its change is at least so many times what the others add (the lambda of the "
        "paper).",
    )
    scale: float = Field(default=1.0, description="A factor for what is added.")

    paper: ClassVar[str] = "Localizing task information, arXiv 2405.07813"
    example: ClassVar[str] = (
        "method: consensus_ta\nbase: models/base\nmodels: [models/code, models/math, models/chat]\nk: 2\nscale: 0.4\n"
        "output: {path: out/consensus}"
    )

    def build(self, sources: Sources) -> Checkpoint:
        family = family_of(sources, self.base, self.models)
        return _masked(family, self.spread, self.k, self.scale, None).noting(EXPERIMENTAL)


class TallMasks(Method):
    """TALL masks: one of the fine-tunes, as its mask finds it in the sum of all. Experimental."""

    method: Literal["tall_masks"] = "tall_masks"
    base: Source = Field(description="The model that all fine-tunes started from.")
    models: Entries = Field(description="The fine-tunes: a pattern, or a list of models with or without a `weight`.")
    task: Annotated[int, Field(ge=1)] = Field(description="Which of them to find, counted from 1.")
    spread: Spread = Field(
        default=0.4,
        description="What is kept: where its change is at least so many times what the others add (the lambda of the "
        "paper).",
    )
    scale: float = Field(default=1.0, description="A factor for what is added.")

    paper: ClassVar[str] = "Localizing task information, arXiv 2405.07813"
    example: ClassVar[str] = (
        "method: tall_masks\nbase: models/base\nmodels: [models/code, models/math]\ntask: 1\noutput: {path: out/code}"
    )

    def build(self, sources: Sources) -> Checkpoint:
        family = family_of(sources, self.base, self.models)
        if self.task > len(family.models):
            raise RecipeError(f"is {self.task}, of {len(family.models)} models", where="task")
        return _masked(family, self.spread, 0, self.scale, self.task - 1).noting(EXPERIMENTAL)


def _masked(family: Family, spread: float, agreeing: int, scale: float, alone: int | None) -> Checkpoint:
    made = {}
    for name in family.floating():
        result = family.sum.tensors[name]
        base = family.tensor(family.base, name)
        tasks = family.tasks(name)
        made[name] = MaskedSum(result.dtype, result.shape, base, tasks, spread, agreeing, scale, alone)
    return replace(family.sum, tensors={**family.sum.tensors, **made})

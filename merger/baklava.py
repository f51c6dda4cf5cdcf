"""The fine-tunings behind WARM: reward models that start at different points of one supervised trajectory.

Baklava of arXiv 2401.12187, section 3: the pool are checkpoints that one supervised fine-tuning left behind; one head,
trained alone on the last of them, is shared by all runs; run s starts from pool[s mod n] with that head, and trains the
whole model with settings and batches of its own. A pool of one checkpoint is WARM without Baklava. Trains nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Union

from pydantic import Discriminator, Field, Tag, field_validator

from merger.errors import RecipeError
from merger.stages import Stage, Training

REWARD_HEAD = "reward-head"

# A tagged union, so that a mistake is reported for what was meant.
_Pool = Annotated[
    Union[Annotated[str, Tag("pattern")], Annotated[list[str], Tag("list")]],
    Discriminator(lambda value: "pattern" if isinstance(value, str) else "list"),
]


class Baklava(Training):
    """How reward models are fine-tuned from the checkpoints of one supervised fine-tuning."""

    task: str = Field(
        default="preferences",
        min_length=1,
        description="What the data are: preferences, classification, or the name of an installed package's task.",
    )
    checkpoints: _Pool = Field(
        description="The checkpoints of the supervised run: a pattern (natural order) or a list, the oldest first."
    )
    data: str = Field(description="The preferences to train on.")
    runs: int = Field(default=6, ge=1, description="Reward models; run s starts from checkpoints[s mod n].")

    @field_validator("task")
    @classmethod
    def _gives_rewards(cls, task: str) -> str:
        if task == "text":
            raise ValueError("a language model has no head that gives a reward: train on `preferences`")
        return task

    @property
    def data_files(self) -> tuple[str, ...]:
        return (self.data,)

    def stages(self, models: Sequence[str], with_head: bool) -> list[Stage]:
        if not with_head:
            raise RecipeError(
                f"{self.task!r} trains no head that could give a reward",
                where="training.task",
                remedy="Train on `preferences`, or on a task of your own that has a head.",
            )
        head = self.probe(REWARD_HEAD, models[-1], self.data)
        return [head, *(self._reward(run, models[run % len(models)]) for run in range(self.runs))]

    def _reward(self, run: int, start: str) -> Stage:
        name = f"reward-{run}-from-{Path(start).name}"
        return self.stage(name, ((start, 1.0),), REWARD_HEAD, self.data, self.draw(run), self.steps)

"""Fine-tunings as a list of stages, and what every list of them follows from. Trains nothing (`merger.training` does).

Knows settings and how runs draw them; which stage starts from which model is said by the protocols above
(`merger.recycling`).
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

FINISHED = "stage.json"  # beside a finished model: the digest of what it follows from
KEEP_SECONDS = 20.0
Bodies = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Stage:
    """One fine-tuning. `bodies` name the models whose weighted sum it begins with, mostly one with weight 1, and `head`
    the earlier stage whose head it takes (None: a fresh one). Of its `steps` the first `head_steps` train the head
    alone. `labels` are those of its data, and `package` brings its task where that is none of the ready ones.
    """

    name: str
    bodies: Bodies
    head: str | None
    task: str
    data: str
    labels: tuple[str, ...]
    steps: int
    head_steps: int
    learning_rate: float
    weight_decay: float
    dropout: float
    batch_size: int
    context: int
    seed: int
    package: str | None = None

    def key(self, parents: Mapping[str, str]) -> str:
        """A digest of all that the result follows from; `parents` has those of the stages and models before it."""
        bodies = [(parents[name], weight) for name, weight in self.bodies]
        content = {**asdict(self), "bodies": bodies, "head": self.head and parents[self.head]}
        with Path(self.data).expanduser().open("rb") as file:
            content["data"] = hashlib.file_digest(file, "sha256").hexdigest()
        if self.package is None:
            del content["package"]  # ready tasks have the digests that they had before there were others
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_finished(folder: Path, key: str) -> bool:
    """Whether a folder holds the finished model of the stage with this digest."""
    try:
        return bool(json.loads((folder / FINISHED).read_text())["key"] == key)
    except (OSError, ValueError, KeyError, TypeError):
        return False


@dataclass(frozen=True)
class Drawn:
    """The settings of one run."""

    learning_rate: float
    weight_decay: float
    dropout: float
    seed: int


class Training(BaseModel, ABC):
    """How models are fine-tuned, where the recipe does not name finished ones."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    task: str = Field(
        min_length=1,
        description="What the data are: text, classification, preferences, or the name of an installed package's task.",
    )
    runs: int = Field(default=6, ge=1, description="Fine-tunes that are averaged.")
    folder: str = Field(description="Where the stages keep their models; finished ones are not trained again.")
    steps: int = Field(default=300, ge=1, description="Steps of each fine-tune.")
    probe_steps: int = Field(default=100, ge=0, description="Steps of a head alone, before; for tasks with a head.")
    batch_size: int = Field(default=32, ge=1, description="Examples of a step.")
    context: int = Field(default=128, ge=2, description="Tokens of a window of text.")
    learning_rates: list[float] = Field(default=[1e-5, 3e-5, 5e-5], min_length=1, description="Each run draws one.")
    weight_decays: list[float] = Field(default=[1e-4, 1e-6], min_length=1, description="Each run draws one.")
    dropouts: list[float] = Field(default=[0.0, 0.1, 0.5], min_length=1, description="Each run draws one.")
    probe_learning_rate: float = Field(default=1e-3, gt=0, description="That of heads alone.")
    seed: int = Field(default=0, ge=0, description="Settings, batches, dropout and fresh heads follow from it.")
    keep_seconds: float = Field(
        default=KEEP_SECONDS, ge=0, description="At most every so often a stage keeps the state that it goes on from."
    )

    @property
    @abstractmethod
    def data_files(self) -> tuple[str, ...]:
        """The files of data, as the recipe writes them."""

    @property
    def auxiliary_stages(self) -> tuple[str, ...]:
        """The stages whose models are named in the result's recipe though they are not averaged."""
        return ()

    @abstractmethod
    def stages(self, models: Sequence[str], with_head: bool) -> list[Stage]:
        """Every fine-tuning that begins with the stored `models`, each after those that it starts from; the last
        `runs` of them are averaged. `with_head`: the task has a head, which is trained alone first.
        """

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read."""
        return tuple(Path(path).expanduser() for path in self.data_files)

    def stage(
        self, name: str, bodies: Bodies, head: str | None, data: str, drawn: Drawn, steps: int, head_steps: int = 0
    ) -> Stage:
        """A stage with the settings that all share."""
        shared = (self.batch_size, self.context, drawn.seed)
        settings = (drawn.learning_rate, drawn.weight_decay, drawn.dropout)
        return Stage(name, bodies, head, self.task, data, (), steps, head_steps, *settings, *shared)

    def probe(self, name: str, body: str, data: str) -> Stage:
        """The stage that trains a fresh head alone, on one model."""
        drawn = Drawn(self.probe_learning_rate, 0.0, 0.0, self.seed)
        return self.stage(name, ((body, 1.0),), None, data, drawn, self.probe_steps, self.probe_steps)

    def draw(self, run: int) -> Drawn:
        """The settings of a run, drawn from what the recipe allows by the seed and the number of the run."""
        random = np.random.Generator(np.random.Philox(key=[self.seed, run]))
        choices: list[Any] = [self.learning_rates, self.weight_decays, self.dropouts]
        lr, decay, dropout = (values[int(random.integers(len(values)))] for values in choices)
        return Drawn(lr, decay, dropout, self.seed * 1_000_003 + run)

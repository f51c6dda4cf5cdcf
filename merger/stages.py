"""The fine-tunings behind Model Ratatouille, as a list of stages. Trains nothing (`merger.training` does).

The protocol of arXiv 2212.10445, section 3 and its published code: of each auxiliary task a head alone, then the whole
model; one head on the base for the target, shared by all runs; run s on the target starts from the body pool[s mod
(n+1)], where 0 is the base and i the i-th auxiliary model, with the shared head, and trains its head alone for some
more steps where the body is auxiliary. Without auxiliary tasks this is DiWA (arXiv 2205.09739).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from merger.rows import field_of, rows_of

TARGET_HEAD = "target-head"
FINISHED = "stage.json"  # beside a finished model: the digest of what it follows from


@dataclass(frozen=True)
class Stage:
    """One fine-tuning. `bodies` name the models whose weighted sum it begins with, mostly one with weight 1, and `head`
    the earlier stage whose classification head it takes (None: a fresh one). Of its `steps` the first `head_steps`
    train the head alone.
    """

    name: str
    bodies: tuple[tuple[str, float], ...]
    head: str | None
    task: Literal["text", "classification"]
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

    def key(self, parents: Mapping[str, str]) -> str:
        """A digest of all that the result follows from; `parents` has those of the stages and models before it."""
        bodies = [(parents[name], weight) for name, weight in self.bodies]
        content = {**asdict(self), "bodies": bodies, "head": self.head and parents[self.head]}
        with Path(self.data).expanduser().open("rb") as file:
            content["data"] = hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Training(BaseModel):
    """How the auxiliary and the target models are fine-tuned, where the recipe does not name finished ones."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    task: Literal["text", "classification"] = Field(description="What the data are: text, or rows with labels.")
    auxiliary: dict[str, str] = Field(default_factory=dict, description="Name and data (JSONL or text) of each task.")
    target: str = Field(description="The data of the target task.")
    runs: int = Field(default=6, ge=1, description="Fine-tunes on the target (M of the paper; there 20).")
    folder: str = Field(description="Where the stages keep their models; finished ones are not trained again.")
    steps: int = Field(default=300, ge=1, description="Steps of each fine-tune.")
    probe_steps: int = Field(default=100, ge=0, description="Steps of a head alone, before; for classification.")
    start: Literal["recycled", "fused"] = Field(
        default="recycled",
        description="recycled: run s from pool[s mod (n+1)]. fused: each from a random mean of the pool (a baseline).",
    )
    extra_head_steps: int = Field(default=20, ge=0, description="More of them where the body is auxiliary; there 200.")
    batch_size: int = Field(default=32, ge=1, description="Examples of a step.")
    context: int = Field(default=128, ge=2, description="Tokens of a window of text.")
    learning_rates: list[float] = Field(default=[1e-5, 3e-5, 5e-5], min_length=1, description="Each run draws one.")
    weight_decays: list[float] = Field(default=[1e-4, 1e-6], min_length=1, description="Each run draws one.")
    dropouts: list[float] = Field(default=[0.0, 0.1, 0.5], min_length=1, description="Each run draws one.")
    probe_learning_rate: float = Field(default=1e-3, gt=0, description="That of heads alone.")
    seed: int = Field(default=0, ge=0, description="Settings, batches, dropout and fresh heads follow from it.")

    @field_validator("auxiliary")
    @classmethod
    def _names(cls, auxiliary: dict[str, str]) -> dict[str, str]:
        for name in auxiliary:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"{name!r} is no name: letters, digits, - and _")
        return auxiliary

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read."""
        return tuple(Path(path).expanduser() for path in (*self.auxiliary.values(), self.target))


def labels_of_data(path: str) -> tuple[str, ...]:
    """The labels of rows, in the order of their numbers or names. Raises SourceError."""
    found = {str(field_of(row, "label", where)) for where, row in rows_of([Path(path).expanduser()])}
    return tuple(sorted(found, key=lambda label: (not label.isdigit(), int(label) if label.isdigit() else 0, label)))


def stages_of(training: Training, base: str, labels: Mapping[str, tuple[str, ...]]) -> list[Stage]:
    """Every fine-tuning, each after those that it starts from; `labels` are those of each file of data.

    The last `training.runs` of them are the targets.
    """
    classifies = training.task == "classification"
    stages: list[Stage] = []

    def add(
        name: str, bodies: Bodies, head: str | None, data: str, drawn: "_Drawn", steps: int, head_steps: int
    ) -> str:
        shared = (training.batch_size, training.context, drawn.seed)
        settings = (drawn.learning_rate, drawn.weight_decay, drawn.dropout)
        stages.append(
            Stage(name, bodies, head, training.task, data, labels.get(data, ()), steps, head_steps, *settings, *shared)
        )
        return name

    def probe(name: str, data: str) -> str | None:
        drawn = _Drawn(training.probe_learning_rate, 0.0, 0.0, training.seed)
        steps = training.probe_steps
        return add(name, ((base, 1.0),), None, data, drawn, steps, steps) if classifies else None

    pool = [base]
    for i, (name, data) in enumerate(training.auxiliary.items()):
        head = probe(f"auxiliary-{name}-head", data)
        drawn = _draw(training, 1_000_000 + i)
        pool.append(add(f"auxiliary-{name}", ((base, 1.0),), head, data, drawn, training.steps, 0))
    head = probe(TARGET_HEAD, training.target)
    for run in range(training.runs):
        bodies = ((pool[run % len(pool)], 1.0),) if training.start == "recycled" else _fused(training, run, pool)
        extra = training.extra_head_steps if bodies != ((base, 1.0),) and classifies else 0
        drawn = _draw(training, run)
        start = "all" if len(bodies) > 1 else ("base", *training.auxiliary)[run % len(pool)]
        add(f"target-{run}-from-{start}", bodies, head, training.target, drawn, extra + training.steps, extra)
    return stages


Bodies = tuple[tuple[str, float], ...]


def _fused(training: Training, run: int, pool: Sequence[str]) -> Bodies:
    """Weights exp(4 u) / sum with u uniform in [0, 1], as the paper's code draws them for fusing (arXiv 2204.03044)."""
    random = np.random.Generator(np.random.Philox(key=[training.seed, 2_000_000 + run]))
    weights = np.exp(4.0 * random.random(len(pool)))
    return tuple(zip(pool, (weights / weights.sum()).tolist(), strict=True))


@dataclass(frozen=True)
class _Drawn:
    learning_rate: float
    weight_decay: float
    dropout: float
    seed: int


def _draw(training: Training, run: int) -> _Drawn:
    """The settings of a run, drawn from what the recipe allows by the seed and the number of the run."""
    random = np.random.Generator(np.random.Philox(key=[training.seed, run]))
    choices: list[Any] = [training.learning_rates, training.weight_decays, training.dropouts]
    lr, decay, dropout = (values[int(random.integers(len(values)))] for values in choices)
    return _Drawn(lr, decay, dropout, training.seed * 1_000_003 + run)

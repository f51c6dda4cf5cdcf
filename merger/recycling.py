"""The fine-tunings behind Model Ratatouille: which stage starts from which. Trains nothing.

The protocol of arXiv 2212.10445, section 3 and its published code: of each auxiliary task a head alone, then the whole
model; one head on the base for the target, shared by all runs; run s on the target starts from the body pool[s mod
(n+1)], where 0 is the base and i the i-th auxiliary model, with the shared head, and trains its head alone for some
more steps where the body is auxiliary. Without auxiliary tasks this is DiWA (arXiv 2205.09739).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field, field_validator

from merger.stages import Bodies, Stage, Training

TARGET_HEAD = "target-head"


class Recycling(Training):
    """How the auxiliary and the target models are fine-tuned from one base."""

    auxiliary: dict[str, str] = Field(default_factory=dict, description="Name and data (JSONL or text) of each task.")
    target: str = Field(description="The data of the target task.")
    runs: int = Field(default=6, ge=1, description="Fine-tunes on the target (M of the paper; there 20).")
    start: Literal["recycled", "fused"] = Field(
        default="recycled",
        description="recycled: run s from pool[s mod (n+1)]. fused: each from a random mean of the pool (a baseline).",
    )
    extra_head_steps: int = Field(default=20, ge=0, description="More of them where the body is auxiliary; there 200.")

    @field_validator("auxiliary")
    @classmethod
    def _names(cls, auxiliary: dict[str, str]) -> dict[str, str]:
        for name in auxiliary:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"{name!r} is no name: letters, digits, - and _")
        return auxiliary

    @property
    def data_files(self) -> tuple[str, ...]:
        return (*self.auxiliary.values(), self.target)

    @property
    def auxiliary_stages(self) -> tuple[str, ...]:
        return tuple(f"auxiliary-{name}" for name in self.auxiliary)

    def stages(self, models: Sequence[str], with_head: bool) -> list[Stage]:
        [base] = models
        stages: list[Stage] = []

        def head_for(name: str, data: str) -> str | None:
            if with_head:
                stages.append(self.probe(name, base, data))
            return name if with_head else None

        pool = [base]
        for i, (name, data) in enumerate(self.auxiliary.items()):
            head = head_for(f"auxiliary-{name}-head", data)
            drawn = self.draw(1_000_000 + i)
            stages.append(self.stage(f"auxiliary-{name}", ((base, 1.0),), head, data, drawn, self.steps))
            pool.append(f"auxiliary-{name}")
        head = head_for(TARGET_HEAD, self.target)
        return [*stages, *(self._target(run, pool, head) for run in range(self.runs))]

    def _target(self, run: int, pool: Sequence[str], head: str | None) -> Stage:
        fused = self.start == "fused" and len(pool) > 1
        bodies = self._fused(run, pool) if fused else ((pool[run % len(pool)], 1.0),)
        start = "all" if fused else ("base", *self.auxiliary)[run % len(pool)]
        extra = self.extra_head_steps if head and bodies != ((pool[0], 1.0),) else 0
        name = f"target-{run}-from-{start}"
        return self.stage(name, bodies, head, self.target, self.draw(run), extra + self.steps, extra)

    def _fused(self, run: int, pool: Sequence[str]) -> Bodies:
        """Weights exp(4 u) / sum with u uniform in [0, 1], as the paper's code draws them (arXiv 2204.03044)."""
        random = np.random.Generator(np.random.Philox(key=[self.seed, 2_000_000 + run]))
        weights = np.exp(4.0 * random.random(len(pool)))
        return tuple(zip(pool, (weights / weights.sum()).tolist(), strict=True))

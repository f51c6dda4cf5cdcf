"""What the comparison is made on: a base model, data of auxiliary tasks and of a target, and how results are measured.

Knows files below a work folder and the `merger` command.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MERGER = [sys.executable, "-m", "merger"]


@dataclass(frozen=True)
class Study:
    """The files `data/NAME.jsonl` of `base`, of the auxiliary tasks, of `target`, `validation` (of the target's
    domains) and `unseen` (other domains), and the model `random`, below `work`. `pretraining` says what of `training`
    is otherwise where `base` is made of `random`. `factor` and `unit` are for people.
    """

    name: str
    work: Path
    auxiliary: tuple[str, ...]
    training: dict[str, Any]
    pretraining: dict[str, Any]
    evaluation: dict[str, Any]
    metric: str
    lower_is_better: bool
    factor: float
    unit: str

    @property
    def places(self) -> int:
        """Digits after the point that are worth a look."""
        return 1 if self.factor > 1 else 3

    def data(self, name: str) -> str:
        """A file of data, below the work folder."""
        return f"data/{name}.jsonl"

    def pretrain(self) -> None:
        """Make the base, by the same stages that fine-tune; one that is there is kept."""
        if not (self.work / "base" / "config.json").exists():
            training = {**self.training, "target": self.data("base"), "folder": "pretraining", "runs": 1}
            training |= {"dropouts": [0.0], "weight_decays": [0.01], **self.pretraining}
            self.run("base", {"method": "ratatouille", "base": "random", "training": training})

    def run(self, output: str, recipe: dict[str, Any]) -> dict[str, Any]:
        """Make a recipe's result in `output` with `merger run`; its manifest."""
        path = self.work / f"{output.replace('/', '-')}.yaml"
        path.write_text(yaml.safe_dump({**recipe, "output": {"path": output}}, sort_keys=False))
        self.command(["run", path.name])
        manifest: dict[str, Any] = json.loads((self.work / output / "merger.json").read_text())
        return manifest

    def scores(self, data: str, models: Sequence[str]) -> dict[str, float]:
        """What models measure, by `merger evaluate`."""
        found = json.loads(self.command(["evaluate", *models, *self._options(data)]))
        return {model: row["metrics"][self.metric] for model, row in found.items()}

    def lines(self, data: str, models: Sequence[str]) -> list[dict[str, Any]]:
        """What is measured on the line from each model to the next, by `merger connect`."""
        found: list[dict[str, Any]] = json.loads(
            self.command(["connect", *models, "--points", "7", *self._options(data)])
        )
        return found

    def best(self, values: dict[str, float], models: Sequence[str]) -> str:
        """The best of models by what they measured."""
        return (min if self.lower_is_better else max)(models, key=lambda model: values[model])

    def _options(self, data: str) -> list[str]:
        settings = {**self.evaluation, "data": self.data(data)}
        return [*(f"--{name.replace('_', '-')}={value}" for name, value in settings.items()), "--json"]

    def command(self, arguments: Sequence[str]) -> str:
        """What the command prints, run in the work folder, where scores are remembered too."""
        variables = {**os.environ, "XDG_CACHE_HOME": str(self.work / "cache"), "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(
            [*MERGER, *arguments], cwd=self.work, capture_output=True, text=True, env=variables, check=False
        )
        if done.returncode:
            raise SystemExit(f"merger {' '.join(arguments)}, in {self.work}:\n{done.stderr}")
        return done.stdout

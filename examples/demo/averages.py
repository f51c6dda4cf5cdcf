"""Makes the demo's averages as jobs of a service, with the `merger` command, as a person would at a shell.

Knows the recipes beside it and how the command is called. Knows nothing of training, nor of what an average is worth.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from service import merger

RECIPES = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Average:
    """A recipe, what is changed in it (`k=3`), and the name of the folder that the result goes to."""

    title: str
    recipe: str
    folder: str
    changes: tuple[str, ...] = ()


WINDOW = 6  # the k of lawa.yaml

# Some of them lose, and are shown all the same.
AVERAGES = (
    Average("LAWA, 3 newest", "lawa.yaml", "lawa-3", ("k=3",)),
    Average("LAWA, 6 newest", "lawa.yaml", "lawa-6"),
    Average("LAWA, 12 newest", "lawa.yaml", "lawa-12", ("k=12",)),
    Average("SWA, second half", "swa.yaml", "swa"),
    Average("EMA, decay 0.8", "ema.yaml", "ema"),
    Average("mean of all", "average.yaml", "average"),
)


def make_all(averages: Sequence[Average], out: Path, service: Mapping[str, str]) -> dict[str, Path]:
    """Runs `merger submit --wait` for each average; returns the folders of the results by title, made anew."""
    return {average.title: _make(average, out, service) for average in averages}


def make_along(steps: list[int], out: Path, service: Mapping[str, str]) -> dict[int, Path]:
    """LAWA as it would have been during the training: at every step that has enough checkpoints behind it.

    All of them are queued at once and waited for.
    """
    ends = steps[WINDOW - 1 :]
    print(f"$ merger submit lawa.yaml --set end=STEP   for {len(ends)} steps, {ends[0]} to {ends[-1]}", flush=True)
    averages = {end: Average("", "lawa.yaml", f"along/step-{end:04d}", (f"end={end}",)) for end in ends}
    jobs = [_merger(["submit", *_arguments(average, out)], service).strip() for average in averages.values()]
    for job in jobs:
        _merger(["watch", job], service)
    return {end: out / average.folder for end, average in averages.items()}


def _make(average: Average, out: Path, service: Mapping[str, str]) -> Path:
    arguments = ["submit", *_arguments(average, out), "--wait"]
    print("$", shlex.join(["merger", *arguments]), flush=True)
    _merger(arguments, service)
    return out / average.folder


def _arguments(average: Average, out: Path) -> list[str]:
    """The recipe as a path from here, the changes, and the output, whose folder is removed where it is there."""
    folder = out / average.folder
    if folder.exists():
        shutil.rmtree(folder)
    changes = [word for change in average.changes for word in ("--set", change)]
    return [str((RECIPES / average.recipe).relative_to(Path.cwd())), *changes, "-o", str(folder)]


def _merger(arguments: Sequence[str], service: Mapping[str, str]) -> str:
    """What the command prints. Exits where it fails."""
    done = subprocess.run([merger(), *arguments], env=service, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(['merger', *arguments])} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    return done.stdout

"""Makes the demo's averages with the `merger` command, as a person would at a shell.

Knows the recipes beside it and how the command is called. Knows nothing of training, nor of what an average is worth.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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


def make(average: Average, out: Path, *, quiet: bool = False) -> Path:
    """Runs `merger run` and returns the folder of the result, made anew. Exits where the command fails."""
    folder = out / average.folder
    if folder.exists():
        shutil.rmtree(folder)
    arguments = _arguments(average, folder)
    if not quiet:
        print("$", shlex.join(["merger", *arguments]), flush=True)
    done = subprocess.run([_command(), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(['merger', *arguments])} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    return folder


def make_along(steps: list[int], out: Path) -> dict[int, Path]:
    """LAWA as it would have been during the training: at every step that has enough checkpoints behind it."""
    ends = steps[WINDOW - 1 :]
    print(f"$ merger run lawa.yaml --set end=STEP   for {len(ends)} steps, {ends[0]} to {ends[-1]}", flush=True)
    return {
        end: make(Average("", "lawa.yaml", f"along/step-{end:04d}", (f"end={end}",)), out, quiet=True) for end in ends
    }


def _arguments(average: Average, folder: Path) -> list[str]:
    """What stands behind `merger`: the recipe as a path from here, the changes, the output."""
    changes = [word for change in average.changes for word in ("--set", change)]
    return ["run", str((RECIPES / average.recipe).relative_to(Path.cwd())), *changes, "-o", str(folder)]


def _command() -> Path:
    """The `merger` of the interpreter that runs this. Exits where it is not installed."""
    command = Path(sys.executable).parent / "merger"
    if not command.is_file():
        sys.exit(f"{command} is missing: run this with `make demo`, or install the project first")
    return command

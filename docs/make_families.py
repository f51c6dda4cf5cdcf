"""Writes docs/families.md: every family that transformers has a language model of, merged and looked at.

Takes a quarter of an hour. Run from the root of the repository: `python docs/make_families.py`.
"""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.families import MUST_BE_RIGHT  # after the path is known
from tests.family_files import SMALL, kinds

COLUMNS = ("keys_kept", "values_right", "slerp", "ties", "reloads")
PAGE = Path(__file__).with_name("families.md")
INTRO = """# Families

What merger does with the files of each model family: written by `docs/make_families.py`, on {count} families of
transformers {transformers}. Two tiny random models of a family (float32, {layers} layers, hidden size {size}) are saved
by transformers, which writes the names that the family's models have on the Hub, and summed with weights 0.25 and 0.75.

- **keys kept**: the result holds exactly the tensors that the files held, under their names.
- **sum**: every element is the sum in float64, rounded once; integers are what they were.
- **SLERP**, **TIES**: of a configuration with `merge_method: slerp` or `ties`, the first model the base: every tensor
  lies where float64 says on the arc, or has the changes of half of its elements, the largest.
- **reloads**: transformers loads the result with no key missing, left over or of another shape.

{right} of the {built} that could be made are right in all of it; the remarks say what is wrong, and why a family could
not be made tiny. `python -m tests.families KIND` looks at one.

| family | tensors | keys kept | sum | SLERP | TIES | reloads | remarks |
|---|---|---|---|---|---|---|---|
"""
PEER = """
## What mergekit does with the same files

mergekit {mergekit} with `merge_method: linear`, `dtype: float32` and the same weights, on the families of which it is
known that it loses weights, writes other names, or fails. The other names are those of the model in memory.

| family | merger | mergekit |
|---|---|---|
"""


def rows_of(*words: str) -> list[dict[str, Any]]:
    """The rows of some families, or of all."""
    command = [sys.executable, "-m", "tests.families", *words]
    found = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            found.append(json.loads(line))
            print(len(found), found[-1]["kind"], found[-1]["reason"], file=sys.stderr)
    return found


def is_right(row: dict[str, Any]) -> bool:
    return all(row[key] for key in COLUMNS)


def _mark(value: bool | None) -> str:
    return {True: "yes", False: "**no**", None: ""}[value]


def _escaped(words: str) -> str:
    return words.replace("|", "\\|")


def _line(row: dict[str, Any]) -> str:
    cells = [row["kind"], row["tensors"] or "", *(_mark(row[key]) for key in COLUMNS)]
    return f"| {' | '.join(map(str, cells))} | {_escaped(row['reason'])} |\n"


def page(rows: list[dict[str, Any]], peers: list[dict[str, Any]]) -> str:
    """The whole page."""
    built = [row for row in rows if row["tensors"]]
    text = INTRO.format(
        count=len(rows),
        transformers=version("transformers"),
        layers=SMALL["num_hidden_layers"],
        size=SMALL["hidden_size"],
        built=len(built),
        right=sum(map(is_right, built)),
    )
    text += "".join(map(_line, rows)) + PEER.format(mergekit=version("mergekit"))
    for row in peers:
        text += (
            f"| {row['kind']} | {'right' if is_right(row) else _escaped(row['reason'])} | {_escaped(row['peer'])} |\n"
        )
    return text


if __name__ == "__main__":
    peers = rows_of("--peer", *MUST_BE_RIGHT)
    known = {row["kind"]: row for row in peers}
    others = rows_of(*(kind for kind in kinds() if kind not in known))
    PAGE.write_text(page(sorted([*peers, *others], key=lambda row: row["kind"]), peers))

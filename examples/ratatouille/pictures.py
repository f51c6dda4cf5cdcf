"""The picture of the comparison: accuracy of every strategy over the seeds, and along the lines between fine-tunes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2f6fb0", "#d9822b", "#8a8f98"


def draw(path: Path, rows: Sequence[tuple[str, Sequence[float]]], lines: Sequence[Mapping[str, Any]]) -> None:
    """A dot a seed and a bar at the mean for each strategy; below, accuracy from one fine-tune to the next."""
    figure = Figure(figsize=(8.0, 6.0), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3, 2])
    for place, (name, values) in enumerate(rows):
        colour = ORANGE if name.startswith("ratatouille") else BLUE
        above.plot(values, [place] * len(values), "o", color=colour, alpha=0.45, markersize=5)
        above.plot([sum(values) / len(values)] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=2.5)
    above.set_yticks(range(len(rows)), [name for name, _ in rows])
    above.invert_yaxis()
    above.set_title("Accuracy in unseen domains, %: a dot a seed, bars at the means", loc="left", fontsize=10)
    for i, line in enumerate(lines):
        values = [100 * value for value in line["values"]]
        below.plot([i + place for place in line["places"]], values, color=ORANGE, marker="o", markersize=3)
        below.plot([i, i + 1], [values[0], values[-1]], color=GREY, linewidth=0.8, linestyle="--")
    names = ["base", "parity", "size", "round"]
    below.set_xticks(range(len(lines) + 1), [f"from {name}" for name in names[: len(lines) + 1]])
    below.set_title("On the lines between fine-tunes that started from different models", loc="left", fontsize=10)
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=125)

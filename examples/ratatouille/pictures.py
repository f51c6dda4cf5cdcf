"""The picture of the comparison: what every strategy measures over the seeds, and along lines between fine-tunes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study import Study

BLUE, ORANGE, GREY = "#2f6fb0", "#d9822b", "#8a8f98"
Result = tuple[Study, Sequence[Mapping[str, float]], Sequence[Mapping[str, Any]]]


def draw(path: Path, order: Sequence[str], results: Sequence[Result]) -> None:
    """A column a study: a dot a seed and a bar at the mean for each strategy; below, from one fine-tune to the next."""
    figure = Figure(figsize=(11.0, 6.0), layout="constrained")
    grid = figure.subplots(2, len(results), height_ratios=[3, 2], squeeze=False)
    for column, (study, seeds, lines) in enumerate(results):
        _strategies(grid[0][column], study, order, seeds)
        _lines(grid[1][column], study, lines)
        if column:
            grid[0][column].set_yticklabels([])
    for axes in grid.flat:
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=125)


def _strategies(axes: Axes, study: Study, order: Sequence[str], seeds: Sequence[Mapping[str, float]]) -> None:
    for place, name in enumerate(order):
        values = [row[name] for row in seeds]
        colour = ORANGE if name.startswith("ratatouille") else BLUE
        axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.45, markersize=5)
        axes.plot([sum(values) / len(values)] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=2.5)
    axes.set_yticks(range(len(order)), order)
    axes.invert_yaxis()
    better = "left" if study.lower_is_better else "right"
    axes.set_title(f"{study.name}: {study.unit} in unseen domains, better to the {better}", loc="left", fontsize=10)


def _lines(axes: Axes, study: Study, lines: Sequence[Mapping[str, Any]]) -> None:
    for i, line in enumerate(lines):
        values = [study.factor * value for value in line["values"]]
        axes.plot([i + place for place in line["places"]], values, color=ORANGE, marker="o", markersize=3)
        axes.plot([i, i + 1], [values[0], values[-1]], color=GREY, linewidth=0.8, linestyle="--")
    names = ["base", *study.auxiliary]
    axes.set_xticks(range(len(lines) + 1), [f"from {name}" for name in names[: len(lines) + 1]])
    axes.set_title(f"{study.unit} on the lines between fine-tunes", loc="left", fontsize=10)

"""Draws the demo's results. Knows scores and matplotlib; knows nothing of models or files of weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from evaluate import Score
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import Results
from surgery import Continued

INK, SOFT, GRID = "#1f2933", "#69778a", "#e4e8ee"
CHECKPOINTS, AVERAGED, WORSE = "#8a97a8", "#0b7a75", "#c2410c"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
}


def draw(results: Results, path: Path, window: int) -> None:
    """Writes a PNG of 1600 pixels: losses along the training; averages against the last checkpoint."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.4), dpi=200, facecolor="white", layout="constrained")
        along, against = figure.subplots(1, 2, width_ratios=(1.35, 1))
        _draw_curves(along, results, window)
        _draw_gains(against, results)
        figure.savefig(path)


def draw_continued(continued: Mapping[str, Continued], path: Path) -> None:
    """Writes a PNG of 1600 pixels: the losses of the three models, by steps and by seconds of training."""
    colours = dict(zip(continued, (CHECKPOINTS, AVERAGED, WORSE), strict=True))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4), dpi=200, facecolor="white", layout="constrained")
        by_step, by_time = figure.subplots(1, 2, sharey=True)
        for name, model in continued.items():
            losses = [score.loss for score in model.scores.values()]
            last = max(model.scores)
            seconds = [model.seconds * step / last for step in model.scores]
            for axes, along in ((by_step, list(model.scores)), (by_time, seconds)):
                axes.plot(along, losses, color=colours[name], marker="o", markersize=3.5, linewidth=1.8, label=name)
        by_step.set_title("Held-out loss of the same checkpoint, continued", loc="left", fontsize=11, fontweight="bold")
        by_step.set_xlabel("further steps")
        by_step.set_ylabel("nats per token")
        by_time.set_xlabel("seconds of training on this machine")
        by_time.legend(frameon=False, labelcolor="linecolor")
        figure.savefig(path)


def _draw_curves(axes: Axes, results: Results, window: int) -> None:
    axes.set_title("Held-out loss along the training", loc="left", fontsize=11, fontweight="bold")
    _line(axes, results.checkpoints, CHECKPOINTS)
    _line(axes, results.curve, AVERAGED)
    axes.set_xlabel("training step")
    axes.set_ylabel("nats per token")
    _zoom(axes, results)
    _name(axes, results.checkpoints, "checkpoint", CHECKPOINTS, above=True)
    _name(axes, results.curve, f"LAWA, {window} newest", AVERAGED, above=False)


def _line(axes: Axes, scores: Mapping[int, Score], colour: str) -> None:
    losses = [score.loss for score in scores.values()]
    axes.plot(list(scores), losses, color=colour, marker="o", markersize=3.5, linewidth=1.8)


def _zoom(axes: Axes, results: Results) -> None:
    """From the first point of LAWA on; before it the loss falls so far that nothing else could be seen."""
    begin = min(results.curve)
    shown = [score.loss for step, score in results.checkpoints.items() if step >= begin]
    shown += [score.loss for score in results.curve.values()]
    margin = 0.06 * (max(shown) - min(shown))
    axes.set_ylim(min(shown) - 2 * margin, max(shown) + margin)
    axes.set_xlim(begin - 0.03 * (results.last - begin), results.last + 0.03 * (results.last - begin))


def _name(axes: Axes, scores: Mapping[int, Score], text: str, colour: str, *, above: bool) -> None:
    """Writes the name of a line beside it, where the two lines are well apart: early above, late below."""
    steps = sorted(step for step in scores if axes.get_xlim()[0] <= step)
    step = steps[len(steps) * 3 // 5]
    axes.annotate(
        text,
        (step, scores[step].loss),
        xytext=(14, 22) if above else (-14, -26),
        textcoords="offset points",
        ha="left" if above else "right",
        color=colour,
        fontweight="bold",
        arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkB": 4},
    )


def _draw_gains(axes: Axes, results: Results) -> None:
    axes.set_title("Against the last checkpoint", loc="left", fontsize=11, fontweight="bold")
    axes.axvline(0, color=INK, linewidth=1)
    for place, score in enumerate(results.averages.values()):
        gain, error = results.gain(score)
        colour = SOFT if abs(gain) < 2 * error else AVERAGED if gain < 0 else WORSE
        axes.errorbar(gain, place, xerr=2 * error, color=colour, marker="o", markersize=7, linewidth=2)
        offset = (0, 9)
        axes.annotate(f"{gain:+.3f}", (gain, place), xytext=offset, textcoords="offset points", ha="center", fontsize=9)
    axes.set_yticks(range(len(results.averages)), list(results.averages), color=INK)
    axes.set_ylim(len(results.averages) - 0.5, -0.8)
    axes.margins(x=0.2)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    arrows = "better  \N{LEFTWARDS ARROW}    0    \N{RIGHTWARDS ARROW}  worse"
    axes.set_xlabel(f"loss minus the last one's, \N{PLUS-MINUS SIGN} 2 errors\n{arrows}")

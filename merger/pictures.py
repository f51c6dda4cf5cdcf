"""The pictures of reports, as PNG. Knows numbers and colours; knows nothing of where they come from."""

import io
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2f6fb0", "#d9822b", "#8a8f98"
_SIZE = (8.0, 3.2)  # inches
_MOST_NAMES = 12
_DPI = 125  # 1000 pixels wide


def draw_weights(steps: Sequence[int | None], weights: Sequence[float], names: Sequence[str]) -> bytes:
    """Bars of the weight of every source: by name where they are few, else along the training steps or in order."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    known = [step for step in steps if step is not None]
    places = [float(i) for i in range(len(weights))]
    if len(weights) <= _MOST_NAMES:
        tilted = sum(map(len, names)) > 90
        axes.set_xticks(places, [_short(name) for name in names])
        axes.tick_params(axis="x", rotation=20 if tilted else 0)
    elif len(set(known)) == len(weights):
        places = [float(step) for step in known]
        axes.set_xlabel("training step")
    else:
        axes.set_xlabel("source")
    gaps = [b - a for a, b in pairwise(sorted(places))]
    axes.bar(places, weights, width=0.7 * min(gaps, default=1.0), color=[BLUE if w >= 0 else ORANGE for w in weights])
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_ylabel("weight")
    axes.set_title(f"{len(weights)} sources, weights sum to {sum(weights):.6g}", loc="left", fontsize=10)
    _plain(axes)
    return _png(figure)


def draw_distances(title: str, layers: Sequence[str], relative: Sequence[float], cosine: Sequence[float]) -> bytes:
    """Two rows over the layers: the relative distance of the weights, and one minus the cosine between them."""
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    places = range(len(layers))
    above.bar(places, relative, color=BLUE)
    above.set_ylabel("|a - b| / |a|")
    below.bar(places, [1.0 - c for c in cosine], color=ORANGE)
    below.set_ylabel("1 - cosine")
    every = max(1, -(-len(layers) // 24))
    below.set_xticks(
        list(places)[::every], [_short(name) for name in layers][::every], rotation=60, ha="right", fontsize=8
    )
    above.set_title(title, loc="left", fontsize=10)
    for axes in (above, below):
        _plain(axes)
    return _png(figure)


def _short(name: str) -> str:
    return name if len(name) <= 22 else f"...{name[-20:]}"


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", alpha=0.25)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()

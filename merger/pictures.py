"""The pictures of reports, as PNG. Knows numbers and colours; knows nothing of where they come from."""

import io
from collections.abc import Mapping, Sequence
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


def draw_sizes(sizes: Mapping[str, tuple[int, int]]) -> bytes:
    """Bars of the parameters of models, by name: all of them, and in the same bar those that a token meets."""
    figure = Figure(figsize=(8.0, 2.2), layout="constrained")
    axes = figure.add_subplot()
    names = list(sizes)
    widest = max(total for total, _ in sizes.values())
    for place, (total, active) in enumerate(sizes.values()):
        axes.barh(place, total, height=0.55, color=GREY, alpha=0.35)
        axes.barh(place, active, height=0.55, color=BLUE)
        told = f"{_count(total)}" if total == active else f"{_count(total)}, {_count(active)} a token"
        axes.text(total + 0.01 * widest, place, told, va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * widest)
    axes.set_title("Parameters (blue: those that a token meets)", loc="left", fontsize=10)
    axes.xaxis.set_major_formatter(lambda value, _: _count(value))
    _plain(axes)
    axes.grid(axis="y", visible=False)
    return _png(figure)


def _count(number: float) -> str:
    for unit, size in ((" T", 1e12), (" B", 1e9), (" M", 1e6), (" k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


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


Curve = tuple[str, str, Sequence[float], Sequence[float]]  # from, to, places from 0 to 1, values there


def draw_lines(curves: Sequence[Curve], metric: str) -> bytes:
    """A metric along straight lines between models, one after the other, and the chord between the ends of each."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    ticks: dict[float, str] = {}
    for i, (first, other, places, values) in enumerate(curves):
        along = [i + place for place in places]
        axes.plot(along, values, color=BLUE, marker="o", markersize=3)
        axes.plot([i, i + 1], [values[0], values[-1]], color=GREY, linewidth=0.8, linestyle="--")
        ticks |= {float(i): first, float(i + 1): other} if i not in ticks or ticks[i] == first else {i + 1.0: other}
    axes.set_xticks(list(ticks), [_short(name) for name in ticks.values()])
    axes.set_ylabel(metric)
    axes.set_title(f"{metric} on the lines between models (dashed: the chord)", loc="left", fontsize=10)
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

"""Where a function of some numbers is lowest within bounds, by measuring few points. Knows nothing of what is measured.

The same seed proposes the same points, as long as the same values come back.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

from merger.errors import NotInstalled

Bounds = tuple[float, float]
Point = dict[str, float]
Measure = Callable[[Sequence[Point]], list[float]]  # the values of points; lower is better
_SIGMA = 0.25  # the first steps, in widths of the bounds
_DIGITS = 6


def explore(bounds: Mapping[str, Bounds], begin: Mapping[str, float], budget: int, seed: int, measure: Measure) -> None:
    """Measure `budget` points: that to begin with, then what CMA-ES proposes; of one number alone an even grid."""
    measure([dict(begin)])
    search = _grid if len(bounds) == 1 else _evolution
    search(bounds, begin, budget - 1, seed, measure)


def _grid(bounds: Mapping[str, Bounds], _begin: Mapping[str, float], budget: int, _seed: int, measure: Measure) -> None:
    [(place, (low, high))] = bounds.items()
    measure([{place: round(low + (high - low) * i / max(1, budget - 1), _DIGITS)} for i in range(budget)])


def _evolution(
    bounds: Mapping[str, Bounds], begin: Mapping[str, float], budget: int, seed: int, measure: Measure
) -> None:
    """CMA-ES in the unit cube of the bounds; whole generations, the last one cut."""
    if find_spec("cma") is None:
        raise NotInstalled("cma is not installed", remedy="pip install 'merger[search]'")
    import cma

    start = [min(1.0, max(0.0, (begin[place] - low) / (high - low))) for place, (low, high) in bounds.items()]
    options = {"bounds": [0, 1], "seed": seed + 1, "verbose": -9}  # to cma a seed of 0 is the time
    strategy = cma.CMAEvolutionStrategy(start, _SIGMA, options)
    left = budget
    while left > 0 and not strategy.stop():
        asked = strategy.ask()
        points = [_point(bounds, one) for one in asked[:left]]
        values = measure(points)
        left -= len(points)
        if len(points) == len(asked):
            strategy.tell(asked, values)


def _point(bounds: Mapping[str, Bounds], cube: Sequence[float]) -> Point:
    """The numbers at a point of the unit cube."""
    pairs = zip(bounds.items(), cube, strict=True)
    return {place: round(low + (high - low) * float(x), _DIGITS) for (place, (low, high)), x in pairs}

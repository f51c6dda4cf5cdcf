"""The loss along straight lines between models: whether they lie in one basin, so that averages make sense.

Pure: which candidates to measure and what the figures say (Frankle et al. 2020, arXiv 1912.05671).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merger.evaluation import Measured
from merger.methods.fine_tunes import Interpolate
from merger.methods.method import Judge, Method


@dataclass(frozen=True)
class Line:
    """A metric along the line from one model (t = 0) to another (t = 1), at increasing places."""

    first: str
    other: str
    metric: str
    lower_is_better: bool
    places: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """How much worse than on the chord between the ends it gets at the worst place; at most 0 without a barrier."""
        sign = 1.0 if self.lower_is_better else -1.0
        a, b = self.values[0], self.values[-1]
        chord = [(1 - t) * a + t * b for t in self.places]
        return max(sign * (value - c) for value, c in zip(self.values, chord, strict=True))

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        ends = {"first": self.first, "other": self.other, "metric": self.metric, "barrier": self.barrier}
        return {**ends, "places": list(self.places), "values": list(self.values)}


def measured_line(first: str | Method, other: str | Method, points: int, evaluation: Measured, judge: Judge) -> Line:
    """Measure `points` models from one end to the other, both included. Raises RequestError and JobError."""
    places = tuple(i / (points - 1) for i in range(points))
    between: Sequence[str | Method] = [Interpolate(sources=[first, other], t=t) for t in places[1:-1]]
    scores = judge.scores([first, *between, other], evaluation)
    values = tuple(score.metrics[evaluation.by] for score in scores)
    return Line(_label(first), _label(other), evaluation.by, evaluation.lower_is_better, places, values)


def _label(model: str | Method) -> str:
    return model if isinstance(model, str) else f"({model.method})"

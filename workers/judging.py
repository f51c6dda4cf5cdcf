"""Measures candidates as Ray tasks, several at once. Knows Ray's tasks; what measuring is, `merger.judging` knows.

Scores are remembered in a folder of the job, so that a later attempt goes on from what the earlier ones measured, and
in the order of the candidates, so that the same is chosen by any number of workers.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from merger.errors import WorkerDied
from merger.evaluation import Measured, Score
from merger.judging import LocalJudge, Remembered
from merger.methods.method import Judge, Method
from merger.reach import Reach
from merger.sources import sources_within
from workers.placement import options_of
from workers.resources import Request

_RETRIES = 3  # of a task whose process dies


def measure(ask: "_Ask", folder: Path, reach: Reach, place: Path) -> Score:
    """What a task does: the score of one candidate, from a process of its own. `place` is where paths begin."""
    os.chdir(place)
    with LocalJudge(sources_within(reach), Remembered(folder), lambda _text: None, reach) as judge:
        return judge.score(ask.candidate, ask.evaluation, ask.key, ask.along)


@dataclass(frozen=True)
class _Ask:
    """What a judge is asked."""

    candidate: str | Method
    evaluation: Measured
    key: str | None = None
    along: Sequence[str | Method] = ()


class RayJudge(Judge):
    """Measures on the cluster. May be interrupted by any exception; `stop` then ends what is left."""

    def __init__(
        self,
        folder: Path,
        reach: Reach,
        request: Request,
        connect: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._reach, self._connect, self._say = folder, reach, connect, say
        self._options = options_of(request)
        self._left: list[Any] = []

    def score(
        self,
        candidate: str | Method,
        evaluation: Measured,
        key: str | None = None,
        along: Sequence[str | Method] = (),
    ) -> Score:
        [score] = self._answers([_Ask(candidate, evaluation, key, along)])
        return score

    def scores(self, candidates: Sequence[str | Method], evaluation: Measured) -> list[Score]:
        return self._answers([_Ask(candidate, evaluation) for candidate in candidates])

    def _answers(self, asks: Sequence[_Ask]) -> list[Score]:
        self._connect()
        task: Any = ray.remote(measure).options(**self._options, max_retries=_RETRIES)
        place = Path.cwd()
        self._left = [task.remote(ask, self._folder, self._reach, place) for ask in asks]
        found: dict[Any, Score] = {}
        waiting = list(self._left)
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=1.0)
            for reference in ready:
                found[reference] = _result(reference)
                self._say(f"measured {len(found)} of {len(asks)}")
        scores = [found[reference] for reference in self._left]
        self._left = []
        return scores

    def stop(self) -> None:
        """Kill the processes of the tasks that are left."""
        for reference in self._left:
            ray.cancel(reference, force=True)
        self._left = []


def _result(reference: Any) -> Score:
    try:
        return ray.get(reference)  # type: ignore[no-any-return]
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from error
    except ray.exceptions.RayError as error:
        cause = str(error).splitlines()[0]
        raise WorkerDied(f"its process died {_RETRIES + 1} times: {cause}", where="measuring a candidate") from error

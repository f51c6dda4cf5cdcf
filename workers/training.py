"""Trains the stages of a recipe as Ray tasks. Knows Ray's tasks; what a stage is, `merger.fine_tuning` knows."""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from merger.errors import WorkerDied
from merger.fine_tuning import Order, in_order, models_of, orders_of, train_apart
from merger.methods.method import Sources, Trainer
from merger.reach import Reach
from merger.stages import Training
from workers.placement import options_of
from workers.resources import Request

_RETRIES = 3  # of a task that dies, or whose process for training does: the stage goes on from its last state
_AT_ONCE = 64  # tasks that Ray knows of


def train(order: Order, reach: Reach, place: Path) -> int:
    """What a task does: train one stage in a process of its own; the step after which it went on, 0 where it began
    anew. `place` is where paths begin.
    """
    os.chdir(place)
    return 0 if order.is_finished() else train_apart(order, reach, lambda _text: None, threading.Event())


class RayTrainer(Trainer):
    """Trains on the cluster, each stage as soon as those that it needs are finished."""

    def __init__(
        self,
        sources: Sources,
        reach: Reach,
        request: Request,
        connect: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self._sources, self._connect, self._say = sources, connect, say
        self._reach = reach
        self._options = options_of(request)

    def trained(self, training: Training, models: Sequence[str]) -> tuple[list[str], list[str]]:
        self._connect()
        orders = orders_of(training, models, self._sources)
        in_order(orders, self._train, _AT_ONCE)
        return models_of(training, orders)

    def _train(self, order: Order, stopped: threading.Event) -> None:
        retried = {"max_retries": _RETRIES, "retry_exceptions": [WorkerDied]}
        task: Any = ray.remote(train).options(**self._options, **retried)
        reference = task.remote(order, self._reach, Path.cwd())
        while not ray.wait([reference], timeout=1.0)[0]:
            if stopped.is_set():
                ray.cancel(reference, force=True)
                return
        try:
            began = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from error
        except ray.exceptions.RayError as error:
            cause = str(error).splitlines()[0]
            raise WorkerDied(f"its process died {_RETRIES + 1} times: {cause}", where=order.stage.name) from error
        self._say(f"trained {order.stage.name}" + (f", which went on after step {began}" if began else ""))

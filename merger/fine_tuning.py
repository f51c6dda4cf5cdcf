"""Trains the stages of a recipe on this machine, several at once. Knows processes and folders; knows nothing of torch.

A stage whose folder holds its finished model is not trained again; one that was interrupted goes on.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from merger.errors import WorkerDied
from merger.judging import Tell, check_installed, error_of, key_of_model
from merger.methods.method import Sources, Trainer
from merger.rows import rows_of
from merger.stages import KEEP_SECONDS, Stage, Training, is_finished
from merger.tasks import package_of, task_of


@dataclass(frozen=True)
class Order:
    """A stage with everything that a process needs to train it: where its weights come from and where it goes."""

    stage: Stage
    bodies: tuple[tuple[str, float], ...]
    head: str | None
    folder: Path
    key: str
    keep_seconds: float = KEEP_SECONDS

    def is_finished(self) -> bool:
        """Whether the folder holds the finished model of this very stage."""
        return is_finished(self.folder, self.key)


def orders_of(training: Training, models: Sequence[str], sources: Sources) -> list[Order]:
    """Every stage with its folder and digest, each after those that it needs. Raises RequestError."""
    package = package_of(training.task)
    task = task_of(training.task)
    labels = {path: task.labels(rows_of([Path(path).expanduser()])) for path in set(training.data_files)}
    keys = {model: key_of_model(model, sources) for model in models}
    folders = {model: model for model in models}
    orders = []
    for plain in training.stages(models, task.has_head):
        stage = replace(plain, labels=labels[plain.data], package=package)
        folder = Path(training.folder).expanduser() / stage.name
        key = stage.key(keys)
        keys[stage.name], folders[stage.name] = key, str(folder)
        bodies = tuple((folders[name], weight) for name, weight in stage.bodies)
        head = stage.head and folders[stage.head]
        orders.append(Order(stage, bodies, head, folder, key, training.keep_seconds))
    return orders


def needs(order: Order) -> set[str]:
    """The folders that must be finished before a stage can begin."""
    return {*(body for body, _ in order.bodies), *([order.head] if order.head else [])}


class LocalTrainer(Trainer):
    """Trains in processes of one thread each, as many as there are processors: the same model on any machine's number
    of them.
    """

    def __init__(self, sources: Sources, tell: Tell, roots: Sequence[Path] = ()) -> None:
        self._sources, self._tell = sources, tell
        self._roots = [str(root) for root in roots]

    def trained(self, training: Training, models: Sequence[str]) -> tuple[list[str], list[str]]:
        check_installed()
        orders = orders_of(training, models, self._sources)
        in_order(orders, self._train, os.cpu_count() or 1)
        return models_of(training, orders)

    def _train(self, order: Order, stopped: threading.Event) -> None:
        self._tell(f"training {order.stage.name}")
        train_apart(order, self._roots, self._tell, stopped)


def models_of(training: Training, orders: Sequence[Order]) -> tuple[list[str], list[str]]:
    """The folders of the auxiliary models and of those to average."""
    auxiliary = [str(order.folder) for order in orders if order.stage.name in training.auxiliary_stages]
    return auxiliary, [str(order.folder) for order in orders[-training.runs :]]


def in_order(orders: Sequence[Order], train: Any, at_once: int) -> None:
    """Train every stage that is not finished, `at_once` at a time, each after those that it needs.

    Raises what the first that fails raised; the others are stopped.
    """
    waiting = [order for order in orders if not order.is_finished()]
    unfinished = {str(order.folder) for order in waiting}
    stopped = threading.Event()
    running: dict[Future[None], str] = {}
    with ThreadPoolExecutor(at_once) as pool:
        try:
            while waiting or running:
                for order in [order for order in waiting if not needs(order) & unfinished]:
                    running[pool.submit(train, order, stopped)] = str(order.folder)
                    waiting.remove(order)
                done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    unfinished.discard(running.pop(future))
        except BaseException:
            stopped.set()
            raise


def train_apart(order: Order, roots: Sequence[str], tell: Tell, stopped: threading.Event, threads: int = 1) -> int:
    """Train one stage in a process of its own; the step after which it went on, 0 where it began anew.

    Raises what it tells, and WorkerDied where it dies.
    """
    request = {
        "stage": asdict(order.stage),
        "bodies": order.bodies,
        "head": order.head,
        "folder": str(order.folder),
        "key": order.key,
        "keep_seconds": order.keep_seconds,
        "threads": threads,
        "roots": list(roots),
    }
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            [sys.executable, "-m", "merger.training", order.stage.name],  # the name is for those who look at processes
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        with process:
            threading.Thread(target=_kill_when, args=(stopped, process), daemon=True).start()
            assert process.stdin
            assert process.stdout
            print(json.dumps(request), file=process.stdin, flush=True)
            began: int | None = None
            for line in process.stdout:
                answer: Mapping[str, Any] = json.loads(line)
                if "error" in answer:
                    raise error_of(answer["error"])
                if "finished" in answer:
                    return began or 0
                if began is None:
                    began = answer["done"] - 1
                    if began:
                        tell(f"{order.stage.name}: goes on after step {began} of {answer['total']}")
                if answer["done"] == answer["total"] or answer["done"] % 50 == 0:
                    tell(f"{order.stage.name}: step {answer['done']} of {answer['total']}, loss {answer['loss']:.4f}")
        complaints.seek(0)
        words = (complaints.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise WorkerDied(f"the process that trains {order.stage.name} has died: {words}")


def _kill_when(stopped: threading.Event, process: "subprocess.Popen[str]") -> None:
    while process.poll() is None:
        if stopped.wait(0.5):
            process.kill()
            return

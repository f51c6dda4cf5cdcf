"""Trains the stages of a recipe on this machine, several at once. Knows processes and folders; knows nothing of torch.

A stage whose folder holds its finished model is not trained again; one that was interrupted goes on.
"""

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from merger.errors import WorkerDied
from merger.host import processors
from merger.judging import Tell, check_installed, error_of, key_of_model
from merger.methods.method import Sources, Trainer
from merger.reach import OWN, Reach
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

    def __init__(self, sources: Sources, tell: Tell, reach: Reach = OWN) -> None:
        self._sources, self._tell = sources, tell
        self._reach = reach
        self._idle: queue.SimpleQueue[TrainingProcess] = queue.SimpleQueue()

    def trained(self, training: Training, models: Sequence[str]) -> tuple[list[str], list[str]]:
        check_installed()
        orders = orders_of(training, models, self._sources)
        try:
            in_order(orders, self._train, processors())
        finally:
            while not self._idle.empty():
                self._idle.get().close()
        return models_of(training, orders)

    def _train(self, order: Order, stopped: threading.Event) -> None:
        self._tell(f"training {order.stage.name}")
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = TrainingProcess(stopped)
        try:
            process.train(order, self._reach, self._tell)
        except BaseException:
            process.close()
            raise
        self._idle.put(process)


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


class TrainingProcess:
    """A process that trains one stage after the other, so that what training needs is loaded once. It is killed when
    `stopped` is set; `label` is for those who look at processes.
    """

    def __init__(self, stopped: threading.Event, label: str = "") -> None:
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "merger.training", *([label] if label else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
        )
        threading.Thread(target=self._kill_when, args=(stopped,), daemon=True).start()

    def train(self, order: Order, reach: Reach, tell: Tell, threads: int = 1) -> int:
        """Train one stage; the step after which it went on, 0 where it began anew.

        Raises what the process tells, and WorkerDied where it dies.
        """
        request = {
            "stage": asdict(order.stage),
            "bodies": order.bodies,
            "head": order.head,
            "folder": str(order.folder),
            "key": order.key,
            "keep_seconds": order.keep_seconds,
            "threads": threads,
            "reach": reach.as_data(),
        }
        began: int | None = None
        for answer in self._answers(request):
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
        raise WorkerDied(f"the process that trains {order.stage.name} has died: {self._last_words()}")

    def _answers(self, request: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
            for line in self._process.stdout:
                yield json.loads(line)

    def _last_words(self) -> str:
        code = self._process.wait()
        self._complaints.seek(0)
        return (self._complaints.read().strip().splitlines() or [f"exit code {code}"])[-1]

    def _kill_when(self, stopped: threading.Event) -> None:
        while self._process.poll() is None:
            if stopped.wait(0.5):
                self._process.kill()

    def close(self) -> None:
        """End the process; it leaves whatever it is at."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._complaints.close()


def train_apart(order: Order, reach: Reach, tell: Tell, stopped: threading.Event, threads: int = 1) -> int:
    """Train one stage in a process of its own, as `TrainingProcess.train` does."""
    process = TrainingProcess(stopped, order.stage.name)
    try:
        return process.train(order, reach, tell, threads)
    finally:
        process.close()

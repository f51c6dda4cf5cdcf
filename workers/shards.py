"""One Ray task for each shard. Knows Ray's tasks and how they die; knows nothing of the API.

A task streams a sign that it has begun, numbers (bytes that it has written), signs while it uploads, and at last the
shard's receipt. A task whose process died is run again, under another name for its unfinished file, unless the shard
turns out to be finished. As long as no task could begin, because its node has still to come, that is no standstill.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from merger import kernels
from merger.budget import Allotment
from merger.destination import Destination
from merger.engine import write_shards
from merger.errors import WorkerDied
from merger.plan import Shard
from merger.receipt import Receipt, read_receipt
from merger.uploads import Uploads
from workers.placement import options_of
from workers.resources import Request

_MOST_DEATHS = 4  # of the processes that work on one shard
_IN_FLIGHT = 64  # tasks that Ray knows of at once: their plans lie in its store
_TELL = 0.25  # seconds between two numbers of a task
_WAIT = 30.0  # seconds between two signs that no task could begin yet


class Uploading:
    """A sign that work goes on which writes nothing: a shard is on its way to the destination, or a tensor is made as
    a whole.
    """


class Begun:
    """A sign that a task has found its place."""


Said = int | Uploading | Receipt


@dataclass(frozen=True)
class Work:
    """Everything that a task needs beside its shard: remote files in `cached` are downloaded whole, a finished shard is
    uploaded to the `destination`. Relative paths of sources begin at `place`, where the runner stands.
    """

    folder: Path
    allotment: Allotment
    fingerprint: str
    request: Request
    cached: Collection[str] = ()
    destination: Destination | None = None
    place: Path = field(default_factory=Path.cwd)


def write_shard(shard: Shard, work: Work, execution: str) -> Iterator[Said | Begun]:
    """What a task does: that it has begun, numbers of bytes as they are written, signs while it uploads, then the
    receipt.
    """
    os.chdir(work.place)
    yield Begun()
    kernels.load()
    written: queue.SimpleQueue[Said | BaseException] = queue.SimpleQueue()

    def write() -> None:
        try:
            [receipt] = write_shards(
                [shard],
                work.folder,
                work.allotment,
                work.fingerprint,
                execution=execution,
                cached=work.cached,
                on_bytes=written.put,
                on_sign=lambda: written.put(Uploading()),
            )
            if work.destination:
                _upload(receipt, work.folder, work.destination, lambda: written.put(Uploading()))
            written.put(receipt)
        except BaseException as error:
            written.put(error)

    threading.Thread(target=write, name="shard", daemon=True).start()
    yield from _in_steps(written)


def _upload(receipt: Receipt, folder: Path, destination: Destination, on_sign: Callable[[], None]) -> None:
    with Uploads(folder, destination, lambda _text: None, on_sign) as uploads:
        uploads.land([receipt])


def _in_steps(written: "queue.SimpleQueue[Said | BaseException]") -> Iterator[Said]:
    """Numbers summed up over a moment, signs, then the receipt. Raises what the engine raised."""
    total, due = 0, time.monotonic()
    while True:
        value = written.get()
        if isinstance(value, BaseException):
            raise value
        if isinstance(value, Receipt):
            yield total
            yield value
            return
        if isinstance(value, Uploading):
            yield value
            continue
        total += value
        if time.monotonic() >= due:
            yield total
            total, due = 0, time.monotonic() + _TELL


@dataclass
class _Task:
    shard: Shard
    stream: Any
    written: int = 0
    begun: bool = False


class ShardTasks:
    """Makes shards on the cluster. `run` may be interrupted by any exception; `stop` then ends what is left."""

    def __init__(
        self,
        work: Work,
        attempt: int,
        on_bytes: Callable[[int], None],
        on_shard: Callable[[Shard, Receipt], None],
        say: Callable[[str], None],
        on_upload: Callable[[], None] = lambda: None,
    ) -> None:
        self._work, self._attempt, self._on_bytes, self._on_shard, self._say = work, attempt, on_bytes, on_shard, say
        self._on_upload = on_upload
        self._tasks: dict[Any, _Task] = {}
        self._deaths: dict[str, int] = {}
        self._told = time.monotonic()
        self._remote: Any = ray.remote(write_shard).options(
            **options_of(work.request), num_returns="streaming", max_retries=0
        )

    def run(self, shards: Sequence[Shard]) -> list[Receipt]:
        """The receipts of the shards, in the order in which they are finished.

        Raises what a task raised, and WorkerDied.
        """
        waiting, receipts = list(reversed(shards)), list[Receipt]()
        while waiting or self._tasks:
            while waiting and len(self._tasks) < _IN_FLIGHT:
                self._submit(waiting.pop())
            ready, _ = ray.wait(list(self._tasks), timeout=1.0, fetch_local=False)
            for stream in ready:
                receipt = self._advance(stream)
                if receipt:
                    receipts.append(receipt)
            self._tell_waiting()
        return receipts

    def stop(self) -> None:
        """Kill the processes of the tasks that are left."""
        for task in self._tasks.values():
            ray.cancel(task.stream, force=True)
        self._tasks.clear()

    def _tell_waiting(self) -> None:
        """Give a sign from time to time while every task waits for a node; a task that stands still hides no more."""
        if not self._tasks or any(task.begun for task in self._tasks.values()) or time.monotonic() < self._told + _WAIT:
            return
        self._told = time.monotonic()
        self._say("no task could begin yet: the cluster has no room for one now")
        self._on_upload()

    def _submit(self, shard: Shard) -> None:
        execution = f".{self._attempt}.{self._deaths.get(shard.name, 0)}"
        stream = self._remote.remote(shard, self._work, execution)
        self._tasks[stream] = _Task(shard, stream)

    def _advance(self, stream: Any) -> Receipt | None:
        """Take the next thing that a task says; its receipt where that was the last."""
        task = self._tasks[stream]
        try:
            said = ray.get(next(stream))
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from error
        except (ray.exceptions.RayError, StopIteration) as error:
            del self._tasks[stream]
            self._on_bytes(-task.written)
            return self._after_death(task.shard, error)
        task.begun = True
        if isinstance(said, Begun):
            return None
        if isinstance(said, int):
            task.written += said
            self._on_bytes(said)
            return None
        if isinstance(said, Uploading):
            self._on_upload()
            return None
        del self._tasks[stream]
        self._on_bytes(task.shard.size - task.written)  # the header, and what a lost number would have said
        self._on_shard(task.shard, said)
        return said  # type: ignore[no-any-return]

    def _after_death(self, shard: Shard, error: Exception) -> Receipt | None:
        receipt = read_receipt(self._work.folder, shard.name, self._work.fingerprint)
        if receipt:  # it died after its work was done
            self._on_bytes(shard.size)
            self._on_shard(shard, receipt)
            return receipt
        self._deaths[shard.name] = self._deaths.get(shard.name, 0) + 1
        self._say(f"{shard.name}: its process died ({type(error).__name__}), run again")
        if self._deaths[shard.name] >= _MOST_DEATHS:
            cause = str(error).splitlines()[0]
            raise WorkerDied(f"its process died {_MOST_DEATHS} times: {cause}", where=shard.name) from error
        self._submit(shard)
        return None

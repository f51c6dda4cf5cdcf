"""Uploads of finished shards while others are still made. Knows queues and threads; knows nothing of destinations."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Self

from merger.destination import Destination, Landed, uploaded
from merger.plan import Plan
from merger.receipt import Receipt

_AT_ONCE = 2  # each may use several connections
_SIGN = 5.0  # seconds between two signs that uploads are under way
_SLOWEST, _GRACE = 64 << 10, 60.0  # bytes a second, and seconds: what takes longer gives no signs any more


class Uploads:
    """Uploads the shards of a folder as they are finished. `with` waits for those that are under way, unless it is left
    by an interruption: the next run sends them again.

    `on_sign` is called while `land` waits, as long as the slowest upload that is borne could take.
    """

    def __init__(
        self,
        folder: Path,
        destination: Destination,
        say: Callable[[str], None],
        on_sign: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder, self._destination, self._say, self._on_sign = folder, destination, say, on_sign
        self._under_way: dict[str, Future[Landed]] = {}
        self._waiting: SimpleQueue[str | None] = SimpleQueue()
        self._threads = [Thread(target=self._work, name=f"upload-{i}", daemon=True) for i in range(_AT_ONCE)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while name := self._waiting.get():
            done = self._under_way[name]
            if not done.set_running_or_notify_cancel():
                continue
            try:
                done.set_result(uploaded(self._folder, name, self._destination))
            except BaseException as error:
                done.set_exception(error)

    def add(self, receipt: Receipt) -> None:
        """Upload a finished shard, unless that was done."""
        if receipt.file not in self._under_way:
            self._under_way[receipt.file] = Future()
            self._waiting.put(receipt.file)

    def land(self, receipts: Sequence[Receipt]) -> Mapping[str, Landed]:
        """Wait until every shard has landed. Raises WriteFailed."""
        for receipt in receipts:
            self.add(receipt)
        left = sum(not done.done() for done in self._under_way.values())
        if left:
            self._say(f"uploading to {self._destination.name}: {left} of {len(receipts)} files are left")
        self._give_signs(time.monotonic() + _GRACE + sum(receipt.size for receipt in receipts) / _SLOWEST)
        return {name: done.result() for name, done in self._under_way.items()}

    def _give_signs(self, until: float) -> None:
        while time.monotonic() < until and wait(self._under_way.values(), _SIGN).not_done:
            self._on_sign()

    def finish(self, plan: Plan, receipts: Sequence[Receipt]) -> str:
        """Wait for all shards and publish the folder; returns the address. Raises WriteFailed and OutputOccupied."""
        landed = self.land(receipts)
        self._say(f"publishing {self._destination.name}")
        return self._destination.publish(self._folder, plan, landed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for done in self._under_way.values():
            done.cancel()
        for _ in self._threads:
            self._waiting.put(None)
        if error is None or isinstance(error, Exception):
            for thread in self._threads:
                thread.join()

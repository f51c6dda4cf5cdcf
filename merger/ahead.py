"""Fetches from afar what the next blocks of an output are made from, before they are asked for.

Knows blocks, byte ranges and memory; knows nothing of networks. Blocks are grouped into windows in the order in which
they will be made. What a window needs is asked for in a few large requests, several at once; its memory is free again
when its last block is done.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from queue import SimpleQueue

from merger.expression import ByteRange, File
from merger.kernels import Bytes
from merger.remote import Remote
from merger.storage.disk import PAGE, page_aligned, round_up

CONNECTIONS = 8
WINDOWS = 4  # that share the memory: one is used, the others are on their way
_LARGEST_REQUEST = 16 << 20  # bytes
_SMALLEST_REQUEST = 1 << 20
_GAP, _SMALL_GAP, _WASTE = 4 << 20, 4 << 10, 32  # what lies between is fetched too where it is little: 1/32 of the rest

Demand = tuple[Hashable, Sequence[ByteRange]]  # a block, and the bytes that it is made from


class Segment:
    """Consecutive bytes of a file that one request fetches, placed in memory as they lie in the file's pages."""

    def __init__(self, file: File, start: int, stop: int, room: int) -> None:
        self.file, self.start, self.stop = file, start, stop
        self.memory = room
        self._data: Bytes | None = None
        self._buffer: Bytes | None = None
        self._done: Future[None] = Future()

    def fetch(self, buffers: "_Buffers") -> None:
        """Ask for the bytes; whoever waits for them gets the error."""
        assert isinstance(self.file.path, Remote)
        if not self._done.set_running_or_notify_cancel():
            return
        with suppress(InvalidStateError):  # nobody waits any more
            try:
                skip = self.start % PAGE
                self._buffer = buffers.take(self.memory)
                self._data = self._buffer[skip : skip + self.stop - self.start]
                self.file.path.fetch(self.start, self._data.data)
            except BaseException as error:
                self._done.set_exception(error)
            else:
                self._done.set_result(None)

    def part(self, start: int, stop: int) -> Bytes:
        """The bytes of the file from `start` to `stop`, which lie in this segment; waits for them."""
        self._done.result()
        assert self._data is not None
        return self._data[start - self.start : stop - self.start]

    def drop(self, then: Callable[["Segment"], None]) -> None:
        """Let go of the bytes; calls `then` when nothing is written to their memory any more."""
        self._done.cancel()
        self._done.add_done_callback(lambda _: then(self))

    def give_up(self) -> None:
        """Let nobody wait any longer. A request that is under way goes on, and its memory with it."""
        with suppress(InvalidStateError):
            if not self._done.cancel():
                self._done.set_exception(CancelledError())

    def empty(self) -> Bytes | None:
        """The memory, if it came to that, for another use."""
        buffer, self._buffer, self._data = self._buffer, None, None
        return buffer


class _Buffers:
    """At most `limit` bytes of memory for segments. Those of the largest `size` are used again: fresh pages cost more
    than the bytes that come to lie in them.
    """

    def __init__(self, size: int, limit: int) -> None:
        self._size, self._limit, self._spare = size, limit, list[Bytes]()
        self._total = 0
        self._lock = threading.Lock()
        self.retired = False

    def take(self, size: int) -> Bytes:
        with self._lock:
            if size == self._size and self._spare:
                return self._spare.pop()
            while self._spare and self._total + size > self._limit:
                self._total -= self._spare.pop().size
            self._total += size
        return page_aligned(size)

    def give(self, buffer: Bytes) -> None:
        with self._lock:
            if buffer.size == self._size and not self.retired:
                self._spare.append(buffer)
            else:
                self._total -= buffer.size


class _Window:
    """What some consecutive blocks need, and how many of them are not done."""

    def __init__(self, segments: Iterable[Segment], blocks: int) -> None:
        self.segments = list(segments)
        self.left = blocks
        self.memory = sum(segment.memory for segment in self.segments)
        self._of_file: dict[File, list[Segment]] = {}  # by their starts, none overlaps another
        for segment in self.segments:
            self._of_file.setdefault(segment.file, []).append(segment)

    def covering(self, file: File, position: int) -> Segment | None:
        """The segment that holds a byte of a file."""
        segments = self._of_file.get(file, [])
        before = bisect_right(segments, position, key=lambda segment: segment.start)
        return segments[before - 1] if before and position < segments[before - 1].stop else None


class Ahead:
    """What blocks are made from, fetched in their order, in at most `memory` bytes (a block that needs more has them to
    itself). Safe for threads: each says which block it begins, reads, and says that it is done.
    """

    def __init__(self, demands: Iterable[Demand], memory: int) -> None:
        self._windows = _windows(demands, memory // WINDOWS)
        self._buffers = _Buffers(_room(_largest_request(memory // WINDOWS), memory // WINDOWS), memory)
        self._memory, self._held = memory, 0
        self._changed = threading.Condition()
        self._of_block: dict[Hashable, _Window] = {}
        self._here = threading.local()  # the window of the thread's block: no other stays until the thread is done
        self._stopped = False
        self._error: BaseException | None = None
        self._requests: SimpleQueue[Segment | None] = SimpleQueue()
        # Daemons: a command that is interrupted does not wait for a server that does not answer.
        self._planner = threading.Thread(target=self._plan, name="ahead", daemon=True)
        fetchers = [threading.Thread(target=self._fetch, name=f"fetch-{i}", daemon=True) for i in range(CONNECTIONS)]
        for thread in [self._planner, *fetchers]:
            thread.start()

    def _plan(self) -> None:
        """Start a window whenever there is room for it."""
        try:
            for window, blocks in self._windows:
                with self._changed:
                    self._changed.wait_for(
                        lambda size=window.memory: (
                            self._stopped  # type: ignore[misc]
                            or not self._held
                            or self._held + size <= self._memory
                        )
                    )
                    if self._stopped:
                        return
                    self._held += window.memory
                    self._of_block.update(dict.fromkeys(blocks, window))
                    self._changed.notify_all()
                for segment in window.segments:
                    self._requests.put(segment)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _fetch(self) -> None:
        while segment := self._requests.get():
            segment.fetch(self._buffers)

    def begin(self, block: Hashable) -> None:
        """Wait until what a block needs is on its way. Raises what went wrong where that is planned."""
        with self._changed:
            self._changed.wait_for(lambda: block in self._of_block or self._stopped or self._error)
            if self._error:
                raise self._error
            self._here.window = self._of_block.get(block)

    def done(self, block: Hashable) -> None:
        """A block is made, or given up; the last of its window frees the window's memory."""
        with self._changed:
            self._here.window = None
            window = self._of_block.pop(block, None)
            if window is None:
                return
            window.left -= 1
            if window.left:
                return
            for segment in window.segments:
                segment.drop(self._free)

    def _free(self, segment: Segment) -> None:
        buffer = segment.empty()
        if buffer is not None:
            self._buffers.give(buffer)
        with self._changed:
            self._held -= segment.memory
            self._changed.notify_all()

    def covering(self, file: File, position: int) -> Segment | None:
        """A segment that holds a byte of a file, and does so until this thread's block is done."""
        window: _Window | None = getattr(self._here, "window", None)
        return window.covering(file, position) if window else None

    def close(self) -> None:
        """Fetch nothing more; requests that are under way end by themselves, and nobody waits for them."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._planner.join()
        self._buffers.retired = True
        with self._changed:
            waited = set(self._of_block.values())
        for segment in [segment for window in waited for segment in window.segments]:
            segment.give_up()
        for _ in range(CONNECTIONS):
            self._requests.put(None)


def _windows(demands: Iterable[Demand], memory: int) -> Iterator[tuple[_Window, list[Hashable]]]:
    """Blocks in their order, as many at once as `memory` bytes serve, at least one."""
    ranges: set[tuple[File, int, int]] = set()
    blocks: list[Hashable] = []
    size = 0
    for block, wanted in demands:
        parts = {(part.file, part.start, part.stop) for part in wanted if part.stop > part.start}
        more = sum(stop - start + 2 * PAGE for _, start, stop in parts - ranges)
        if blocks and size + more > memory:
            yield _Window(_segments(ranges, memory), len(blocks)), blocks
            ranges, blocks, size = set(), [], 0
        ranges |= parts
        blocks.append(block)
        size += more
    if blocks:
        yield _Window(_segments(ranges, memory), len(blocks)), blocks


def _segments(ranges: Iterable[tuple[File, int, int]], memory: int) -> Iterator[Segment]:
    """The ranges as requests: neighbours at once, with what lies between where that is little, none too large."""
    largest = _largest_request(memory)
    for file, start, stop in _joined(ranges):
        count = -(-(stop - start) // largest)
        step = -(-(stop - start) // count // PAGE) * PAGE or PAGE
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            yield Segment(file, begin, end, _room(end - begin, memory))


def _largest_request(memory: int) -> int:
    """The bytes of the largest request of a window of `memory` bytes."""
    return max(_SMALLEST_REQUEST, min(_LARGEST_REQUEST, memory // CONNECTIONS))


def _room(size: int, memory: int) -> int:
    """The memory that so many bytes take, whole pages: large requests take as much as the largest, to be used again."""
    largest = _largest_request(memory)
    return round_up(largest if size > largest // 2 else size) + PAGE


def _joined(ranges: Iterable[tuple[File, int, int]]) -> Iterator[tuple[File, int, int]]:
    current: tuple[File, int, int] | None = None
    for file, start, stop in sorted(ranges, key=lambda part: (id(part[0]), part[1])):
        if current and file is current[0] and _worth(start - current[2], current[2] - current[1] + stop - start):
            current = (file, current[1], max(current[2], stop))
            continue
        if current:
            yield current
        current = (file, start, stop)
    if current:
        yield current


def _worth(gap: int, around: int) -> bool:
    """Whether one request with a gap is better than two without."""
    return gap <= min(_GAP, max(_SMALL_GAP, around // _WASTE))

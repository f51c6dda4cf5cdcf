"""Fetching ahead: every wanted byte and little else, within the memory, right whatever the order and the threads."""

import mmap
import random
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from merger import ahead
from merger.ahead import Ahead, Demand
from merger.errors import ReadFailed
from merger.expression import ByteRange, File
from merger.reader import OpenFiles
from merger.remote import Remote

KIB, MIB = 1 << 10, 1 << 20
PERIOD = 1_000_003
NOISE = np.tile(np.random.default_rng(0).integers(0, 256, PERIOD, np.uint8), 18)


def content(seed: int, start: int, stop: int) -> bytes:
    """Bytes of a file of any length, by which the place can be told."""
    begin = (start + 7919 * seed) % PERIOD
    return NOISE[begin : begin + stop - start].tobytes()


class Recorded(Remote):
    """A file of made-up bytes that notes what it is asked for. `before` is called with a request's start and may wait
    or fail.
    """

    def __init__(self, seed: int = 0, before: Callable[[int], None] = lambda _: None) -> None:
        self.seed, self._before = seed, before
        self.requests: list[tuple[int, int]] = []

    @property
    def address(self) -> str:
        return f"test://{self.seed}"

    def fetch(self, start: int, into: memoryview) -> None:
        self.requests.append((start, start + len(into)))
        self._before(start)
        into[:] = content(self.seed, start, start + len(into))

    def download(self) -> Path:
        raise NotImplementedError


def file_of(remote: Recorded) -> File:
    return File(remote, 1 << 40, 0, "")


def demands_of(files: Sequence[File], ranges: Sequence[Sequence[tuple[int, int, int]]]) -> list[Demand]:
    return [
        (number, [ByteRange(files[which], start, start + length, "U8") for which, start, length in wanted])
        for number, wanted in enumerate(ranges)
    ]


def read(inputs: OpenFiles, wanted: Sequence[ByteRange]) -> bool:
    """Whether every range holds what it should."""
    right = True
    for part in wanted:
        with inputs.lease(part.file) as file:
            found = file.read(part.start, part.stop, np.empty(part.stop - part.start + 8 * KIB, np.uint8))
        assert isinstance(part.file.path, Recorded)
        right &= found.tobytes() == content(part.file.path.seed, part.start, part.stop)
    return right


def serve(demands: Sequence[Demand], memory: int, order: Sequence[int] | None = None, threads: int = 1) -> list[bool]:
    """Read all blocks as the engine does: each thread takes the next one."""
    inputs = OpenFiles()
    inputs.ahead = Ahead(demands, memory)

    def make(demand: Demand) -> bool:
        with inputs.serving(demand[0]):
            return read(inputs, demand[1])

    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(make, [demands[i] for i in order] if order else demands))
    finally:
        inputs.close()


LENGTHS = st.one_of(st.integers(1, 20), st.integers(1, 64 * KIB), st.integers(MIB, 2 * MIB))
STARTS = st.one_of(st.integers(0, 64 * KIB), st.integers(0, 8 * MIB), st.integers(0, 1 << 39))
BLOCKS = st.lists(st.lists(st.tuples(st.integers(0, 1), STARTS, LENGTHS), max_size=4), min_size=1, max_size=8)
MEMORIES = st.sampled_from([0, 256 * KIB, 4 * MIB, 32 * MIB])


# ---- windows ------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(BLOCKS, MEMORIES)
def test_windows_hold_every_wanted_byte_in_requests_that_are_not_too_large(ranges, memory):
    files = [file_of(Recorded(i)) for i in range(2)]
    demands = demands_of(files, ranges)
    wanted = dict(demands)
    seen: list[int] = []
    for window, blocks in ahead._windows(demands, memory):
        seen += blocks
        parts = [part for block in blocks for part in wanted[block]]
        for file in files:
            held = sorted((s.start, s.stop) for s in window.segments if s.file is file)
            assert all(stop - start <= ahead._largest_request(memory) for start, stop in held)
            assert all(stop <= start for (_, stop), (start, _) in pairwise(held))
            asked = [(part.start, part.stop) for part in parts if part.file is file]
            assert joined(held) == joined([*asked, *gaps_worth_fetching(joined(asked), joined(held))])
    assert seen == list(wanted)


def joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges without what they share, neighbours as one."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


def gaps_worth_fetching(wanted: Sequence[tuple[int, int]], held: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of what lies between the wanted ranges, what may be fetched with them: 4 KiB, or 1/32 of the request and at most
    4 MiB.
    """
    found = []
    for (_, stop), (start, _) in pairwise(wanted):
        around = next(((a, b) for a, b in held if a <= stop and start <= b), None)
        if around and start - stop <= max(4 * KIB, min(4 * MIB, (around[1] - around[0]) // 32)):
            found.append((stop, start))
    return found


def test_neighbours_are_one_request():
    file = file_of(Recorded())
    (window, _), *more = ahead._windows(demands_of([file], [[(0, i * 1000, 1000)] for i in range(100)]), 64 * MIB)
    assert [(segment.start, segment.stop) for segment in window.segments] == [(0, 100_000)]
    assert more == []


def test_large_ranges_come_in_several_requests_of_about_the_same_size():
    file = file_of(Recorded())
    ((window, _),) = ahead._windows(demands_of([file], [[(0, 0, 100 * MIB)]]), 128 * MIB)
    sizes = [segment.stop - segment.start for segment in window.segments]
    assert len(sizes) == 7
    assert max(sizes) - min(sizes) < 64 * KIB


def test_copies_are_fetched_once_in_a_window():
    file = file_of(Recorded())
    ((window, blocks),) = ahead._windows(demands_of([file], [[(0, 500, MIB)]] * 8), 4 * MIB)
    assert len(blocks) == 8
    assert sum(segment.stop - segment.start for segment in window.segments) == MIB


# ---- memory -------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(BLOCKS, MEMORIES, st.integers(1, 4))
@example([[(0, i * MIB, 10)] for i in range(300)], 256 * KIB, 4)  # each costs whole pages
@example([[(0, i * 8 * MIB, 600 * KIB)] for i in range(40)] + [[(0, 1 << 38, 400 * KIB)]] * 20, 4 * MIB, 2)
def test_no_more_memory_than_was_allowed_but_for_a_block_that_needs_more_alone(ranges, memory, threads):
    files = [file_of(Recorded(i)) for i in range(2)]
    demands = demands_of(files, ranges)
    alone = max(sum(s.memory for s in w.segments) for d in demands for w, _ in ahead._windows([d], memory // 4))
    with Watched() as watched:
        assert all(serve(demands, memory, threads=threads))
    assert watched.most <= max(memory, alone)


class Watched:
    """Counts the bytes of memory that are held for segments."""

    def __enter__(self) -> "Watched":
        self.now = self.most = 0
        self._lock = threading.RLock()
        self._original, ahead.page_aligned = ahead.page_aligned, self._take
        return self

    def _take(self, size: int) -> np.ndarray:
        memory = mmap.mmap(-1, size)
        weakref.finalize(memory, self._change, -size)
        self._change(size)
        return np.frombuffer(memory, np.uint8)

    def _change(self, count: int) -> None:
        with self._lock:
            self.now += count
            self.most = max(self.most, self.now)

    def __exit__(self, *_: object) -> None:
        ahead.page_aligned = self._original


# ---- order and threads --------------------------------------------------------------------------------


@settings(max_examples=40)
@given(BLOCKS, MEMORIES, st.integers(1, 4))
def test_any_number_of_threads_reads_the_right_bytes(ranges, memory, threads):
    files = [file_of(Recorded(i)) for i in range(2)]
    assert all(serve(demands_of(files, ranges), memory, threads=threads))


def test_blocks_that_go_on_at_once_may_be_done_in_any_order():
    files = [file_of(Recorded())]
    demands = demands_of(files, [[(0, i * MIB, 500 * KIB)] for i in range(40)])
    order = list(range(40))
    for first in range(0, 40, 4):  # as threads do that overtake each other
        order[first : first + 4] = random.Random(first).sample(order[first : first + 4], 4)
    assert all(serve(demands, 64 * MIB, order, threads=4))


def test_what_another_block_holds_too_stays_until_both_are_done():
    """A window that ends takes its memory along: nobody else may be reading there."""
    files = [file_of(Recorded())]
    demands = demands_of(
        files, [[(0, 0, 900 * KIB)], [(0, 0, 800 * KIB)], *[[(0, i << 30, 900 * KIB)] for i in range(1, 9)]]
    )
    inputs = OpenFiles()
    inputs.ahead = Ahead(demands, 4 * MIB)

    def make(number: int) -> bool:
        with inputs.serving(number):
            return read(inputs, demands[number][1])

    with ThreadPoolExecutor(1) as another, inputs.serving(1), inputs.lease(files[0]) as file:
        found = file.read(0, 800 * KIB, np.empty(MIB, np.uint8))
        assert all(another.map(make, [0, *range(2, 9)]))
        assert found.tobytes() == content(0, 0, 800 * KIB)
    inputs.close()


def test_each_byte_is_asked_for_once_where_no_window_shares_it():
    remote = Recorded()
    demands = demands_of([file_of(remote)], [[(0, i * MIB, MIB)] for i in range(64)])
    assert all(serve(demands, 16 * MIB, threads=4))
    assert joined(remote.requests) == [(0, 64 * MIB)]
    assert sum(stop - start for start, stop in remote.requests) == 64 * MIB


# ---- what goes wrong ----------------------------------------------------------------------------------


def fail(_start: int) -> None:
    raise ReadFailed("is gone")


def test_whoever_needs_the_bytes_gets_the_error():
    demands = demands_of([file_of(Recorded(before=fail))], [[(0, 0, 100)]])
    with pytest.raises(ReadFailed, match="is gone"):
        serve(demands, 4 * MIB)


def test_an_error_in_the_demands_reaches_whoever_waits():
    def demands():
        yield 0, []
        raise KeyError("a tensor")

    with pytest.raises(KeyError, match="a tensor"):
        serve_all(Ahead(demands(), 4 * MIB), range(2))


def serve_all(fetching: Ahead, blocks: Sequence[int]) -> None:
    inputs = OpenFiles()
    inputs.ahead = fetching
    try:
        for block in blocks:
            with inputs.serving(block):
                pass
    finally:
        inputs.close()


def test_a_block_that_fails_keeps_nobody_waiting_for_its_memory():
    """Each block needs more than half of the memory: the second begins when the first is gone."""
    bad, good = file_of(Recorded(0, fail)), file_of(Recorded(1))
    demands = demands_of([bad, good], [[(0, 0, 3 * MIB)], [(1, 0, 3 * MIB)]])
    inputs = OpenFiles()
    inputs.ahead = Ahead(demands, 4 * MIB)
    with ThreadPoolExecutor(1) as pool:

        def second() -> bool:
            with inputs.serving(1):
                return read(inputs, demands[1][1])

        with pytest.raises(ReadFailed), inputs.serving(0):
            read(inputs, demands[0][1])
        assert pool.submit(second).result(timeout=60)
    inputs.close()


def test_memory_that_still_fills_is_not_used_again():
    """A block that is left before its bytes have come must not see them written into another one's."""
    late, free = threading.Event(), threading.Event()

    def hold(start: int) -> None:
        if not start:
            late.set()
            free.wait(60)

    files = [file_of(Recorded(0, hold)), file_of(Recorded(1))]
    demands = demands_of(files, [[(0, 0, MIB)], *[[(1, i * 8 * MIB, MIB)] for i in range(8)]])
    inputs = OpenFiles()
    inputs.ahead = Ahead(demands, 4 * MIB)

    def make(number: int) -> bool:
        with inputs.serving(number):
            return read(inputs, demands[number][1])

    with inputs.serving(0):
        late.wait(60)
    with ThreadPoolExecutor(1) as another, inputs.serving(1), inputs.lease(files[1]) as file:
        found = file.read(0, MIB, np.empty(2 * MIB, np.uint8))
        free.set()
        assert all(another.map(make, range(2, 9)))
        assert found.tobytes() == content(1, 0, MIB)
    inputs.close()


def test_closing_does_not_wait_for_what_is_under_way():
    free = threading.Event()
    remote = Recorded(before=lambda _: free.wait(60))
    fetching = Ahead(demands_of([file_of(remote)], [[(0, i * 8 * MIB, MIB)] for i in range(100)]), 64 * MIB)
    fetching.begin(0)
    fetching.close()
    assert len(remote.requests) <= ahead.CONNECTIONS
    free.set()


def test_whoever_waits_is_told_when_nothing_more_will_come():
    free = threading.Event()
    remote = Recorded(before=lambda _: free.wait(60))
    file = file_of(remote)
    fetching = Ahead(demands_of([file], [[(0, i * 8 * MIB, MIB)] for i in range(32)]), 256 * MIB)
    fetching.begin(31)
    waiting = fetching.covering(file, 31 * 8 * MIB)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(waiting.part, 31 * 8 * MIB, 31 * 8 * MIB + 10)
        fetching.close()
        free.set()
        with pytest.raises((ReadFailed, CancelledError)):
            answer.result(timeout=60)


def test_closing_twice_and_a_block_that_nobody_announced():
    fetching = Ahead([], 4 * MIB)
    fetching.done("nothing")
    fetching.close()
    fetching.begin("nothing")
    fetching.close()

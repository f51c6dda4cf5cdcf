"""The first pass: numbers about whole tensors that some expressions need before an element of them can be made.

Knows threads and buffers; knows nothing of what is measured. Each measure runs in one thread, over blocks in their
order, so its numbers do not depend on how many threads there are.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from merger.expression import Measure
from merger.kernels import Bytes
from merger.plan import Shard
from merger.reader import OpenFiles, read
from merger.storage.disk import page_aligned
from merger.whole import Making


def measured(shards: Sequence[Shard], inputs: OpenFiles, threads: int, memory: int) -> Sequence[Shard]:
    """The shards with the numbers that their expressions ask for; what is measured of expressions that must be measured
    themselves comes after these. Raises ReadFailed and SourceChanged.
    """
    while found := found_in(shards, inputs, threads, memory):
        shards = [
            replace(shard, entries=tuple(replace(e, expression=e.expression.measured(found)) for e in shard.entries))
            for shard in shards
        ]
    return shards


def found_in(shards: Sequence[Shard], inputs: OpenFiles, threads: int, memory: int) -> dict[Measure, Sequence[float]]:
    """The numbers that can be found now: the largest tensors first, so that no thread is left with one at the end; in
    as many threads as `memory` bytes are enough for, in one at least.
    """
    wanted = sorted(dict.fromkeys(_measures(shards)), key=lambda measure: -measure.inputs[0].size)
    if not wanted:
        return {}
    room = memory // max(measure.memory for measure in wanted)
    with ThreadPoolExecutor(max(1, min(threads, room))) as pool:
        return dict(zip(wanted, pool.map(lambda measure: _compute(measure, inputs), wanted), strict=True))


def _measures(shards: Iterable[Shard]) -> Iterable[Measure]:
    """All but the tensors that are made as a whole, which are no numbers (`merger.spilling`)."""
    entries = (entry for shard in shards for entry in shard.entries)
    return (m for entry in entries for m in entry.expression.measures() if not isinstance(m, Making))


def _compute(measure: Measure, inputs: OpenFiles) -> Sequence[float]:
    buffer = page_aligned(0)

    def evaluate(start: int, stop: int) -> list[Bytes]:
        nonlocal buffer
        size = sum(tensor.memory(stop - start) for tensor in measure.inputs)
        if buffer.size < size:
            buffer = page_aligned(size)
        values = read({part for tensor in measure.inputs for part in tensor.reads(start, stop)}, inputs, buffer)
        return [tensor.values(start, stop, values.__getitem__) for tensor in measure.inputs]

    return measure.compute(evaluate)

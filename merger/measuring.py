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


def measured(shards: Sequence[Shard], inputs: OpenFiles, threads: int) -> Sequence[Shard]:
    """The shards with the numbers that their expressions ask for. Raises ReadFailed and SourceChanged."""
    found = found_in(shards, inputs, threads)
    if not found:
        return shards
    return [
        replace(shard, entries=tuple(replace(e, expression=e.expression.measured(found)) for e in shard.entries))
        for shard in shards
    ]


def found_in(shards: Sequence[Shard], inputs: OpenFiles, threads: int) -> dict[Measure, Sequence[float]]:
    """The numbers themselves."""
    wanted = list(dict.fromkeys(_measures(shards)))
    if not wanted:
        return {}
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(wanted, pool.map(lambda measure: _compute(measure, inputs), wanted), strict=True))


def _measures(shards: Iterable[Shard]) -> Iterable[Measure]:
    return (measure for shard in shards for entry in shard.entries for measure in entry.expression.measures())


def _compute(measure: Measure, inputs: OpenFiles) -> Sequence[float]:
    def evaluate(start: int, stop: int) -> Bytes:
        buffer = page_aligned(measure.of.memory(stop - start))
        values = read(set(measure.of.reads(start, stop)), inputs, buffer)
        return measure.of.values(start, stop, values.__getitem__)

    return measure.compute(evaluate)

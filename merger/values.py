"""The values of a checkpoint in memory, without a file: for models that are looked at and not kept.

Knows expressions and threads; knows nothing of torch.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from merger.checkpoint import Checkpoint
from merger.expression import Expression
from merger.host import processors
from merger.kernels import Bytes
from merger.measuring import measured
from merger.plan import make_plan, remote_files
from merger.reader import OpenFiles, download, read
from merger.storage.disk import page_aligned

_BLOCK = 1 << 20  # elements


def values(checkpoint: Checkpoint) -> Iterator[tuple[str, Expression, Bytes]]:
    """Every tensor with its bytes in row-major order. Raises ReadFailed and SourceChanged."""
    threads = processors()
    whole = make_plan(replace(checkpoint, optimizer={}), {}, shard_size=1 << 62)
    remote = remote_files(whole.shards)  # all of them will be read
    inputs = OpenFiles(cached={file.address for file in remote})
    try:
        download(remote)
        [shard] = measured(whole.shards, inputs, threads)
        with ThreadPoolExecutor(threads) as pool:
            made = pool.map(lambda entry: _evaluate(entry.expression, inputs), shard.entries)
            for entry, content in zip(shard.entries, made, strict=True):
                yield entry.name, entry.expression, content
    finally:
        inputs.close()


def side_by_side(tensors: Sequence[Expression], elements: int, *, whole: bool = True) -> Iterator[list[Bytes]]:
    """So many elements at a time of tensors of one size, in their order. Remote files are fetched whole, unless little
    of them is read. Raises ReadFailed and SourceChanged.
    """
    plan = make_plan(Checkpoint({f"{i:09d}": tensor for i, tensor in enumerate(tensors)}, None, {}, ()), {}, 1 << 62)
    remote = remote_files(plan.shards) if whole else set()
    inputs = OpenFiles(cached={file.address for file in remote})
    try:
        download(remote)
        [shard] = measured(plan.shards, inputs, processors())
        ready = [entry.expression for entry in sorted(shard.entries, key=lambda entry: entry.name)]
        with ThreadPoolExecutor(processors()) as pool:
            for start in range(0, ready[0].size, elements):
                stop = min(start + elements, ready[0].size)
                yield list(pool.map(lambda tensor, a=start, b=stop: _piece(tensor, inputs, a, b), ready))
    finally:
        inputs.close()


def _piece(tensor: Expression, inputs: OpenFiles, start: int, stop: int) -> Bytes:
    found = read(set(tensor.reads(start, stop)), inputs, page_aligned(tensor.memory(stop - start)))
    return tensor.values(start, stop, found.__getitem__)


def _evaluate(expression: Expression, inputs: OpenFiles) -> Bytes:
    out = page_aligned(expression.nbytes)
    for start in range(0, expression.size, _BLOCK):
        stop = min(start + _BLOCK, expression.size)
        found = read(set(expression.reads(start, stop)), inputs, page_aligned(expression.memory(stop - start)))
        place = out[start * expression.itemsize : stop * expression.itemsize]
        expression.write(start, stop, found.__getitem__, place)
    return out[: expression.nbytes]

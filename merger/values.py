"""The values of a checkpoint in memory, without a file: for models that are looked at and not kept.

Knows expressions and threads; knows nothing of torch.
"""

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from merger.checkpoint import Checkpoint
from merger.expression import Expression
from merger.host import free_memory, processors
from merger.kernels import Bytes
from merger.plan import make_plan, remote_files
from merger.reader import OpenFiles, download, read
from merger.spilling import Scratch, Workshop, evaluate, ready
from merger.storage.disk import page_aligned


def values(checkpoint: Checkpoint) -> Iterator[tuple[str, Expression, Bytes]]:
    """Every tensor with its bytes in row-major order. Raises ReadFailed and SourceChanged."""
    threads = processors()
    whole = make_plan(replace(checkpoint, optimizer={}), {}, shard_size=1 << 62)
    remote = remote_files(whole.shards)  # all of them will be read
    inputs = OpenFiles(cached={file.address for file in remote})
    with tempfile.TemporaryDirectory() as folder, Scratch(Path(folder) / "scratch") as scratch:
        try:
            download(remote)
            workshop = Workshop(free_memory() // 2, threads)
            [shard] = ready(whole.shards, inputs, workshop, scratch)
            with ThreadPoolExecutor(threads) as pool:
                made = pool.map(lambda entry: evaluate(entry.expression, inputs), shard.entries)
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
    with tempfile.TemporaryDirectory() as folder, Scratch(Path(folder) / "scratch") as scratch:
        try:
            download(remote)
            [shard] = ready(plan.shards, inputs, Workshop(free_memory() // 2, processors()), scratch)
            tensors = [entry.expression for entry in sorted(shard.entries, key=lambda entry: entry.name)]
            with ThreadPoolExecutor(processors()) as pool:
                for start in range(0, tensors[0].size, elements):
                    stop = min(start + elements, tensors[0].size)
                    yield list(pool.map(lambda tensor, a=start, b=stop: _piece(tensor, inputs, a, b), tensors))
        finally:
            inputs.close()


def _piece(tensor: Expression, inputs: OpenFiles, start: int, stop: int) -> Bytes:
    found = read(set(tensor.reads(start, stop)), inputs, page_aligned(tensor.memory(stop - start)))
    return tensor.values(start, stop, found.__getitem__)

"""The values of a checkpoint in memory, without a file: for models that are looked at and not kept.

Knows expressions and threads; knows nothing of torch.
"""

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from merger.checkpoint import Checkpoint
from merger.expression import Expression
from merger.host import free_memory, processors
from merger.kernels import Bytes
from merger.plan import make_plan, remote_files
from merger.reader import OpenFiles, download
from merger.spilling import Scratch, Workshop, evaluate, ready


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

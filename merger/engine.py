"""Streams a plan's shards to disk. Knows blocks, threads and buffers; knows nothing of methods, recipes or models.

Each thread takes the next block of the output, reads what it is made from, computes it and writes it; twice
as many threads as processors keep the disk and the processors busy at once. A shard is written beside its
place, synced, renamed, and then its receipt follows. The bytes do not depend on threads, blocks or retries:
every element is computed for itself, by the same operations in the same order.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from merger.ahead import Ahead, Demand
from merger.budget import Allotment
from merger.checksum import LEAF, checksum, leaves
from merger.dtypes import DTYPES
from merger.errors import MergerError, NonFiniteInput, WriteFailed
from merger.expression import Expression, Fetch, File
from merger.kernels import Bytes, count_non_finite
from merger.plan import Entry, Shard, read_again, remote_files
from merger.reader import OpenFiles, download, read
from merger.receipt import FOLDER, Receipt, write_receipt
from merger.remote import Remote
from merger.spilling import Scratch, Workshop, ready
from merger.storage.disk import OutputFile, page_aligned, round_up, sync_folder
from merger.whole import wholes_in

OnBytes = Callable[[int], None]
OnShard = Callable[[Receipt], None]


def write_shards(
    shards: Sequence[Shard],
    output: Path,
    allotment: Allotment,
    fingerprint: str,
    *,
    strict: bool = False,
    execution: str = "",
    cached: Collection[str] = (),
    on_bytes: OnBytes = lambda _: None,
    on_shard: OnShard = lambda _: None,
) -> list[Receipt]:
    """Make the shards in the folder `output` (with its `.merger` folder) and return their receipts.

    `on_bytes` is told of written bytes, `on_shard` of finished shards, from any thread. `execution` goes into the names
    of unfinished files, so that two executions of the same work do not write into one. Remote files are fetched range
    by range, ahead of the blocks that need them, but for those whose addresses are in `cached`.

    Raises ReadFailed, WriteFailed, SourceChanged and, with `strict`, NonFiniteInput; where tensors are made as a whole
    also NonFiniteInput, NotEnoughMemory and VerificationFailed. Finished shards stay.
    """
    receipts = []
    for part in _portions(shards):
        inputs = OpenFiles(read_again(part), cached)
        workshop = Workshop(allotment.memory, allotment.threads, allotment.device, strict)
        with Scratch(output / FOLDER / f"{part[0].name}{execution}.scratch") as scratch:
            try:
                download(remote_files(part, cached))
                known = ready(part, inputs, workshop, scratch)
                inputs.ahead = _ahead(known, allotment, cached)
                work = _Work(known, output, allotment.block, fingerprint, execution, on_shard)
                _run_threads(work, inputs, allotment, strict, on_bytes)
            finally:
                inputs.close()
        if work.error:
            raise work.error
        receipts += work.receipts
    return receipts


def _portions(shards: Sequence[Shard]) -> Iterator[Sequence[Shard]]:
    """The shards with tensors that are made as a whole one by one, after the others: what was made of one is written
    before the next is begun, so that little lies beside the result, and little is lost.
    """
    apart = {shard.name: shard for shard in shards if wholes_in(entry.expression for entry in shard.entries)}
    rest = [shard for shard in shards if shard.name not in apart]
    if rest:
        yield rest
    for shard in apart.values():
        yield [shard]


def _ahead(shards: Sequence[Shard], allotment: Allotment, cached: Collection[str]) -> Ahead | None:
    """What fetches remote files ahead of the blocks, or None where everything is here."""
    if not allotment.ahead or all(remote.address in cached for remote in remote_files(shards)):
        return None
    return Ahead(_demands(shards, allotment.block, cached), allotment.ahead)


def _demands(shards: Sequence[Shard], block: int, cached: Collection[str]) -> Iterator[Demand]:
    """The blocks in their order, each with the bytes of remote files that it is made from."""
    for shard in shards:
        offsets = [entry.offset for entry in shard.entries]
        for start, stop in _spans(shard, block):
            parts = (part for e, a, b in _within(shard, offsets, start, stop) for part in e.expression.reads(a, b))
            wanted = [p for p in parts if isinstance(p.file.path, Remote) and p.file.path.address not in cached]
            yield (shard.name, start), wanted


def _spans(shard: Shard, block: int) -> Iterator[tuple[int, int]]:
    """The blocks of a shard's data, from byte to byte."""
    for start in range(0, shard.data_size, block):
        yield start, min(start + block, shard.data_size)


def _run_threads(work: "_Work", inputs: OpenFiles, allotment: Allotment, strict: bool, on_bytes: OnBytes) -> None:
    """Work until nothing is left or the work is stopped; nothing runs any more when this returns or raises."""
    threads = [
        threading.Thread(target=_fill_blocks, args=(work, inputs, allotment, strict, on_bytes), name=f"engine-{i}")
        for i in range(allotment.threads)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        inputs.stop()
        raise
    finally:
        work.stop()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        work.close()


# ---- the blocks ---------------------------------------------------------------------------------------


class _OpenShard:
    """A shard while it is written: its file, what is left of it, and what its receipt will say."""

    def __init__(self, shard: Shard, partial: Path, block: int) -> None:
        self.shard = shard
        self.offsets = [entry.offset for entry in shard.entries]
        self.partial = partial
        self.file = OutputFile(self.partial, shard.size)
        self.left = -(-shard.data_size // block)
        self.checksums = bytearray(8 * -(-shard.data_size // LEAF))
        self.non_finite: dict[str, int] = {}
        self.overflowed: dict[str, int] = {}
        header = page_aligned(len(shard.header))
        header[:] = np.frombuffer(shard.header, np.uint8)
        self.file.write(header, 0)


class _Block(NamedTuple):
    """Bytes `start` to `stop` of a shard's data."""

    of: _OpenShard
    start: int
    stop: int


class _Work:
    """The blocks that are left, handed out in order; finishes a shard with its last block. Safe for threads."""

    def __init__(
        self,
        shards: Iterable[Shard],
        output: Path,
        block: int,
        fingerprint: str,
        execution: str,
        on_shard: OnShard,
    ) -> None:
        self.receipts: list[Receipt] = []
        self.error: BaseException | None = None
        self._output, self._block, self._fingerprint, self._on_shard = output, block, fingerprint, on_shard
        self._execution = execution
        self._lock = threading.Lock()
        self._open: set[_OpenShard] = set()
        self._stopped = False
        self._blocks = self._all_blocks(shards)

    def _all_blocks(self, shards: Iterable[Shard]) -> Iterator[_Block]:
        for shard in shards:
            partial = self._output / FOLDER / f"{shard.name}{self._execution}"
            current = _OpenShard(shard, partial, self._block)
            self._open.add(current)
            if not current.left:
                self._finish(current)
            for start, stop in _spans(shard, self._block):
                yield _Block(current, start, stop)

    def take(self) -> _Block | None:
        """The next block, or None where nothing is left or the work was stopped."""
        with self._lock:
            return None if self._stopped else next(self._blocks, None)

    def done(self, block: _Block, checksums: bytes) -> None:
        """Note a written block; the last of a shard finishes the shard."""
        position = 8 * (block.start // LEAF)
        with self._lock:
            block.of.checksums[position : position + len(checksums)] = checksums
            block.of.left -= 1
            last = block.of.left == 0
        if last:
            self._finish(block.of)

    def count(self, block: _Block, name: str, bad: int, *, from_input: bool) -> None:
        """Note that `bad` values of a tensor are not finite."""
        with self._lock:
            counts = block.of.non_finite if from_input else block.of.overflowed
            counts[name] = counts.get(name, 0) + bad

    def _finish(self, current: _OpenShard) -> None:
        current.file.finish()
        current.file.close()
        self._open.discard(current)
        current.partial.rename(self._output / current.shard.name)
        sync_folder(self._output)
        receipt = Receipt(
            current.shard.name,
            current.shard.size,
            checksum(current.shard.header, current.checksums),
            self._fingerprint,
            current.non_finite,
            current.overflowed,
        )
        write_receipt(self._output, receipt)
        self.receipts.append(receipt)
        self._on_shard(receipt)

    def stop(self, error: BaseException | None = None) -> None:
        """Hand out nothing more; the first error is the one that counts."""
        with self._lock:
            self._stopped = True
            self.error = self.error or error

    def close(self) -> None:
        for current in self._open:
            current.file.close()
            current.partial.unlink(missing_ok=True)


def _fill_blocks(work: _Work, inputs: OpenFiles, allotment: Allotment, strict: bool, on_bytes: OnBytes) -> None:
    """What each thread does."""
    try:
        output, buffer = page_aligned(allotment.block), page_aligned(allotment.buffer)
        while block := work.take():
            size = block.stop - block.start
            data = output[:size]
            with inputs.serving((block.of.shard.name, block.start)):
                for batch in _batches(block, data, buffer.size):
                    _evaluate(work, block, batch, inputs, buffer, strict)
            output[size : round_up(size)] = 0
            block.of.file.write(output[: round_up(size)], len(block.of.shard.header) + block.start)
            work.done(block, leaves(data))
            on_bytes(size)
    except OSError as error:
        work.stop(WriteFailed(str(error.strerror), where=str(error.filename or "")))
    except BaseException as error:
        work.stop(error)


class _Piece(NamedTuple):
    """Elements `start` to `stop` of a tensor, and the part of the block that they fill."""

    name: str
    expression: Expression
    start: int
    stop: int
    out: Bytes


def _pieces(block: _Block, data: Bytes) -> Iterator[_Piece]:
    """The parts of tensors that lie in a block."""
    for entry, first, last in _within(block.of.shard, block.of.offsets, block.start, block.stop):
        itemsize = entry.expression.itemsize
        begin = entry.offset + first * itemsize - block.start
        out = data[begin : begin + (last - first) * itemsize]
        yield _Piece(entry.name, entry.expression, first, last, out)


def _within(shard: Shard, offsets: Sequence[int], start: int, stop: int) -> Iterator[tuple[Entry, int, int]]:
    """The tensors that lie in bytes `start` to `stop` of a shard's data, each with its elements there."""
    for entry in shard.entries[max(0, bisect_right(offsets, start) - 1) :]:
        if entry.offset >= stop:
            return
        itemsize = entry.expression.itemsize
        begin = max(start, entry.offset)
        end = min(stop, entry.offset + entry.expression.nbytes)
        if begin < end:
            first = (begin - entry.offset) // itemsize
            yield entry, first, first + (end - begin) // itemsize


def _batches(block: _Block, data: Bytes, capacity: int) -> Iterator[list[_Piece]]:
    """The pieces of a block in batches whose inputs fit the buffer; a piece too large for it is divided."""
    batch: list[_Piece] = []
    taken = 0
    for piece in _pieces(block, data):
        for part in _divided(piece, capacity):
            cost = part.expression.memory(part.stop - part.start)
            if batch and taken + cost > capacity:
                yield batch
                batch, taken = [], 0
            batch.append(part)
            taken += cost
    if batch:
        yield batch


def _divided(piece: _Piece, capacity: int) -> Iterator[_Piece]:
    count = piece.stop - piece.start
    fixed = piece.expression.memory(0)
    per_element = piece.expression.memory(1) - fixed
    largest = max(1, (capacity - fixed) // per_element) if per_element else max(1, count)
    itemsize = piece.expression.itemsize
    for first in range(0, count, largest):
        last = min(first + largest, count)
        yield piece._replace(
            start=piece.start + first, stop=piece.start + last, out=piece.out[first * itemsize : last * itemsize]
        )


def _evaluate(
    work: _Work, block: _Block, batch: Sequence[_Piece], inputs: OpenFiles, buffer: Bytes, strict: bool
) -> None:
    """Read what a batch is made from and make it."""
    wanted = {read for piece in batch for read in piece.expression.reads(piece.start, piece.stop)}
    values = read(wanted, inputs, buffer)
    for piece in batch:
        try:
            bad = piece.expression.write(piece.start, piece.stop, values.__getitem__, piece.out)
        except MergerError:
            raise
        except Exception as error:
            error.add_note(f"in tensor {piece.name} of {block.of.shard.name}")
            raise
        if bad:
            guilty = _non_finite_input(piece, values.__getitem__)
            if guilty and strict:
                raise NonFiniteInput("holds NaN or infinity", where=f"{guilty.path}: tensor {piece.name!r}")
            work.count(block, piece.name, bad, from_input=guilty is not None)


def _non_finite_input(piece: _Piece, fetch: Fetch) -> File | None:
    """The first file whose values in this piece are not all finite, or None where only the result overflowed."""
    for part in piece.expression.reads(piece.start, piece.stop):
        if DTYPES[part.dtype].is_float and count_non_finite(fetch(part), part.dtype):
            return part.file
    return None

"""Makes the tensors that can only be made as a whole, and keeps them in a file until the engine has read them.

Knows torch's threads and devices, memory and scratch files; knows nothing of what the functions compute. Each function
runs in one thread of torch, several of them at once where memory allows, so the bytes do not depend on how many
threads there are. What exceeds the memory that was allowed runs alone.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from merger.dtypes import DTYPES, FROM_TORCH, TORCH_NAMES
from merger.errors import (
    JobError,
    MergerError,
    NonFiniteInput,
    NotEnoughMemory,
    NotInstalled,
    RequestError,
    VerificationFailed,
    WriteFailed,
)
from merger.expression import Expression, File, Measure, Stored
from merger.host import free_memory, processors
from merger.kernels import Bytes, count_non_finite, weighted_sum
from merger.measuring import measured
from merger.plan import Shard
from merger.reader import OpenFiles, read
from merger.scaled_kernels import TABLES, count_non_finite_codes
from merger.storage.disk import page_aligned, round_up
from merger.whole import AT_ONCE, Making, Tensors, Whole, wholes_in

_SIGN = 10.0  # seconds between two signs that work goes on


@dataclass(frozen=True)
class Workshop:
    """What the work may use: bytes of memory, threads, a device (`auto`: cuda where torch sees one). `on_sign` is told
    now and then that work goes on.
    """

    memory: int
    threads: int
    device: str = "auto"
    strict: bool = False
    on_sign: Callable[[], None] = lambda: None


def device_of(asked: str) -> str:
    """The device to compute on: cpu or cuda. Raises NotInstalled, and RequestError where torch sees no GPU."""
    try:
        import torch
    except ImportError as error:
        raise NotInstalled("arithmetic on whole matrices needs torch", where="torch") from error
    if asked != "cpu" and torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise RequestError(
            "torch sees no GPU on this machine",
            where="--device",
            remedy="Use --device cpu, or a build of torch for this machine's GPU.",
        )
    return "cpu"


def check_room(whole: Whole, device: str, memory: int) -> None:
    """See that a tensor can be made: within `memory`, or alone in what the device has free. Raises NotEnoughMemory."""
    if device == "cuda":
        free, remedy = _free_on_gpu(), "Use --device cpu, or a GPU with more memory."
        room = free
    else:
        free = free_memory()
        room, remedy = max(free, memory), "Run it on a machine with more, or merge this tensor by another method."
    if whole.cost > room:
        raise NotEnoughMemory(
            f"is made as a whole and takes {whole.cost:,} bytes, {'the GPU' if device == 'cuda' else 'this machine'} "
            f"has {free:,} free",
            where=f"tensor {whole.name!r}",
            remedy=remedy,
        )


def _free_on_gpu() -> int:
    import torch

    return int(torch.cuda.mem_get_info()[0])


# ---- what is made lies in a file ----------------------------------------------------------------------


class Scratch:
    """Files for what is made, which are gone when the `with` block ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: list[Path] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for path in self._files:
            path.unlink(missing_ok=True)

    def reserve(self, size: int) -> "_ScratchFile":
        """A new file of a size. Raises WriteFailed where the disk has no room for it."""
        path = self._path.with_name(f"{self._path.name}-{len(self._files)}")
        self._files.append(path)
        return _ScratchFile(path, size)


class _ScratchFile:
    """A file that several threads write to, each in its own place."""

    def __init__(self, path: Path, size: int) -> None:
        self._path, self._size = path, size
        try:
            self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise WriteFailed(f"cannot be made: {error.strerror}", where=str(path)) from error
        try:
            os.posix_fallocate(self._handle, 0, size)
        except OSError as error:
            os.close(self._handle)
            raise WriteFailed(f"cannot reserve {size:,} bytes: {error.strerror}", where=str(path)) from error

    def write(self, content: Bytes, start: int) -> None:
        view, done = content.data, 0
        try:
            while done < len(view):
                done += os.pwrite(self._handle, view[done:], start + done)
        except OSError as error:
            raise WriteFailed(f"writing at {start:,}: {error.strerror}", where=str(self._path)) from error

    def finish(self) -> File:
        """The file as it is to be read, now that nobody writes to it any more."""
        os.close(self._handle)
        return File(self._path, self._size, self._path.stat().st_mtime_ns, "")

    def abandon(self) -> None:
        os.close(self._handle)


# ---- one after the other, or several ------------------------------------------------------------------


def ready(shards: Sequence[Shard], inputs: OpenFiles, workshop: Workshop, scratch: Scratch) -> Sequence[Shard]:
    """The shards with all that must be known or made before their blocks can be: measured, and made as a whole.

    Raises ReadFailed, SourceChanged, WriteFailed, NonFiniteInput, NotEnoughMemory and VerificationFailed.
    """
    shards = measured(shards, inputs, workshop.threads, workshop.memory)
    while wholes := _next(shards):
        found = _made(wholes, inputs, workshop, scratch)
        shards = [
            replace(shard, entries=tuple(replace(e, expression=e.expression.measured(found)) for e in shard.entries))
            for shard in shards
        ]
        shards = measured(shards, inputs, workshop.threads, workshop.memory)
    return shards


def _next(shards: Sequence[Shard]) -> list[Whole]:
    """The tensors that can be made now, the dearest first: those that must run alone do so before the rest begins."""
    found = wholes_in(entry.expression for shard in shards for entry in shard.entries)
    return sorted((whole for whole in found if Making(whole).is_ready), key=lambda whole: -whole.cost)


def _made(wholes: Sequence[Whole], inputs: OpenFiles, workshop: Workshop, scratch: Scratch) -> dict[Measure, Any]:
    device = device_of(workshop.device)
    is_choice = workshop.device == "auto"
    places, size = [], 0
    for whole in wholes:
        places.append(size)
        size += round_up(whole.nbytes)
    file = scratch.reserve(max(1, size))
    gate = _Gate(workshop.memory)

    def make(whole: Whole, place: int) -> None:
        with gate.admitting(whole.cost):
            here = "cpu" if is_choice and device == "cuda" and whole.cost > _free_on_gpu() else device
            check_room(whole, here, workshop.memory)
            file.write(_values(whole, inputs, here, strict=workshop.strict), place)

    try:
        threads = 1 if device == "cuda" else min(workshop.threads, processors())
        _in_threads(make, wholes, places, threads, workshop.on_sign)
    except BaseException:
        file.abandon()
        raise
    stored = file.finish()
    return {
        Making(whole): Stored(whole.dtype, whole.shape, stored, place)
        for whole, place in zip(wholes, places, strict=True)
    }


def _in_threads(
    make: Callable[[Whole, int], None],
    wholes: Sequence[Whole],
    places: Sequence[int],
    threads: int,
    on_sign: Callable[[], None],
) -> None:
    with _one_torch_thread() as begin, ThreadPoolExecutor(threads, initializer=begin) as pool:
        tasks = [pool.submit(make, whole, place) for whole, place in zip(wholes, places, strict=True)]
        try:
            while (found := wait(tasks, _SIGN, FIRST_EXCEPTION)).not_done:
                on_sign()
                if any(task.exception() for task in found.done):
                    break
            for task in found.done:
                task.result()
            on_sign()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _one_torch_thread() -> Iterator[Any]:
    """What each thread is to call first; torch has the threads that it had again in the end."""
    import torch

    before = torch.get_num_threads()
    try:
        yield lambda: torch.set_num_threads(1)
    finally:
        torch.set_num_threads(before)


class _Gate:
    """Admits work whose bytes fit beside what is under way, and what fits nowhere when nothing is."""

    def __init__(self, room: int) -> None:
        self._room, self._taken = room, 0
        self._changed = threading.Condition()

    @contextmanager
    def admitting(self, size: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + size <= self._room)
            self._taken += size
        try:
            yield
        finally:
            with self._changed:
                self._taken -= size
                self._changed.notify_all()


# ---- one tensor ---------------------------------------------------------------------------------------


def _values(whole: Whole, inputs: OpenFiles, device: str, *, strict: bool) -> Bytes:
    """The tensor's values, rounded to its dtype. Raises NonFiniteInput, VerificationFailed and what reading raises."""
    tensors = _Loaded(whole, inputs, device, strict=strict)
    try:
        content, dtype = _bytes_of(_called(whole, tensors))
    except MergerError:
        raise
    except Exception as error:
        raise JobError(f"could not be made: {type(error).__name__}: {error}", where=f"tensor {whole.name!r}") from error
    out = np.empty(whole.nbytes, np.uint8)
    if content.size // DTYPES[dtype].alignment != whole.size:
        raise JobError(f"came out with {content.size:,} bytes of {dtype}", where=f"tensor {whole.name!r}")
    bad = weighted_sum([(1.0, content, dtype)], out, whole.dtype)
    if bad and not tensors.found_non_finite:
        raise VerificationFailed(
            f"{bad:,} of its values came out as NaN or infinite",
            where=f"tensor {whole.name!r}",
            remedy="Choose a wider `output.dtype`, such as bfloat16 or float32.",
        )
    return out


def _called(whole: Whole, tensors: Tensors) -> Any:
    import torch

    with torch.no_grad():
        return whole.function(tensors)


def _bytes_of(made: Any) -> tuple[Bytes, str]:
    import torch

    dtype = FROM_TORCH[str(made.dtype).removeprefix("torch.")]
    flat = made.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy(), dtype


class _Loaded(Tensors):
    """The inputs of a tensor, evaluated block by block into memory when they are asked for."""

    def __init__(self, whole: Whole, inputs: OpenFiles, device: str, *, strict: bool) -> None:
        self.device, self._whole, self._inputs = device, whole, inputs
        self._strict = strict or whole.function.finite
        self.found_non_finite = False

    def __len__(self) -> int:
        return len(self._whole.inputs)

    def load(self, index: int) -> Any:
        import torch

        tensor = self._whole.inputs[index]
        content = evaluate(tensor, self._inputs)
        if count_non_finite(content, tensor.dtype):
            self.found_non_finite = True
            if self._strict:
                self._refuse(tensor)
        made = torch.from_numpy(content).view(getattr(torch, TORCH_NAMES[tensor.dtype])).reshape(tensor.shape)
        return made.to(self.device)

    def _refuse(self, tensor: Expression) -> None:
        guilty = next((leaf for leaf in tensor.leaves() if _is_odd(leaf, self._inputs)), None)
        raise NonFiniteInput(
            "holds NaN or infinity" if guilty else "what it is made from comes to NaN or infinity",
            where=f"{guilty.file.path if guilty else ''}: tensor {self._whole.name!r}".removeprefix(": "),
            remedy="Leave that checkpoint out: what is computed from a whole tensor would be NaN throughout.",
        )


def _is_odd(leaf: Stored, inputs: OpenFiles) -> bool:
    if leaf.dtype in TABLES:
        return bool(count_non_finite_codes(evaluate(leaf, inputs), leaf.dtype))
    return DTYPES[leaf.dtype].is_float and bool(count_non_finite(evaluate(leaf, inputs), leaf.dtype))


def evaluate(expression: Expression, inputs: OpenFiles) -> Bytes:
    """All elements of an expression, in fresh memory. Raises ReadFailed and SourceChanged."""
    out = page_aligned(expression.nbytes)
    buffer = page_aligned(expression.memory(min(AT_ONCE, expression.size)))
    for start in range(0, expression.size, AT_ONCE):
        stop = min(start + AT_ONCE, expression.size)
        found = read(set(expression.reads(start, stop)), inputs, buffer)
        place = out[start * expression.itemsize : stop * expression.itemsize]
        expression.write(start, stop, found.__getitem__, place)
    return out[: expression.nbytes]

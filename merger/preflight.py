"""The last look before data moves: integer buffers and disk space. Reads buffers, never weights; writes nothing."""

import shutil
from pathlib import Path

from merger.errors import IncompatibleSources, NotEnoughDisk, ReadFailed
from merger.expression import Stored
from merger.plan import Plan

_CHUNK = 8 << 20  # bytes


def check_buffers(plan: Plan) -> None:
    """Compare the tensors that must be the same in every source.

    Raises IncompatibleSources with the first that is not.
    """
    for name, tensor in plan.buffers():
        for other in tensor.others:
            if not _same_bytes(tensor.first, other):
                raise IncompatibleSources(
                    f"is {tensor.dtype} and differs between {tensor.first.file.path} and {other.file.path}",
                    where=f"tensor {name!r}",
                    remedy="Integers are copied, not averaged, so they must agree. Leave one of the checkpoints out.",
                )


def _same_bytes(a: Stored, b: Stored) -> bool:
    with a.file.path.open("rb") as first, b.file.path.open("rb") as second:
        first.seek(a.offset)
        second.seek(b.offset)
        left = a.nbytes
        while left:
            size = min(left, _CHUNK)
            chunk, other = first.read(size), second.read(size)
            if len(chunk) != size or len(other) != size:
                raise ReadFailed("ends early", where=str(a.file.path if len(chunk) != size else b.file.path))
            if chunk != other:
                return False
            left -= size
    return True


def check_disk(plan: Plan, output: Path, finished: int) -> None:
    """See that what is not yet `finished` (bytes) fits on the disk of `output`.

    Raises NotEnoughDisk with both numbers.
    """
    needed = plan.size - finished
    free = free_space(output)
    if needed > free:
        raise NotEnoughDisk(f"the result needs {needed:,} bytes, the disk has {free:,} free", where=str(output))


def free_space(output: Path) -> int:
    """Bytes that the disk of a folder, which need not exist yet, has free for this user."""
    folder = output.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free

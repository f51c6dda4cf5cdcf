"""The last look before data moves: integer buffers, disk space, and whether models are the kin that they are taken for.

Reads buffers, and of weights the beginnings of some; writes nothing.
"""

import re
import shutil
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from merger.checkpoint import Checkpoint, Kin
from merger.dtypes import DTYPES
from merger.errors import IncompatibleSources, NotEnoughDisk
from merger.expression import Stored
from merger.identity import digest_of
from merger.kernels import weighted_sum
from merger.plan import Plan
from merger.reader import part_of
from merger.storage.disk import PAGE

_CHUNK = 8 << 20  # bytes
_SAMPLE = 1024  # elements of a tensor


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
                    remedy="They hold copies of their bases, which are not the same model. Leave one of them out."
                    if DTYPES[tensor.dtype].is_float
                    else "Integers are copied, not averaged, so they must agree. Leave one of the checkpoints out.",
                )


def _same_bytes(a: Stored, b: Stored, limit: int | None = None) -> bool:
    """Whether two tensors begin with the same `limit` bytes, or are the same."""
    size = min(a.nbytes, limit or a.nbytes)
    return all(
        _bytes(a, start, min(start + _CHUNK, size)) == _bytes(b, start, min(start + _CHUNK, size))
        for start in range(0, size, _CHUNK)
    )


def _bytes(tensor: Stored, start: int, stop: int) -> bytes:
    return part_of(tensor.file, tensor.offset + start, tensor.offset + stop)


# ---- kin ----------------------------------------------------------------------------------------------


def check_kin(plan: Plan) -> None:
    """See that models which were added as fine-tunes of one model are: none equals its base, and experts stand in one
    order. Raises IncompatibleSources.
    """
    for kin in plan.checkpoint.kin:
        for model in kin.models:
            if kin.base and _equal(model, kin.base):
                raise IncompatibleSources(
                    f"equals its base {kin.base.label}: there is nothing in it to add",
                    where=model.label,
                    remedy="Is it the right folder? Leave it out if it is.",
                )
        _check_experts(kin)


def _equal(model: Checkpoint, base: Checkpoint) -> bool:
    """Whether two stored models hold the same bytes: from the beginnings of tensors unless those are all the same."""
    pairs = []
    for name, tensor in model.tensors.items():
        other = base.tensors.get(name)
        if not isinstance(tensor, Stored) or not isinstance(other, Stored) or tensor.dtype != other.dtype:
            return False
        pairs.append((tensor, other))
    begins_alike = all(_same_bytes(a, b, PAGE) for a, b in pairs)
    return begins_alike and all(_same_bytes(a, b) for a, b in pairs)


def _check_experts(kin: Kin) -> None:
    """See that expert i of each model is nearer to expert i of the next than to others: training moves experts, but
    does not swap them. In models that were trained apart it is another one.
    """
    for first, other in pairwise([*([kin.base] if kin.base else []), *kin.models]):
        a, b = _experts(first), _experts(other)
        for name in sorted(a.keys() & b.keys()):
            moved = _moved(_values(a[name]), _values(b[name]))
            if len(moved) > len(a[name]) // 2:
                i, j = moved[0]
                raise IncompatibleSources(
                    f"the experts of {other.label} stand in another order than those of {first.label}: "
                    f"{i} of one is nearest to {j} of the other, and {len(moved)} of {len(a[name])} differ",
                    where=f"tensors {name}",
                    remedy="Their sum would mix unlike experts. Bring them into one order first, routers too.",
                )


_EXPERT = re.compile(r"experts\.(\d+)\.(.*weight)$")
_FUSED_EXPERTS = re.compile(r"experts\.\w+$")


def _experts(model: Checkpoint) -> dict[str, list[Stored]]:
    """The experts' tensors of a few layers, by a name in which `*` stands for the number of the expert."""
    found: dict[str, dict[int, Stored]] = defaultdict(dict)
    for name, tensor in model.tensors.items():
        if not isinstance(tensor, Stored) or not DTYPES[tensor.dtype].is_float:
            continue
        match = _EXPERT.search(name)
        if _FUSED_EXPERTS.search(name) and len(tensor.shape) == 3:
            size = tensor.nbytes // tensor.shape[0]
            for i in range(tensor.shape[0]):
                found[name][i] = Stored(tensor.dtype, tensor.shape[1:], tensor.file, tensor.offset + i * size)
        elif match:
            found[name[: match.start(1)] + "*." + match[2]][int(match[1])] = tensor
    whole = {name: [row[i] for i in range(len(row))] for name, row in found.items() if max(row) == len(row) - 1}
    return dict(list(whole.items())[:: max(1, len(whole) // 6)])


def _values(tensors: list[Stored]) -> NDArray[np.float64]:
    """The first values of each tensor, a row each."""
    rows = []
    for tensor in tensors:
        count = min(tensor.size, _SAMPLE)
        content = np.frombuffer(_bytes(tensor, 0, count * tensor.itemsize), np.uint8)
        row = np.empty(count)
        weighted_sum([(1.0, content, tensor.dtype)], row.view(np.uint8), "F64")
        rows.append(row)
    return np.stack(rows)


def _moved(a: NDArray[np.float64], b: NDArray[np.float64]) -> list[tuple[int, int]]:
    """The rows of `a` that are at most half as far from another row of `b` as from their own."""
    if a.shape != b.shape:
        return []
    distance = np.stack([np.linalg.norm(row - b, axis=1) for row in a])
    nearest = distance.argmin(1)
    far = distance.diagonal() > 2 * distance[np.arange(len(a)), nearest]
    return [(int(i), int(nearest[i])) for i in np.flatnonzero(far & (nearest != np.arange(len(a))))]


# ---- statistics ---------------------------------------------------------------------------------------


def check_statistics(plan: Plan) -> None:
    """See that statistics are of the very models that they are used for. Raises IncompatibleSources and ReadFailed."""
    for part in plan.checkpoint.parts:
        for own in part.source.observed:
            if digest_of(own.model) != own.digest:
                raise IncompatibleSources(
                    f"holds statistics of another model than {own.model.label}: the values differ",
                    where=own.reference,
                    remedy="Make them of this model, or name the one that they were made of, in the dtype that it had.",
                )


# ---- space --------------------------------------------------------------------------------------------


def check_disk(plan: Plan, output: Path, finished: int, at_once: int = 1) -> None:
    """See that what is not yet `finished` (bytes) fits on the disk of `output`, with what lies beside it for a while
    where tensors are made as a whole, of as many shards as are made `at_once`.

    Raises NotEnoughDisk with both numbers.
    """
    beside = plan.scratch_size(at_once) if finished < plan.size else 0
    needed = plan.size - finished + beside
    free = free_space(output)
    if needed > free:
        more = f", {beside:,} of them for a while" if beside else ""
        raise NotEnoughDisk(f"the result needs {needed:,} bytes{more}, the disk has {free:,} free", where=str(output))


def free_space(output: Path) -> int:
    """Bytes that the disk of a folder, which need not exist yet, has free for this user."""
    folder = output.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free

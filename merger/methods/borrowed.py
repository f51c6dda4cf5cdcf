"""Rules whose arithmetic is mergekit's own: RAM, RAM+, Arcee Fusion, NuSLERP along the first axis.

Knows how mergekit's library is called on one tensor and what that costs; knows nothing of how it computes. mergekit
0.1.5 is LGPL-3.0: it is called, not copied, and only where it is installed.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import prod
from typing import Any, ClassVar, final

from merger.errors import NotInstalled
from merger.expression import Expression, cast
from merger.methods.rules import Group, Parameter, Rule, Value, table
from merger.whole import Function, Tensors, Whole, loading

VERSION = "0.1.5"  # the first with the calls that are used here
_SAMPLED = 1_000_000  # elements above which arcee_fusion takes a random sample (mergekit's arcee_fusion.py)
_DRAWING = threading.Lock()  # torch draws from one generator for all threads


@final
@dataclass(frozen=True, slots=True)
class Borrowed(Function):
    """A call of `mergekit.merge_methods.merge_tensors`. The base, where there is one, is the first tensor; `each` has a
    value for each of the others. `copies` is how many tensors of the result's size the call holds for each that it is
    given. Random numbers follow from the `seed`.
    """

    finite: ClassVar[bool] = False
    method: str
    name: str
    has_base: bool
    shared: tuple[tuple[str, Value], ...]
    each: tuple[tuple[str, tuple[Value, ...]], ...]
    copies: int
    seed: int

    def memory(self, inputs: Sequence[Expression]) -> int:
        size = inputs[0].nbytes + 8 * prod(inputs[0].shape)  # with a count of eight bytes for each element
        return sum(loading(tensor) for tensor in inputs) + self.copies * len(inputs) * size

    def __call__(self, tensors: Tensors) -> Any:
        from mergekit.merge_methods import merge_tensors

        ids = [f"{index}" for index in range(len(tensors))]
        others = ids[1:] if self.has_base else ids
        parameters: dict[str, Any] = dict(self.shared)
        parameters |= {name: dict(zip(others, values, strict=True)) for name, values in self.each}
        given = tensors.all()
        drawing = self.method == "arcee_fusion" and given[0].numel() > _SAMPLED
        with _seeded(self.seed) if drawing else nullcontext():
            return merge_tensors(
                given,
                self.method,
                parameters=parameters,
                ids=ids,
                base_index=0 if self.has_base else None,
                name=self.name,
                dtype=given[0].dtype,
            )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """While this thread alone draws, from a generator that begins at a seed."""
    import torch

    with _DRAWING, torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _check_installed() -> None:
    try:
        found = version("mergekit")
    except PackageNotFoundError:
        found = ""
    if found != VERSION:
        raise NotInstalled(
            f"is computed by mergekit {VERSION}, " + (f"{found} is installed" if found else "which is not installed"),
            where="merge_method",
            remedy="pip install 'merger[mergekit]'",
        )


def _seed(group: Group) -> int:
    """A number of the recipe's seed and the tensor's name, of 63 bits."""
    digest = hashlib.sha256(f"{group.seed} {group.name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def borrowed(group: Group, method: str, copies: int) -> Expression:
    """What mergekit makes of a group by a method, computed in the group's `work_dtype` as there.

    Raises NotInstalled.
    """
    _check_installed()
    tensors = [*([group.base] if group.base else []), *group.tensors]
    function = Borrowed(
        method,
        group.name,
        group.base is not None,
        tuple(group.shared.items()),
        tuple(group.each.items()),
        copies,
        _seed(group),
    )
    inputs = tuple(cast(tensor, group.work_dtype) for tensor in tensors)
    return Whole(group.dtype, group.shape, inputs, function, group.name)


def nuslerp(group: Group) -> Expression:
    """NuSLERP along rows, or along columns with `nuslerp_row_wise`, of two tensors with a `weight` each, from a base or none."""
    return borrowed(group, "nuslerp", 3)


def _by(method: str, copies: int) -> Callable[[Group], Expression]:
    return lambda group: borrowed(group, method, copies)


_EPSILON = Parameter(float, 1e-5)
_RAM = "arXiv 2601.13572"

RULES: dict[str, Rule] = table(
    Rule("ram", "RAM", "required", _by("ram", 3), {"epsilon": _EPSILON}, {}, paper=_RAM),
    Rule(
        "ramplus_tl",
        "RAM+ (tensor-local)",
        "required",
        _by("ramplus_tl", 3),
        {"r": Parameter(float, 0.1), "alpha": Parameter(float, 0.2), "epsilon": _EPSILON},
        {},
        paper=_RAM,
    ),
    Rule(
        "arcee_fusion",
        "Arcee Fusion",
        "required",
        _by("arcee_fusion", 3),
        {},
        {},
        most=1,
        absent="single",
        paper="https://arcee.ai",
    ),
)

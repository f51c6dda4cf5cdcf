"""Moments of AdamW beside a checkpoint, carried through surgery.

Knows how they are named and what becomes of them; the surgery itself is the same as that of the weights.

transformers keeps them in `optimizer.pt`, a pickle, which is not read. `optimizer.safetensors` holds for each parameter
`NAME` the tensors `exp_avg.NAME` and `exp_avg_sq.NAME` (torch.optim.AdamW's names), and `step`, a scalar.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from merger.checkpoint import Checkpoint
from merger.errors import IncompatibleSources, SourceError
from merger.expression import Expression

Carry = Literal["carry", "drop"]
CARRY = "carry: map the AdamW moments in optimizer.safetensors beside the source; drop: begin with new ones."
STEP = "step"
KINDS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Moments:
    """The first (`power` 1) or the second (`power` 2) moments of all parameters, under the parameters' names.

    Where a weight is multiplied by a, its gradient is divided by a, and a moment by a to its power.
    """

    power: int
    tensors: Mapping[str, Expression]


def carried(
    carry: Carry, origin: Checkpoint, surgery: Callable[[Moments], Mapping[str, Expression]]
) -> dict[str, Expression]:
    """The moments of the result, in the names of the file. Raises SourceError where there are none to carry."""
    if carry == "drop":
        return {}
    moments = origin.optimizer or (origin.parts[0].source.optimizer if _is_stored(origin) else {})
    if not moments:
        raise SourceError(
            "there are no AdamW moments (optimizer.safetensors) beside it",
            where=origin.label,
            remedy="Say `optimizer: drop`, or export them: docs/surgery.md shows how.",
        )
    made: dict[str, Expression] = {STEP: moments[STEP]} if STEP in moments else {}
    for power, kind in enumerate(KINDS, 1):
        found = {name.removeprefix(f"{kind}."): t for name, t in moments.items() if name.startswith(f"{kind}.")}
        _check_complete(kind, found, origin)
        made |= {f"{kind}.{name}": tensor for name, tensor in surgery(Moments(power, found)).items()}
    return made


def _is_stored(origin: Checkpoint) -> bool:
    """Whether it is a model as it stands in its folder, so that what lies beside it is about these weights."""
    is_made = origin.origin is not None or origin.texts  # what is stored has no texts of its own
    return len(origin.parts) == 1 and not is_made and origin.parts[0].weight == 1.0


def _check_complete(kind: str, found: Mapping[str, Expression], origin: Checkpoint) -> None:
    odd = sorted(found.keys() ^ origin.tensors.keys())
    if odd:
        raise IncompatibleSources(
            f"has {'a moment of no' if odd[0] in found else 'no moment of the'} parameter {odd[0]!r}",
            where=f"{origin.label}: optimizer.safetensors: {kind}",
        )

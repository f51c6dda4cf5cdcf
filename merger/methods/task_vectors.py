"""Rules on task vectors, what fine-tunes differ from their base by: which elements count, whose sign, and how much.

Knows parameters; the arithmetic is in `merger.deltas`. Names, defaults and definitions are those of mergekit 0.1.5
(generalized_task_arithmetic.py, sparsify.py, sce.py, nearswap.py), which differ from the papers' where
`docs/mergekit.md` says so.
"""

import math
from collections.abc import Callable

from merger.deltas import Mask, Model, mixed
from merger.expression import Expression, combine
from merger.methods.rules import Group, Parameter, Rule, table
from merger.noise import key_of
from merger.swaps import swapped

_WEIGHT = Parameter(float, required=True)
_DENSITY = Parameter(float, 1.0, least=0.0, most=1.0)
_Masks = Callable[[Group, int], Mask]


def _everything(_group: Group, _model: int) -> Mask:
    return Mask()


def _size(group: Group) -> int:
    return math.prod(group.shape)


def _largest(group: Group, model: int) -> Mask:
    """The largest magnitudes, at least one element."""
    density = group.numbers("density")[model]
    if density >= 1:
        return Mask()
    return Mask(reaching=0 if density <= 0 else max(1, int(density * _size(group))))


def _middle(group: Group, model: int) -> Mask:
    """As many as the density says, but not the largest; more of those where the others are too few."""
    density, size = group.numbers("density")[model], _size(group)
    if density >= 1:
        return Mask()
    target, top = int(density * size), int(group.numbers("gamma")[model] * size)
    bottom = max(0, size - target - top)
    return Mask(reaching=size - bottom, beyond=size - bottom - target)


def _key(group: Group, model: int) -> tuple[int, int]:
    return key_of(group.seed, f"{group.name}\0{model}")


def _any(group: Group, model: int) -> Mask:
    """Each element with the same probability."""
    density = group.numbers("density")[model]
    return Mask(least=density, most=density, key=_key(group, model))


def _likely(group: Group, model: int) -> Mask:
    """Each element with a probability that grows with its rank in its row (MagPrune)."""
    density, epsilon = group.numbers("density")[model], group.numbers("epsilon")[model]
    if density >= 1:
        return Mask()
    if density <= 0:
        return Mask(reaching=0)
    if density + epsilon >= 1 or density - epsilon <= 0:
        raise ValueError(
            f"density {density:g} and epsilon {epsilon:g}: their sum and difference must lie within 0 and 1"
        )
    return Mask(least=density - epsilon, most=density + epsilon, key=_key(group, model))


def _rule(
    name: str, title: str, masks: _Masks, *, elect: bool, normalize: bool, rescale: bool, paper: str, **each: Parameter
) -> Rule:
    def make(group: Group) -> Expression:
        assert group.base
        models = [
            Model(tensor, weight, masks(group, i))
            for i, (tensor, weight) in enumerate(zip(group.tensors, group.numbers("weight"), strict=True))
        ]
        return mixed(
            group.base,
            models,
            group.dtype,
            scale=group.number("lambda"),
            elect="weighted" if elect else None,
            normalize=bool(group.shared["normalize"]),
            factors="magnitudes" if group.shared["rescale"] else "one",
        )

    shared = {
        "normalize": Parameter(bool, normalize),
        "rescale": Parameter(bool, rescale),
        "lambda": Parameter(float, 1.0),
        "int8_mask": Parameter(bool, False),  # changes nothing here: masks are no tensors
    }
    return Rule(name, title, "required", make, shared, {"weight": _WEIGHT, "density": _DENSITY, **each}, paper=paper)


def _task_arithmetic(group: Group) -> Expression:
    """A plain weighted sum: no element is treated unlike another."""
    assert group.base
    weights, scale = group.numbers("weight"), group.number("lambda")
    total = sum(weights)
    if group.shared["normalize"] and abs(total) >= 1e-8:
        scale /= total
    scaled = [scale * weight for weight in weights]
    terms = [*zip(scaled, group.tensors, strict=True), (1.0 - sum(scaled), group.base)]
    return combine(terms, group.dtype)


def _sce(group: Group) -> Expression:
    assert group.base
    mask = Mask(varying=group.number("select_topk"))
    models = [Model(tensor, 1.0, mask) for tensor in group.tensors]
    return mixed(group.base, models, group.dtype, elect="plain", normalize=True, factors="energies")


def _nearswap(group: Group) -> Expression:
    assert group.base
    return swapped(group.base, group.tensors[0], group.number("t"), group.dtype)


_GAMMA = Parameter(float, 0.01, least=0.0, below=1.0)
_EPSILON = Parameter(float, 0.15, least=0.0, below=1.0)
_TIES, _DARE = "arXiv 2306.01708", "arXiv 2311.03099"
_CRUMBS, _DELLA = "arXiv 2312.06795", "arXiv 2406.11617"
_arithmetic = _rule(
    "task_arithmetic",
    "Task Arithmetic",
    _everything,
    elect=False,
    normalize=False,
    rescale=False,
    paper="arXiv 2212.04089",
)

RULES = table(
    Rule(**{**vars(_arithmetic), "make": _task_arithmetic}),
    _rule("ties", "TIES", _largest, elect=True, normalize=True, rescale=False, paper=_TIES),
    _rule("dare_ties", "DARE TIES", _any, elect=True, normalize=False, rescale=True, paper=_DARE),
    _rule("dare_linear", "Linear DARE", _any, elect=False, normalize=False, rescale=True, paper=_DARE),
    _rule(
        "breadcrumbs",
        "Model Breadcrumbs",
        _middle,
        elect=False,
        normalize=False,
        rescale=False,
        paper=_CRUMBS,
        gamma=_GAMMA,
    ),
    _rule(
        "breadcrumbs_ties",
        "Model Breadcrumbs with TIES",
        _middle,
        elect=True,
        normalize=False,
        rescale=False,
        paper=_CRUMBS,
        gamma=_GAMMA,
    ),
    _rule("della", "DELLA", _likely, elect=True, normalize=True, rescale=True, paper=_DELLA, epsilon=_EPSILON),
    _rule(
        "della_linear",
        "Linear DELLA",
        _likely,
        elect=False,
        normalize=False,
        rescale=True,
        paper=_DELLA,
        epsilon=_EPSILON,
    ),
    Rule(
        "sce",
        "SCE",
        "required",
        _sce,
        {"select_topk": Parameter(float, 1.0, least=0.0, most=1.0), "int8_mask": Parameter(bool, False)},
        {},
        paper="arXiv 2408.07990",
    ),
    Rule(
        "nearswap",
        "NearSwap",
        "required",
        _nearswap,
        {"t": Parameter(float, required=True, least=0.0)},
        {},
        most=1,
        absent="base",
        paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    ),
)

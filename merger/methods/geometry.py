"""Rules that follow angles: interpolations on spheres, and model stock. Knows which tensors they take; the weights are
in `merger.curves`.

Parameters and defaults are those of mergekit 0.1.5.
"""

from merger.blends import blended
from merger.curves import Karcher, ModelStock, MultiSlerp, NuSlerp, Slerp
from merger.expression import Expression, cast
from merger.methods import borrowed
from merger.methods.rules import Group, Parameter, Rule, table

_WEIGHT = Parameter(float, required=True)


def _slerp(group: Group) -> Expression:
    assert group.base
    return blended([group.base, group.tensors[0]], None, Slerp(group.number("t")), group.dtype)


def _nuslerp(group: Group) -> Expression:
    first, second = group.numbers("weight")
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    by_row = not group.shared["nuslerp_flatten"]
    if by_row and group.shared["nuslerp_row_wise"] and len(group.shape) > 1:
        return borrowed.nuslerp(group)
    return blended(group.tensors, group.base, NuSlerp(t), group.dtype, by_row=by_row)


def _multislerp(group: Group) -> Expression:
    if len(group.tensors) == 1:
        return cast(group.tensors[0], group.dtype)
    weights, total = group.numbers("weight"), sum(group.numbers("weight"))
    if group.shared["normalize_weights"]:
        if total == 0:
            raise ValueError("the weights sum to 0: nothing can be normalized by that")
        weights = tuple(weight / total for weight in weights)
    return blended(group.tensors, group.base, MultiSlerp(weights, group.number("eps")), group.dtype)


def _karcher(group: Group) -> Expression:
    curve = Karcher(len(group.tensors), int(group.number("max_iter")), group.number("tol"))
    return blended(group.tensors, None, curve, group.dtype)


def _model_stock(group: Group) -> Expression:
    by_row = bool(group.shared["filter_wise"])
    return blended(group.tensors, group.base, ModelStock(len(group.tensors)), group.dtype, by_row=by_row)


RULES = table(
    Rule(
        "slerp",
        "SLERP",
        "required",
        _slerp,
        {"t": Parameter(float, required=True)},
        {},
        most=1,
        absent="single",
        paper="Shoemake 1985, Animating rotation with quaternion curves",
    ),
    Rule(
        "nuslerp",
        "NuSLERP",
        "optional",
        _nuslerp,
        {"nuslerp_flatten": Parameter(bool, True), "nuslerp_row_wise": Parameter(bool, False)},
        {"weight": _WEIGHT},
        least=2,
        most=2,
        absent="single",
    ),
    Rule(
        "multislerp",
        "Multi-SLERP",
        "optional",
        _multislerp,
        {"normalize_weights": Parameter(bool, True), "eps": Parameter(float, 1e-8, above=0.0)},
        {"weight": _WEIGHT},
    ),
    Rule(
        "karcher",
        "Karcher mean",
        "ignored",
        _karcher,
        {"max_iter": Parameter(int, 10, least=0), "tol": Parameter(float, 1e-5, above=0.0)},
        {},
        paper="arXiv 2603.04972",
    ),
    Rule(
        "model_stock",
        "Model Stock",
        "required",
        _model_stock,
        {"filter_wise": Parameter(bool, False)},
        {},
        least=2,
        absent="stock",
        paper="arXiv 2403.19522",
    ),
)

"""The rules that need no look at a whole tensor, and the table of all. Knows sums; reads no weights.

Names, parameters and defaults are those of mergekit 0.1.5, so that its configurations mean here what they mean there.
"""

from merger.expression import Expression, cast, combine
from merger.methods import borrowed, geometry, task_vectors
from merger.methods.rules import Group, Parameter, Rule, table

WEIGHT = Parameter(float, required=True)


def _linear(group: Group) -> Expression:
    weights = group.numbers("weight")
    total = sum(weights)
    if group.shared["normalize"]:
        if abs(total) < 1e-8:
            raise ValueError("the weights sum to 0: nothing can be normalized by that")
        weights = tuple(weight / total for weight in weights)
    return combine(list(zip(weights, group.tensors, strict=True)), group.dtype)


def _passthrough(group: Group) -> Expression:
    [scale] = group.each["scale"]
    return cast(group.tensors[0], group.dtype) if scale is None else combine([(scale, group.tensors[0])], group.dtype)


_PLAIN = table(
    Rule(
        "linear",
        "Linear",
        "ignored",
        _linear,
        {"normalize": Parameter(bool, True)},
        {"weight": WEIGHT},
        paper="arXiv 2203.05482",
    ),
    Rule("passthrough", "Passthrough", "ignored", _passthrough, {}, {"scale": Parameter(float)}, most=1),
)

RULES: dict[str, Rule] = {**_PLAIN, **geometry.RULES, **task_vectors.RULES, **borrowed.RULES}

"""Which expert of one mixture is which of another: weight matching of Git Re-Basin (arXiv 2209.04836, section 3.2) for
experts, whose order in a layer means nothing.

Knows layers and their values; knows nothing of recipes. The places of a layer's experts are those for which the sum of
the inner products of all that moves with an expert (its matrices, its row of the router, its bias) is largest, which is
where the sum of squared distances is least. Layers do not depend on each other.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merger.assignment import within_groups
from merger.checkpoint import Checkpoint
from merger.configs import resolved
from merger.errors import UnsupportedModel
from merger.expression import Expression, cast
from merger.layers import Layers, split
from merger.mixtures import by_expert, has_experts
from merger.values import side_by_side

_MEMORY = 64 << 20  # bytes of values at a time


def orders(other: Checkpoint, first: Checkpoint, say: Callable[[int, int], None]) -> list[list[int]]:
    """For each layer of `first` which expert of `other` goes to which place; none for layers without experts."""
    config = resolved(first.config, first.label)
    mine, theirs = _layers(first, config), _layers(other, config)
    found, groups = [], int(config.get("n_group") or 1)
    for index, (layer, its) in enumerate(zip(mine.tensors, theirs.tensors, strict=True)):
        found.append(_order(layer, its, groups, f"layer {index}") if has_experts(layer) else [])
        say(index + 1, len(mine))
    return found


def _layers(model: Checkpoint, config: Mapping[str, Any]) -> Layers:
    return split(model.tensors, config, model.label)[0]


def _order(layer: Mapping[str, Expression], its: Mapping[str, Expression], groups: int, where: str) -> list[int]:
    mine, theirs = by_expert(layer), by_expert(its)
    products = sum(_products(mine[name], theirs[name]) for name in mine)
    if not np.isfinite(products).all():
        raise UnsupportedModel("has experts with NaN or infinite values, which cannot be compared", where=where)
    return within_groups(-np.asarray(products), groups)


def _products(a: Sequence[Expression], b: Sequence[Expression]) -> NDArray[np.float64]:
    """The inner products [experts, experts] of tensors of one shape, in float64."""
    count = len(a)
    found = np.zeros((count, count))
    elements = max(1, _MEMORY // (2 * count * 8))
    for piece in side_by_side([cast(tensor, "F64") for tensor in (*a, *b)], elements):
        values = np.stack([part.view(np.float64) for part in piece])
        found += values[:count] @ values[count:].T
    return found

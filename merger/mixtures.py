"""Which tensors of a layer belong to its experts, one for each or all in one, with the routers' rows. Knows names."""

import re
from collections.abc import Mapping, Sequence

from merger.expression import Expression, join
from merger.shaping import columns, rows

Layer = Mapping[str, Expression]

# What transformers 5 holds of all experts as one tensor, [experts, rows, columns], by what an expert's own are called.
_FUSED = {
    "gate_up_proj": (("gate_proj.weight", "up_proj.weight"), ("w1.weight", "w3.weight")),
    "down_proj": (("down_proj.weight",), ("w2.weight",)),
}

EXPERT = re.compile(r"^(.*\bexperts)\.(\d+)\.(.+)$")
# One row, matrix or number an expert.
BY_EXPERT = re.compile(
    r"(^|\.)(gate|router\.layer|router\.proj|gate\.wg|router)\.(weight|bias)$"
    r"|e_score_correction_bias$|expert_bias$|per_expert_scale$"
    r"|experts\.(gate_up_proj|down_proj)(_bias)?$|block_sparse_moe\.(input|output)_linear\.weight$"
)


def fused(names: Sequence[str]) -> dict[str, list[str]]:
    """The names of experts' matrices, in their order, by the name of the tensor that transformers 5 makes of them."""
    found: dict[str, dict[tuple[int, int], str]] = {}
    for name in names:
        match = EXPERT.match(name)
        if match is None:
            continue
        prefix = match[1].replace("block_sparse_moe.", "mlp.")
        for whole, kinds in _FUSED.items():
            for kind in (kind for kind in kinds if match[3] in kind):
                found.setdefault(f"{prefix}.{whole}", {})[int(match[2]), kind.index(match[3])] = name
    return {whole: [members[place] for place in sorted(members)] for whole, members in found.items()}


def number_of(name: str) -> int | None:
    """Which expert a tensor belongs to; None where it is no expert's alone."""
    match = EXPERT.match(name)
    return int(match[2]) if match else None


def has_experts(layer: Layer) -> bool:
    """Whether the layer has experts."""
    return any("experts" in name or "input_linear" in name for name in layer)


def by_expert(layer: Layer) -> dict[str, list[Expression]]:
    """The tensors of all experts with their rows of the router, by what they are: one each, in the experts' order."""
    numbered: dict[str, dict[int, Expression]] = {}
    for name, tensor in layer.items():
        match = EXPERT.match(name)
        if match:
            numbered.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensor
    found = {name: [tensors[e] for e in sorted(tensors)] for name, tensors in numbered.items()}
    for name, tensor in layer.items():
        if BY_EXPERT.search(name):
            cut = columns if _is_flat(tensor) else rows
            found[name] = [cut(tensor, e, e + 1) for e in range(tensor.shape[1 if _is_flat(tensor) else 0])]
    return found


def _is_flat(tensor: Expression) -> bool:
    """Whether the axis of the experts is the second, after one of length 1."""
    return len(tensor.shape) == 2 and tensor.shape[0] == 1


def reordered(layer: Layer, order: Sequence[int]) -> dict[str, Expression]:
    """The layer with expert `order[i]` in place i, and its row of the router with it."""
    parts = by_expert(layer)
    made: dict[str, Expression] = {}
    for name, tensor in layer.items():
        match = EXPERT.match(name)
        if match:
            made[name] = parts[f"{match[1]}.{match[3]}"][order[int(match[2])]]
        elif BY_EXPERT.search(name):
            made[name] = join([parts[name][e] for e in order], tensor.shape)
        else:
            made[name] = tensor
    return made

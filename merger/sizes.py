"""How large a model is: all parameters, and those that a token meets. Knows how experts are named and counted."""

import re
from collections.abc import Mapping
from typing import Any

from merger.checkpoint import Checkpoint

_EXPERT = re.compile(r"(^|\.)experts\.|block_sparse_moe\.(input|output)_linear\.")
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
PER_TOKEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")


def parameters(model: Checkpoint) -> int:
    """How many numbers the model has."""
    return sum(tensor.size for tensor in model.tensors.values())


def active(model: Checkpoint) -> int:
    """How many of them a token meets: all but the experts that it does not take."""
    experts = sum(tensor.size for name, tensor in model.tensors.items() if _EXPERT.search(name))
    count, taken = number_of(COUNTS, model.config or {}), number_of(PER_TOKEN, model.config or {})
    return parameters(model) - (experts - experts * taken // count if experts and count and taken else 0)


def number_of(keys: tuple[str, ...], config: Mapping[str, Any]) -> int:
    """The first of these keys of a config that holds a number, or 0."""
    return next((int(config[key]) for key in keys if isinstance(config.get(key), int)), 0)

"""The layers of a model: which tensors are theirs, which of them write to the residual stream, how configs list them.

Knows tensor names and config keys of the model families of transformers; knows nothing of values or files.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merger.errors import UnsupportedModel
from merger.expression import Expression

Config = Mapping[str, Any]

# The first number after such a name is the layer's. Later ones are experts': they are left alone.
_LAYER = re.compile(r"^((?:.*?\.)?(?:layers|h|blocks))\.(\d+)\.(.+)$")
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")

# What writes to the residual stream: a block adds nothing when these are zero. Where a norm follows, it maps zero to
# zero (RMSNorm has no bias). From the models' own code in transformers.
_MIXER_OUTPUT = re.compile(
    r"^(self_attn|self_attention|attn|attention|linear_attn|conv)\.(o_proj|out_proj|dense|c_proj)(\.weight|\.bias)$"
)
_MLP_OUTPUT = re.compile(
    r"^((mlp|feed_forward|block_sparse_moe|shared_mlp)\.)?"
    r"((experts(\.\d+)?|shared_experts?|shared_mlp)\.)?"
    r"(down_proj|c_proj|fc2|dense_4h_to_h|w2|output_linear)(\.weight|\.bias|_bias)?$"
)
_SCALAR = "layer_scalar"  # gemma 4 multiplies the whole stream by it, so a block that adds nothing has a one

# Lists in configs whose length may be the number of layers by chance.
_NOT_PER_LAYER = re.compile(r"token_ids?$|^architectures$|_names$|^mlp_only_layers$|^moe_layers$|_idxs$|_indices$")
_INDICES = ("full_attn_idxs", "attn_layer_indices")
_REFUSED = {
    "scale_attn_by_inverse_layer_idx": "attention is scaled by the layer's number",
    "num_kv_shared_layers": "layers share keys and values with others",
    "hidden_size_per_layer_input": "every layer has embeddings of its own",
    "laurel_rank": "every layer has embeddings of its own",
    "attn_temperature_tuning": "attention follows the layer's number",
    "attn_layer_period": "the kind of a layer follows from its number",
    "cross_attention_layers": "layers of several kinds are mixed",
    "num_mem_blocks": "layers share weights",
    "mod": "tokens skip some of its layers, which are numbered",
}


@dataclass(frozen=True)
class Layers:
    """The tensors of a model's layers, under their names within the layer; `prefix` comes before the number."""

    prefix: str
    tensors: tuple[Mapping[str, Expression], ...]

    def __len__(self) -> int:
        return len(self.tensors)

    def named(self, index: int, rest: str) -> str:
        """The full name of a tensor of a layer."""
        return f"{self.prefix}.{index}.{rest}"


def split(tensors: Mapping[str, Expression], config: Config, where: str) -> tuple[Layers, dict[str, Expression]]:
    """The layers, and the tensors outside them. Raises UnsupportedModel where there is not one stack of layers."""
    stacks: dict[str, dict[int, dict[str, Expression]]] = {}
    others = {}
    for name, tensor in tensors.items():
        match = _LAYER.match(name)
        if match:
            stacks.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = tensor
        else:
            others[name] = tensor
    if len(stacks) != 1:
        found = ", ".join(sorted(stacks)) or "none"
        raise UnsupportedModel(f"has {len(stacks)} stacks of layers ({found}), where one is needed", where=where)
    [(prefix, layers)] = stacks.items()
    count = count_of(config, where)
    if sorted(layers) != list(range(count)):
        raise UnsupportedModel(
            f"has the layers {_ranges(sorted(layers))} in its files and {count} by its config", where=where
        )
    return Layers(prefix, tuple(layers[i] for i in range(count))), others


def prefix_of(tensors: Iterable[str]) -> str:
    """What comes before the number of a layer in the names of a model that has one stack of layers."""
    return next(match[1] for match in map(_LAYER.match, tensors) if match)


def _ranges(numbers: Sequence[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def count_of(config: Config, where: str) -> int:
    """The number of layers that a config tells. Raises UnsupportedModel."""
    return int(config[_count_key(config, where)])


def count_in(config: Config) -> int | None:
    """The number of layers where a config, or that of the text in it, tells it."""
    parts = (config, *(config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), Mapping)))
    return next((part[key] for part in parts for key in _COUNTS if isinstance(part.get(key), int)), None)


def _count_key(config: Config, where: str) -> str:
    for key in _COUNTS:
        if isinstance(config.get(key), int):
            return key
    raise UnsupportedModel("its config does not tell the number of layers", where=where)


def outputs_of(layer: Mapping[str, Expression]) -> list[str]:
    """The names within a layer of what writes to the residual stream. Empty where the family is not known."""
    mixers = [name for name in layer if _MIXER_OUTPUT.match(name)]
    mlps = [name for name in layer if _MLP_OUTPUT.match(name)]
    return [*mixers, *mlps] if mixers and mlps else []


def scalars_of(layer: Mapping[str, Expression]) -> list[str]:
    """The names within a layer of what multiplies the residual stream."""
    return [name for name in layer if name == _SCALAR]


def is_sparse(layer: Iterable[str]) -> bool:
    """Whether the layer has experts."""
    return any(re.search(r"(^|\.)experts\.|input_linear", name) for name in layer)


# ---- configs ------------------------------------------------------------------------------------------


def check_positions_do_not_count(config: Config, where: str) -> None:
    """Refuse models in which a layer does something else at another place. Raises UnsupportedModel."""
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise UnsupportedModel(
                f"is {config[key]!r}: {reason}, so layers cannot be added or moved", where=f"{where}: config {key}"
            )


def with_layers(config: Config, order: Sequence[int], sparse: Sequence[bool], where: str) -> dict[str, Any]:
    """The (full) config of a model whose layer i is layer `order[i]` of this one; `sparse` tells which of the new
    layers have experts. Every list with an entry a layer is carried. Raises UnsupportedModel.
    """
    count = count_of(config, where)
    changed = dict(config)
    for key, value in config.items():
        if _is_per_layer(key, value, count):
            changed[key] = [value[i] for i in order]
        if key in _INDICES and isinstance(value, list):
            changed[key] = [new for new, old in enumerate(order) if old in value]
    per_layer = config.get("per_layer_config")
    if isinstance(per_layer, Mapping):  # by the number of the layer, as text
        changed["per_layer_config"] = {
            str(new): per_layer[str(old)] for new, old in enumerate(order) if str(old) in per_layer
        }
    changed[_count_key(config, where)] = len(order)
    return {**changed, **sparse_layers(changed, sparse, where)}


def _is_per_layer(key: str, value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and not _NOT_PER_LAYER.search(key)


def belongs_to_layers(key: str, config: Config) -> bool:
    """Whether a key of a (full) config may differ between models of one kind with different numbers of layers."""
    value = config.get(key)
    listed = key in (*_INDICES, "mlp_only_layers", "moe_layers", "max_window_layers")
    return key in _COUNTS or listed or _is_per_layer(key, value, count_of(config, key))


def per_layer_lists_joined(configs: Sequence[Config]) -> dict[str, Any]:
    """The first of several (full) configs of one kind, with the layers of all of them."""
    joined, first = dict(configs[0]), 0
    for config in configs[1:]:
        first += count_of(configs[0], "config")
        for key, value in config.items():
            if _is_per_layer(key, value, count_of(config, "config")):
                joined[key] = [*joined[key], *value]
    total = sum(count_of(config, "config") for config in configs)
    return {**joined, _count_key(joined, "config"): total}


def sparse_layers(config: Config, sparse: Sequence[bool], where: str) -> dict[str, Any]:
    """The keys that say which layers have experts, in the form that this config has. Raises UnsupportedModel where it
    has none for such a choice.
    """
    if not any(sparse):
        return {}
    dense = [i for i, is_one in enumerate(sparse) if not is_one]
    chosen = [i for i, is_one in enumerate(sparse) if is_one]
    by_choice: dict[str, dict[str, Any]] = {
        "mlp_only_layers": {"mlp_only_layers": dense, "decoder_sparse_step": 1},
        "moe_layers": {"moe_layers": chosen, "interleave_moe_layer_step": 1},
        "mlp_layer_types": {"mlp_layer_types": ["sparse" if is_one else "dense" for is_one in sparse]},
    }
    for key, told in by_choice.items():
        if key in config:
            return told
    for key in ("first_k_dense_replace", "num_dense_layers"):
        if key in config and dense == list(range(len(dense))):
            return {key: len(dense)}
    if "moe_layer_start_index" in config and chosen == list(range(len(sparse)))[chosen[0] : chosen[-1] + 1]:
        return {"moe_layer_start_index": chosen[0], "moe_layer_end_index": chosen[-1], "moe_layer_interval": 1}
    if dense and chosen:
        raise UnsupportedModel(
            f"{config.get('model_type')} cannot have experts in the layers {chosen} and none in {dense}", where=where
        )
    return {}

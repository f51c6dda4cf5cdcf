"""Facts about model families that averaging depends on.

Knows configs and tensor names; knows nothing of files or values.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

Config = Mapping[str, Any]

# Routers' correction biases and the like are kept in float32 by the models that have them (transformers
# `_keep_in_fp32_modules`): lower precision changes which experts are picked.
_KEPT_IN_FLOAT32 = re.compile(r"e_score_correction_bias|expert_bias|moe_statics|\bmlp\.gate\.wg\b")
_ERNIE_ROUTER = re.compile(r"\bmlp\.gate\.weight$")
# Running statistics of batch normalisation: they belong to one set of weights and are not averaged
# (Izmailov et al. 2018, section 3.2: recompute them with a pass over the data).
_RUNNING_STATISTICS = re.compile(r"(^|\.)(running_mean|running_var|num_batches_tracked)$")
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
_HEADS = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$|^(model\.)?output\.weight$")

# Keys that say nothing about the function that the weights compute.
_INCIDENTAL = {
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "tie_word_embeddings",  # handled by itself
    "architectures",
}

_QUANTIZATION = ("quantization_config", "compression_config")

# Keys that count while a model is trained or while text is generated, not for what it computes.
_OF_TRAINING = re.compile(
    r"dropout|drop_|jitter|initializer|_std$|loss|aux|problem_type|finetuning_task|label|num_labels|_token_id"
    r"|gradient_checkpointing|max_position_embeddings|model_max_length|sentence_|summary_|auto_map|unsloth"
)


def changes_function(key: str) -> bool:
    """Whether a key of a config says what the weights compute: not one of training, of labels or of generation."""
    return not _OF_TRAINING.search(key.rpartition(".")[2]) and not _OF_TRAINING.search(key.partition(".")[0])


def labels_of(config: Config | None) -> tuple[str, ...] | None:
    """The names of a classifier's labels in the order of their numbers, or None where the config names none."""
    names = (config or {}).get("id2label")
    if not isinstance(names, Mapping) or not all(str(number).isdigit() for number in names):
        return None
    return tuple(str(names[number]) for number in sorted(names, key=int))


def kept_in_float32(name: str, config: Config | None) -> bool:
    """Whether the tensor stays in float32 when a checkpoint of this config is written in a narrower dtype."""
    if (config or {}).get("model_type") == "ernie4_5_moe" and _ERNIE_ROUTER.search(name):
        return True
    return bool(_KEPT_IN_FLOAT32.search(name))


def is_depth_router(name: str) -> bool:
    """Whether the tensor is a router of `mod`, which transformers does not know."""
    return name.endswith(".mod_router.weight")


def is_running_statistic(name: str) -> bool:
    """Whether the tensor is a running statistic of batch normalisation."""
    return bool(_RUNNING_STATISTICS.search(name))


def embedding_of(names: Collection[str]) -> str | None:
    """The name of the input embedding, or None where there is not exactly one."""
    return _only(name for name in names if _EMBEDDINGS.search(name))


def head_of(names: Collection[str]) -> str | None:
    """The name of the output head, or None where there is not exactly one."""
    return _only(name for name in names if _HEADS.search(name))


def _only(found: Any) -> str | None:
    names = list(found)
    return names[0] if len(names) == 1 else None


def ties_embeddings(config: Config | None) -> bool:
    """Whether the config says that the output head is the input embedding."""
    return bool(config) and bool(_text_config(config).get("tie_word_embeddings", False))


def with_ties(config: Config, tied: bool) -> dict[str, Any]:
    """The config saying whether the head is the embedding."""
    return {**_replaced(config, "tie_word_embeddings", tied), "tie_word_embeddings": tied}


def with_dtype(config: Config, dtype: str) -> dict[str, Any]:
    """The config naming another dtype (torch's name), under the keys that it has: `dtype`, before v5 `torch_dtype`."""
    changed = _replaced(_replaced(config, "dtype", dtype), "torch_dtype", dtype)
    return changed if "dtype" in changed or "torch_dtype" in changed else {**changed, "dtype": dtype}


def quantization_of(config: Config | None) -> Config | None:
    """What a config says of how the model, or the language model in it, is quantized; None where it says nothing."""
    inner = (config or {}).get("text_config")
    for part in (config or {}, inner if isinstance(inner, Mapping) else {}):
        for key in _QUANTIZATION:
            if part.get(key):
                return part[key] if isinstance(part[key], Mapping) else {}
    return None


def with_quantization_of(config: Config, other: Config | None = None) -> dict[str, Any]:
    """The config, and the configs of parts in it, saying of quantization what another one says, or nothing."""
    bare = {
        key: with_quantization_of(value) if _is_part(key, value) else value
        for key, value in config.items()
        if key not in _QUANTIZATION
    }
    return {**bare, **{key: value for key, value in (other or {}).items() if key in _QUANTIZATION}}


def _text_config(config: Config | None) -> Config:
    inner = (config or {}).get("text_config")
    return {**(config or {}), **inner} if isinstance(inner, Mapping) else (config or {})


def _replaced(config: Config, key: str, value: Any) -> dict[str, Any]:
    """`config` with another value of `key` wherever it stands, in parts of a multimodal model (`*_config`) too."""
    changed = {name: _replaced(part, key, value) if _is_part(name, part) else part for name, part in config.items()}
    return {**changed, key: value} if key in config else changed


def _is_part(name: str, value: Any) -> bool:
    return name.endswith("_config") and isinstance(value, Mapping)


def differences(first: Config | None, other: Config | None) -> dict[str, tuple[Any, Any]]:
    """The keys, dotted, under which two configs differ in what the model computes, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    a, b = _flat(first or {}), _flat(other or {})
    for key in sorted(a.keys() | b.keys()):
        if key.rpartition(".")[2] not in _INCIDENTAL and a.get(key) != b.get(key):
            found[key] = (a.get(key), b.get(key))
    return found


def _flat(config: Config, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to: its name up to the first number (`model.layers.3`), else its first two
    parts.
    """
    match = re.match(r"(.*?\.\d+)(\.|$)", name)
    return match[1] if match else ".".join(name.split(".")[:2])

"""What an adapter of low rank says, as PEFT writes it: for each module two thin matrices and a scale.

Knows PEFT's names and config (peft 0.21, `LoraConfig`, `utils/save_and_load.py`); knows nothing of sums or bases.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from merger.checkpoint import Checkpoint
from merger.errors import FormatError, UnsupportedModel
from merger.expression import Expression
from merger.kernels import CODES

PREFIX = "base_model.model."  # of every tensor in the file, before the module's name
REMEDY = "docs/lora.md lists which adapters can be merged."

_A, _B = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING_A, _EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
_FACTOR = re.compile(r"(.+)\.lora_(?:(embedding)_([AB])|([AB])\.weight)")
_OTHER_PARTS = re.compile(r"\.lora_|\.token_adapter\.|\.vera_|\.ia3_|\.oft_|prompt_")

# What changes the meaning of the factors, and why it cannot be added up.
_REFUSED = {
    "use_dora": "is a DoRA: its magnitudes scale what base and factors make together, which no sum of adapters is",
    "lora_bias": "has biases in its factors (lora_bias)",
    "layer_replication": "repeats layers of its base (layer_replication)",
    "target_parameters": "changes parameters of fused modules (target_parameters)",
    "trainable_token_indices": "has rows of the embedding of its own (trainable_token_indices)",
    "alora_invocation_tokens": "counts for some tokens only (aLoRA)",
    "use_qalora": "pools its inputs (QALoRA)",
    "use_bdlora": "has factors of blocks (BD-LoRA)",
    "arrow_config": "chooses among adapters by token (Arrow)",
    "kasa_config": "cuts singular values off its base (KaSA)",
    "monteclora_config": "draws its factors at random (MonteCLoRA)",
    "ensure_weight_tying": "changes tied modules together (ensure_weight_tying)",
    "megatron_config": "is made for Megatron's layers",
}
# First values for which the base stays as it is; all others (pissa, olora, corda, loftq, ...) change the base too.
_STARTS = (True, False, None, "true", "gaussian", "eva", "orthogonal", "mica")
_KNOWN = {
    *_REFUSED,
    *("auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode"),
    *("init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version"),
    *("qalora_group_size", "r", "rank_pattern", "alpha_pattern", "revision", "target_modules", "task_type"),
    *("use_rslora", "velora_config", "runtime_config"),
}


@dataclass(frozen=True)
class Change:
    """The change of a module's weight: scale * b [out, r] times a [r, in]; an embedding's has rows for columns."""

    a: Expression
    b: Expression
    scale: float
    is_embedding: bool

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """An adapter: changes by module, whole tensors that were trained (biases, saved modules) and copies of the base's
    (saved with an embedding that is changed) by the names that they have in the model.
    """

    checkpoint: Checkpoint
    changes: Mapping[str, Change]
    values: Mapping[str, Expression]
    copies: Mapping[str, Expression]

    @property
    def label(self) -> str:
        return self.checkpoint.label

    @property
    def config(self) -> Mapping[str, Any]:
        return self.checkpoint.config or {}

    @property
    def ranks(self) -> list[int]:
        """All ranks that occur, in order."""
        return sorted({change.rank for change in self.changes.values()})


# ---- reading ------------------------------------------------------------------------------------------


def adapter_of(checkpoint: Checkpoint) -> Adapter:
    """What an adapter's checkpoint says. Raises UnsupportedModel for kinds that mean something else, FormatError."""
    label, config = checkpoint.label, checkpoint.config or {}
    _check_config(config, label)
    factors: dict[tuple[str, bool], dict[str, Expression]] = {}
    values: dict[str, Expression] = {}
    copies: dict[str, Expression] = {}
    for full, tensor in checkpoint.tensors.items():
        name = full.removeprefix(PREFIX)
        if name == full:
            raise FormatError(f"does not begin with {PREFIX}", where=f"{label}: tensor {full!r}", remedy=REMEDY)
        match = _FACTOR.fullmatch(name)
        if match:
            factors.setdefault((match[1], bool(match[2])), {})[match[3] or match[4]] = tensor
        elif _OTHER_PARTS.search(name):
            _refuse(f"holds {name}, which is no part of a plain LoRA adapter", label)
        elif ".base_layer." in name and not (name.endswith(".bias") and config.get("bias", "none") != "none"):
            copies[name.replace(".base_layer.", ".")] = tensor
        else:
            values[name.replace(".base_layer.", ".")] = tensor
    changes = {module: _change(module, kind, pair, config, label) for (module, kind), pair in factors.items()}
    if len(changes) < len(factors) or not changes:
        _refuse("changes no module" if not changes else "changes a module in two ways", label)
    return Adapter(checkpoint, changes, values, copies)


def _refuse(message: str, label: str, remedy: str = REMEDY) -> NoReturn:
    raise UnsupportedModel(message, where=label, remedy=remedy)


def _check_config(config: Mapping[str, Any], label: str) -> None:
    kind = str(config.get("peft_type")).rpartition(".")[2].upper()
    if kind != "LORA":
        _refuse(f"is an adapter of the type {kind}, not LORA", label)
    for key, what in _REFUSED.items():
        if config.get(key):
            _refuse(what, label)
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        _refuse(
            f"began as {start!r}, which changes the base too: its factors are relative to that other base",
            label,
            "Save it again by PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...).",
        )


def doubts(config: Mapping[str, Any], label: str) -> list[str]:
    """Warnings of settings that this version does not know."""
    odd = sorted(key for key, value in config.items() if key not in _KNOWN and value)
    return [f"{label}: {key} is not known here, and is taken to change nothing" for key in odd]


def _change(
    module: str, is_embedding: bool, pair: Mapping[str, Expression], config: Mapping[str, Any], label: str
) -> Change:
    where = f"{label}: {module}"
    if len(pair) < 2:
        raise FormatError(f"has lora_{next(iter(pair))} without its other half", where=where)
    a, b = pair["A"], pair["B"]
    if len(a.shape) != 2 or len(b.shape) != 2:
        _refuse("is a convolution's change, or incomplete", where)
    for tensor in (a, b):
        if tensor.dtype not in CODES:
            _refuse(f"is {tensor.dtype}, in which merger does not calculate", where)
    rank = _setting(module, config, "rank_pattern", "r", label)
    if a.shape[0] != b.shape[1] or a.shape[0] != rank:
        shapes = f"A {list(a.shape)}, B {list(b.shape)}"
        raise FormatError(f"has factors {shapes} where the config says rank {rank:g}", where=where)
    alpha = _setting(module, config, "alpha_pattern", "lora_alpha", label)
    return Change(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), is_embedding)


def _setting(module: str, config: Mapping[str, Any], patterns: str, default: str, label: str) -> float:
    """A number that holds for a module: that of the first pattern that matches the end of its name, else `default`."""
    value, found = config.get(default, 8), config.get(patterns) or {}
    if not isinstance(found, Mapping):
        raise FormatError("is not a mapping of patterns", where=f"{label}: {patterns}")
    try:
        for pattern, number in found.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                value = number
                break
    except re.error as error:
        raise FormatError(f"holds no pattern: {error}", where=f"{label}: {patterns}") from error
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or (default == "r" and value < 1):
        raise FormatError(f"is {value!r}, not a number", where=f"{label}: {default} of {module}")
    return float(value)


# ---- writing ------------------------------------------------------------------------------------------


def names_of(module: str, is_embedding: bool) -> tuple[str, str]:
    """The names of A and B in a file."""
    a, b = (_EMBEDDING_A, _EMBEDDING_B) if is_embedding else (_A, _B)
    return f"{PREFIX}{module}{a}", f"{PREFIX}{module}{b}"


def module_of(name: str) -> str:
    """The module that a factor in a file belongs to."""
    return name.removeprefix(PREFIX).partition(".lora_")[0]


def name_of_copy(name: str) -> str:
    """The name in a file of a copy of the base's tensor."""
    module, _, last = name.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{last}"


def name_of_value(name: str, modules: Collection[str]) -> str:
    """The name in a file of a whole tensor, which lies deeper in modules that are changed."""
    return name_of_copy(name) if name.rpartition(".")[0] in modules else PREFIX + name


def merged_config(configs: Sequence[Mapping[str, Any]], modules: Iterable[str], rank: int) -> dict[str, Any]:
    """The config of a sum of adapters: one rank, scale 1, all their modules."""
    return {
        **configs[0],
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": _targets(configs, modules),
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _targets(configs: Sequence[Mapping[str, Any]], modules: Iterable[str]) -> list[str]:
    """Ends of names, where each adapter has all modules with its ends; else the full names."""
    narrowed = ("layers_to_transform", "exclude_modules")
    ends = [config.get("target_modules") for config in configs]
    if any(config.get(key) for config in configs for key in narrowed) or not all(isinstance(e, list) for e in ends):
        return sorted(modules)
    return sorted({str(end) for some in ends for end in some or ()})


# ---- for people ---------------------------------------------------------------------------------------


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """What an adapter is, from its config and names; what merger cannot merge has a `refused`."""
    config = checkpoint.config or {}
    shown: dict[str, Any] = {
        "type": config.get("peft_type"),
        "base": config.get("base_model_name_or_path"),
        "task": config.get("task_type"),
    }
    try:
        adapter = adapter_of(checkpoint)
    except (UnsupportedModel, FormatError) as error:
        return {**shown, "refused": error.message}
    changes = adapter.changes.values()
    return {
        **shown,
        "modules": len(adapter.changes),
        "kinds": sorted({module.rpartition(".")[2] for module in adapter.changes}),
        "ranks": adapter.ranks,
        "scales": sorted({change.scale for change in changes}),
        "whole_tensors": sorted(adapter.values),
    }

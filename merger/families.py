"""Which mixtures of experts compute what a dense model computed, and what their configs say.

Knows the model families of transformers: config keys, routers; names on disk are in `merger.layout`. Every
family in FAMILIES is compared with its dense source by logits in `tests/methods/test_experts.py`; those in REFUSED
cannot be exact, for the reason given.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from merger import layout
from merger.checkpoint import TOLERANCE
from merger.errors import UnsupportedModel
from merger.expression import Expression
from merger.layers import sparse_layers
from merger.layout import Config, Experts, Tensors, head_size


@dataclass(frozen=True)
class Sizes:
    """What a config has to tell of the experts: their number, how many a token takes, whether their weights are made to
    sum to 1, d_ff of one and of the shared one, and which layers have them.
    """

    experts: int
    per_token: int
    normalize: bool
    width: int
    shared_width: int
    sparse: Sequence[bool]


Shared = Literal["none", "plain", "gated", "beside"]


@dataclass(frozen=True)
class Family:
    """A family of mixtures of experts, for dense models of the kinds `sources`.

    `shared`: whether it has an expert that every token takes, always added (`plain`), times a gate that is 1/2 at first
    (`gated`), or as the dense model's own MLP (`beside`). `normalize`: what its router can do. `copies` is false where
    copies of the MLP would not compute what it did: the routed experts then begin with a zero output. `tolerance` is
    how far logits may be apart, as a share of the largest; `by_name` families are taken only where `target` names them.
    """

    kind: str
    architecture: str
    sources: frozenset[str]
    layout: Callable[[Experts], dict[str, Expression]]
    fields: Callable[[Config, Sizes], dict[str, Any]]
    shared: Shared = "none"
    normalize: Literal["always", "either"] = "always"
    partial: bool = False
    copies: bool = True
    tolerance: float = TOLERANCE
    by_name: bool = False
    refusal: Callable[[Config], str] = lambda _config: ""
    attention: Callable[[Tensors, Config], dict[str, Expression]] = lambda layer, _config: dict(layer)


# ---- configs ------------------------------------------------------------------------------------------


def _windows(config: Config) -> dict[str, Any]:
    """Sliding windows as qwen's configs tell them, from those of llama and mistral, which have one kind of layer."""
    window, count = config.get("sliding_window"), config["num_hidden_layers"]
    if "layer_types" in config:
        return {key: config[key] for key in ("layer_types", "sliding_window", "use_sliding_window") if key in config}
    kind = "sliding_attention" if window else "full_attention"
    return {"use_sliding_window": bool(window), "sliding_window": window, "layer_types": [kind] * count}


def _qwen_fields(_config: Config, sizes: Sizes) -> dict[str, Any]:
    keys = {"mlp_only_layers": [], "decoder_sparse_step": 1}
    return {
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.per_token,
        "moe_intermediate_size": sizes.width,
        "norm_topk_prob": sizes.normalize,
        **sparse_layers(keys, sizes.sparse, ""),
    }


def _qwen2_fields(config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        **_qwen_fields(config, sizes),
        **_windows(config),
        "shared_expert_intermediate_size": sizes.shared_width,
        "qkv_bias": config["model_type"] == "qwen2",
    }


def _mixtral_fields(_config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": sizes.per_token,
        "intermediate_size": sizes.width,
    }


def _flex_olmo_fields(_config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.per_token,
        "intermediate_size": sizes.width,
        "norm_topk_prob": sizes.normalize,
    }


def _granite_fields(config: Config, sizes: Sizes) -> dict[str, Any]:
    neutral = {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0}
    llama = {} if config["model_type"] == "granite" else {**neutral, "attention_multiplier": head_size(config) ** -0.5}
    return {**llama, **_mixtral_fields(config, sizes)}


def _ernie_fields(_config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "moe_num_experts": sizes.experts,
        "moe_k": sizes.per_token,
        "moe_intermediate_size": sizes.width,
        "moe_num_shared_experts": 0,
        **sparse_layers({"moe_layer_start_index": 0}, sizes.sparse, "ernie4_5_moe"),
    }


def _hunyuan_fields(_config: Config, sizes: Sizes) -> dict[str, Any]:
    return {"num_experts": sizes.experts, "moe_topk": sizes.per_token, "intermediate_size": sizes.width}


def _cohere_fields(_config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.per_token,
        "intermediate_size": sizes.width,
        "num_shared_experts": 0,
        "expert_selection_fn": "softmax",
        "norm_topk_prob": True,
        "mlp_layer_types": ["sparse"] * len(sizes.sparse),
    }


def _lfm2_fields(_config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.per_token,
        "moe_intermediate_size": sizes.width,
        "intermediate_size": sizes.shared_width,
        "norm_topk_prob": True,
        "use_expert_bias": True,
        "routed_scaling_factor": 1.0,
        **sparse_layers({"num_dense_layers": 0}, sizes.sparse, "lfm2_moe"),
    }


def _deepseek_fields(config: Config, sizes: Sizes) -> dict[str, Any]:
    rope = {"partial_rotary_factor": 1.0, **config["rope_parameters"]}
    return {
        "n_routed_experts": sizes.experts,
        "num_experts_per_tok": sizes.per_token,
        "moe_intermediate_size": sizes.width,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "rope_parameters": rope,
        "head_dim": head_size(config),
        "num_nextn_predict_layers": 0,
        "attention_bias": config["model_type"] == "qwen2" or config.get("attention_bias", False),
        "use_qk_norm": config["model_type"] == "qwen3",
        **sparse_layers({"first_k_dense_replace": 0}, sizes.sparse, "the target"),
    }


def _deepseek_v1_fields(config: Config, sizes: Sizes) -> dict[str, Any]:
    """As the code of deepseek-ai/deepseek-moe-16b-base reads them; it knows rope by its old names."""
    rope = dict(config.get("rope_parameters") or {})
    theta, kind = rope.pop("rope_theta", None), rope.pop("rope_type", "default")
    old = {"rope_theta": theta, "rope_scaling": None if kind == "default" else {"type": kind, **rope}}
    return {
        "n_routed_experts": sizes.experts,
        "n_shared_experts": 1 if sizes.shared_width else None,
        "num_experts_per_tok": sizes.per_token,
        "moe_intermediate_size": sizes.width,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": sizes.normalize,
        **(old if theta else {}),
    }


def _qwen3_5_fields(_config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.per_token,
        "moe_intermediate_size": sizes.width,
        "shared_expert_intermediate_size": sizes.shared_width,
    }


def _gemma4_fields(_config: Config, sizes: Sizes) -> dict[str, Any]:
    return {
        "enable_moe_block": True,
        "num_experts": sizes.experts,
        "top_k_experts": sizes.per_token,
        "moe_intermediate_size": sizes.width,
    }


def _llama4_fields(config: Config, sizes: Sizes) -> dict[str, Any]:
    count = len(sizes.sparse)
    return {
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": sizes.per_token,
        "intermediate_size": sizes.width,
        "intermediate_size_mlp": sizes.shared_width,
        "head_dim": head_size(config),
        "use_qk_norm": False,
        "attn_temperature_tuning": False,
        "no_rope_layers": [1] * count,
        "layer_types": ["full_attention"] * count,
        **sparse_layers({"moe_layers": []}, sizes.sparse, "llama4_text"),
    }


# ---- refusals -----------------------------------------------------------------------------------------


def _no_bias(config: Config) -> str:
    if config.get("attention_bias"):
        return "attention_bias is true and this family has no biases there"
    return ""


def _no_windows(config: Config) -> str:
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        return "sliding_window is set and this family has none"
    return ""


def _no_bias_no_windows(config: Config) -> str:
    return _no_bias(config) or _no_windows(config)


def _one_kind_of_attention(config: Config) -> str:
    kinds = sorted(set(config.get("layer_types") or []))
    return f"its layers are of several kinds ({', '.join(kinds)})" if kinds not in ([], ["full_attention"]) else ""


def _no_bias_plain_rope(config: Config) -> str:
    rope = config.get("rope_parameters") or {}
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or rope.get("rope_type", "default") == "longrope":
        return "its rotary embedding (partial or longrope) has no like there"
    return _no_bias(config)


def _ernie_bias(config: Config) -> str:
    return "use_bias is true and this family has no biases" if config.get("use_bias") else ""


_LLAMA = frozenset({"llama", "mistral"})

# For each source the first family that takes it is the one that is chosen without `target`.
FAMILIES: tuple[Family, ...] = (
    Family(
        "mixtral", "MixtralForCausalLM", _LLAMA | {"phi3"}, layout.mixtral, _mixtral_fields, refusal=_no_bias_plain_rope
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        _LLAMA | {"qwen2", "phi3"},
        layout.qwen2,
        _qwen2_fields,
        shared="gated",
        normalize="either",
        partial=True,
        refusal=_no_bias_plain_rope,
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        frozenset({"qwen3"}),
        layout.qwen,
        _qwen_fields,
        normalize="either",
        partial=True,
        refusal=_one_kind_of_attention,
    ),
    Family(
        "flex_olmo",
        "FlexOlmoForCausalLM",
        frozenset({"olmo2", "olmo3"}),
        layout.qwen,
        _flex_olmo_fields,
        normalize="either",
        refusal=_one_kind_of_attention,
    ),
    Family(
        "granitemoe",
        "GraniteMoeForCausalLM",
        frozenset({"granite", "llama"}),
        layout.granite,
        _granite_fields,
        refusal=_no_windows,
    ),
    Family(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        frozenset({"ernie4_5"}),
        layout.ernie,
        _ernie_fields,
        partial=True,
        refusal=_ernie_bias,
    ),
    Family(
        "hunyuan_v1_moe",
        "HunYuanMoEV1ForCausalLM",
        frozenset({"hunyuan_v1_dense"}),
        layout.hunyuan,
        _hunyuan_fields,
        shared="plain",
    ),
    Family("cohere2_moe", "Cohere2MoeForCausalLM", frozenset({"cohere2"}), layout.qwen, _cohere_fields),
    Family("lfm2_moe", "Lfm2MoeForCausalLM", frozenset({"lfm2"}), layout.lfm2, _lfm2_fields, partial=True),
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        frozenset({"llama", "qwen2", "qwen3"}),
        layout.deepseek,
        _deepseek_fields,
        shared="plain",
        partial=True,
        refusal=lambda config: _no_bias_no_windows(config) or _one_kind_of_attention(config),
        by_name=True,
    ),
    Family(
        "dots1",
        "Dots1ForCausalLM",
        frozenset({"qwen3"}),
        layout.deepseek,
        _deepseek_fields,
        shared="plain",
        partial=True,
        by_name=True,
    ),
    Family(
        "qwen3_5_moe_text",
        "Qwen3_5MoeForCausalLM",
        frozenset({"qwen3_5_text"}),
        layout.qwen3_5,
        _qwen3_5_fields,
        shared="gated",
    ),
    Family(
        "gemma4_text",
        "Gemma4ForCausalLM",
        frozenset({"gemma4_text"}),
        layout.gemma4,
        _gemma4_fields,
        shared="beside",
        tolerance=1e-2,  # the epsilon of a second norm counts where the MLP's output is small
        attention=lambda layer, _config: {
            **layer,
            "pre_feedforward_layernorm_2.weight": layer["pre_feedforward_layernorm.weight"],
        },
    ),
    Family(
        "llama4_text",
        "Llama4ForCausalLM",
        frozenset({"llama"}),
        layout.llama4,
        _llama4_fields,
        shared="plain",
        copies=False,
        refusal=_no_bias_no_windows,
        attention=layout.interleaved,
        by_name=True,
    ),
)

# What mergekit-moe calls DeepSeek MoE: transformers has no such family, the model's own code does. Its config is made
# in `merger.methods.outputs`.
DEEPSEEK = Family("deepseek", "DeepseekForCausalLM", _LLAMA, layout.deepseek_v1, _deepseek_v1_fields, shared="plain")

# Why a mixture of experts in transformers would not compute what these models do.
REFUSED: Mapping[str, str] = {
    "phimoe": "its weights of experts do not sum to 1 (sparsemixer)",
    "gpt_oss": "its experts clamp their inputs and add 1",
    "gemma": "there is no gemma with experts",
    "gemma2": "there is no gemma 2 with experts",
    "gemma3_text": "there is no gemma 3 with experts",
    "starcoder2": "its MLP is not gated and no family with such experts has its norms",
    "gpt2": "its MLP is not gated and no family has such experts",
    "gpt_neox": "its MLP is not gated and no family has such experts",
    "phi": "its MLP is not gated and no family has such experts",
    "stablelm": "no family with experts has its norms",
    "smollm3": "no family with experts leaves out rotary embeddings in its layers",
    "exaone4": "exaone_moe has its norms before the blocks, exaone4 after them",
    "glm4": "glm4_moe has its norms before the blocks, glm4 after them too",
    "deepseek_v2": "attention with latent keys has no dense twin",
    "deepseek_v3": "attention with latent keys has no dense twin",
    "mistral4": "attention with latent keys has no dense twin",
    "olmo": "olmoe normalises queries and keys, olmo does not",
    "cohere": "cohere2_moe has other attention than cohere",
}


def family_for(config: Config, target: str | None, *, partial: bool, where: str) -> Family:
    """The family for a dense model of this (full) config. Raises UnsupportedModel with the reason."""
    kind = config["model_type"]
    takers = [family for family in FAMILIES if kind in family.sources]
    candidates = [family for family in takers if target == family.kind or (target is None and not family.by_name)]
    if not candidates:
        if takers:
            names = ", ".join(family.kind for family in takers)
            raise UnsupportedModel(f"{kind} cannot become {target}; it can become {names}", where="target")
        known = sorted({source for family in FAMILIES for source in family.sources})
        reason = REFUSED.get(kind, "no family with experts is known to compute the same")
        raise UnsupportedModel(f"{kind}: {reason}", where=where, remedy=f"Dense models that can: {', '.join(known)}.")
    if config.get("mlp_bias"):
        raise UnsupportedModel("mlp_bias is true and no family has experts with biases", where=where)
    reasons = {family.kind: _reason(family, config, partial=partial) for family in candidates}
    for family in candidates:
        if not reasons[family.kind]:
            return family
    told = "; ".join(f"{kind}: {reason}" for kind, reason in reasons.items())
    raise UnsupportedModel(f"no family can hold this model ({told})", where=where)


def _reason(family: Family, config: Config, *, partial: bool) -> str:
    if partial and not family.partial:
        return "all of its layers have experts"
    return family.refusal(config)

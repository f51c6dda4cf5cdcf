"""How mixtures of experts name and lay out their tensors on disk, by family of transformers.

Knows names within a layer and shapes; knows nothing of configs, recipes or values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merger.errors import UnsupportedModel
from merger.expression import Expression, Filled, cast, join
from merger.shaping import rows, transposed

Config = Mapping[str, Any]
Tensors = Mapping[str, Expression]


@dataclass(frozen=True)
class Mlp:
    """A gated MLP: gate and up [d_ff, d], down [d, d_ff]."""

    gate: Expression
    up: Expression
    down: Expression

    @property
    def width(self) -> int:
        """d_ff"""
        return self.gate.shape[0]


@dataclass(frozen=True)
class Experts:
    """The experts of one layer: the router [number of experts, d], the routed ones, and one that every token takes,
    where the family has it.
    """

    router: Expression
    routed: Sequence[Mlp]
    shared: Mlp

    @property
    def dtype(self) -> str:
        return self.routed[0].gate.dtype


# Names of a gated MLP within a layer: gate, up, down.
MLPS = (
    ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"),
    ("feed_forward.w1.weight", "feed_forward.w3.weight", "feed_forward.w2.weight"),
)


def mlp_of(layer: Tensors, config: Config, where: str) -> Mlp:
    """The gated MLP of a dense layer, fused or not. Raises UnsupportedModel where it has none."""
    for names in MLPS:
        if all(name in layer for name in names):
            return Mlp(*(layer[name] for name in names))
    if "mlp.gate_up_proj.weight" in layer:
        return mlp_of(split_fused(layer, config), config, where)
    raise UnsupportedModel(f"has no gated MLP that merger knows among {', '.join(sorted(layer)[:6])}, ...", where=where)


def without_mlp(layer: Tensors) -> dict[str, Expression]:
    """The tensors of a layer beside its gated MLP."""
    return {name: tensor for name, tensor in layer.items() if not any(name in names for names in MLPS)}


def _each(prefix: str, experts: Sequence[Mlp], gate: str, up: str, down: str) -> dict[str, Expression]:
    made: dict[str, Expression] = {}
    for e, expert in enumerate(experts):
        made[f"{prefix}.{e}.{gate}.weight"] = expert.gate
        made[f"{prefix}.{e}.{up}.weight"] = expert.up
        made[f"{prefix}.{e}.{down}.weight"] = expert.down
    return made


def _mlp(prefix: str, mlp: Mlp) -> dict[str, Expression]:
    names = (f"{prefix}.{name}_proj.weight" for name in ("gate", "up", "down"))
    return dict(zip(names, (mlp.gate, mlp.up, mlp.down), strict=True))


def qwen(experts: Experts) -> dict[str, Expression]:
    names = ("gate_proj", "up_proj", "down_proj")
    return {"mlp.gate.weight": experts.router, **_each("mlp.experts", experts.routed, *names)}


def mixtral(experts: Experts) -> dict[str, Expression]:
    routed = _each("block_sparse_moe.experts", experts.routed, "w1", "w3", "w2")
    return {"block_sparse_moe.gate.weight": experts.router, **routed}


def _gated_shared(experts: Experts) -> dict[str, Expression]:
    """The gate of the shared expert: sigmoid(0) is 1/2."""
    gate = Filled(experts.dtype, (1, experts.router.shape[1]))
    return {**_mlp("mlp.shared_expert", experts.shared), "mlp.shared_expert_gate.weight": gate}


def qwen2(experts: Experts) -> dict[str, Expression]:
    return {**qwen(experts), **_gated_shared(experts)}


def _stacked(experts: Experts) -> tuple[Expression, Expression]:
    """gate and up of all experts [E, 2 d_ff, d], and down [E, d, d_ff]."""
    count, width, size = len(experts.routed), experts.routed[0].width, experts.router.shape[1]
    inputs = [half for expert in experts.routed for half in (expert.gate, expert.up)]
    outputs = [expert.down for expert in experts.routed]
    return join(inputs, (count, 2 * width, size)), join(outputs, (count, size, width))


def granite(experts: Experts) -> dict[str, Expression]:
    inputs, outputs = _stacked(experts)
    return {
        "block_sparse_moe.router.layer.weight": experts.router,
        "block_sparse_moe.input_linear.weight": inputs,
        "block_sparse_moe.output_linear.weight": outputs,
    }


def ernie(experts: Experts) -> dict[str, Expression]:
    bias = Filled("F32", (1, len(experts.routed)))
    made = {**qwen(experts), "mlp.moe_statics.e_score_correction_bias": bias}
    return {**made, "mlp.gate.weight": cast(experts.router, "F32")}


def hunyuan(experts: Experts) -> dict[str, Expression]:
    routed = _each("mlp.experts", experts.routed, "gate_proj", "up_proj", "down_proj")
    return {"mlp.gate.wg.weight": cast(experts.router, "F32"), **routed, **_mlp("mlp.shared_mlp", experts.shared)}


def lfm2(experts: Experts) -> dict[str, Expression]:
    return {
        "feed_forward.gate.weight": experts.router,
        "feed_forward.expert_bias": Filled("F32", (len(experts.routed),)),
        **_each("feed_forward.experts", experts.routed, "w1", "w3", "w2"),
    }


def deepseek(experts: Experts) -> dict[str, Expression]:
    bias = Filled("F32", (len(experts.routed),))
    shared = _mlp("mlp.shared_experts", experts.shared)
    return {**qwen(experts), "mlp.gate.e_score_correction_bias": bias, **shared}


def deepseek_v1(experts: Experts) -> dict[str, Expression]:
    return {**qwen(experts), **_mlp("mlp.shared_experts", experts.shared)}


def qwen3_5(experts: Experts) -> dict[str, Expression]:
    inputs, outputs = _stacked(experts)
    fused = {"mlp.experts.gate_up_proj": inputs, "mlp.experts.down_proj": outputs}
    return {"mlp.gate.weight": experts.router, **fused, **_gated_shared(experts)}


def gemma4(experts: Experts) -> dict[str, Expression]:
    """The dense MLP stays; the experts run beside it, and a norm takes out the factor of two."""
    inputs, outputs = _stacked(experts)
    count, size = experts.router.shape
    ones = Filled(experts.dtype, (size,), 1.0)
    return {
        **_mlp("mlp", experts.shared),
        "router.proj.weight": experts.router,
        "router.scale": ones,
        "router.per_expert_scale": Filled(experts.dtype, (count,), 1.0),
        "experts.gate_up_proj": inputs,
        "experts.down_proj": outputs,
        "post_feedforward_layernorm_1.weight": ones,
        "post_feedforward_layernorm_2.weight": ones,
    }


def llama4(experts: Experts) -> dict[str, Expression]:
    """Experts lie with rows for columns: gate and up side by side [E, d, 2 d_ff], down [E, d_ff, d]."""
    count, width, size = len(experts.routed), experts.routed[0].width, experts.router.shape[1]
    inputs = [transposed(join([expert.gate, expert.up], (2 * width, size))) for expert in experts.routed]
    outputs = [transposed(expert.down) for expert in experts.routed]
    return {
        "feed_forward.router.weight": experts.router,
        "feed_forward.experts.gate_up_proj": join(inputs, (count, size, 2 * width)),
        "feed_forward.experts.down_proj": join(outputs, (count, width, size)),
        **_mlp("feed_forward.shared_expert", experts.shared),
    }


# ---- attention ----------------------------------------------------------------------------------------


def interleaved(layer: Tensors, config: Config) -> dict[str, Expression]:
    """Rows of queries and keys in pairs (2 i, 2 i + 1) for llama 4's rotary embedding, instead of in halves."""
    made = dict(layer)
    half = head_size(config) // 2
    for name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
        tensor = layer[name]
        heads = range(0, tensor.shape[0], 2 * half)
        order = [head + i + second for head in heads for i in range(half) for second in (0, half)]
        made[name] = join([rows(tensor, i, i + 1) for i in order], tensor.shape)
    return made


def head_size(config: Config) -> int:
    """The width of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def split_fused(layer: Tensors, config: Config) -> dict[str, Expression]:
    """A layer of phi3 with the tensors of llama: queries, keys and values, gate and up apart."""
    made = dict(layer)
    size = head_size(config)
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    fused = made.pop("self_attn.qkv_proj.weight")
    for name, first, last in (("q", 0, queries), ("k", queries, queries + keys), ("v", queries + keys, None)):
        made[f"self_attn.{name}_proj.weight"] = rows(fused, first, last or fused.shape[0])
    both = made.pop("mlp.gate_up_proj.weight")
    width = both.shape[0] // 2
    return {**made, "mlp.gate_proj.weight": rows(both, 0, width), "mlp.up_proj.weight": rows(both, width, 2 * width)}

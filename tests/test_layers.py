"""Names and config keys of layers, from the families' own code in transformers."""

import pytest

from merger.errors import UnsupportedModel
from merger.expression import Filled
from merger.layers import (
    check_positions_do_not_count,
    is_sparse,
    outputs_of,
    scalars_of,
    sparse_layers,
    split,
    with_layers,
)

ONE = Filled("F32", (1,))


def layer(*names: str) -> dict[str, Filled]:
    return dict.fromkeys(names, ONE)


@pytest.mark.parametrize(
    ("prefix", "rest"),
    [
        ("model.layers", "self_attn.q_proj.weight"),
        ("transformer.h", "attn.c_attn.weight"),
        ("h", "mlp.c_fc.bias"),
        ("gpt_neox.layers", "attention.dense.weight"),
        ("model.layers", "block_sparse_moe.experts.7.w1.weight"),
        ("model.language_model.layers", "mlp.experts.3.layers.0.weight"),
    ],
)
def test_the_first_number_is_the_layers(prefix: str, rest: str) -> None:
    tensors = {f"{prefix}.{i}.{rest}": ONE for i in range(12)} | {"lm_head.weight": ONE}
    layers, others = split(tensors, {"num_hidden_layers": 12}, "m")
    assert (layers.prefix, len(layers), list(others)) == (prefix, 12, ["lm_head.weight"])
    assert layers.tensors[11] == {rest: ONE}
    assert layers.named(3, rest) == f"{prefix}.3.{rest}"


@pytest.mark.parametrize(
    ("names", "config", "problem"),
    [
        (["encoder.layers.0.w", "decoder.layers.0.w"], {"num_hidden_layers": 1}, "2 stacks of layers"),
        (["embed.weight"], {"num_hidden_layers": 1}, "0 stacks of layers (none)"),
        (["layers.0.w"], {"num_hidden_layers": 2}, "the layers 0 in its files and 2 by its config"),
        (["layers.0.w", "layers.2.w"], {"num_hidden_layers": 2}, "the layers 0 to 2"),
        (["layers.0.w"], {}, "does not tell the number of layers"),
    ],
)
def test_models_without_one_stack_of_layers_are_refused(names: list[str], config: dict, problem: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        split(layer(*names), config, "m")
    assert problem in str(caught.value)


def test_outputs_are_what_writes_to_the_residual_stream() -> None:
    inputs = ("self_attn.q_proj.weight", "mlp.gate_proj.weight", "mlp.experts.0.up_proj.weight", "mlp.gate.weight")
    outputs = (
        "self_attn.o_proj.weight",
        "self_attn.o_proj.bias",
        "linear_attn.out_proj.weight",
        "mlp.down_proj.bias",
        "mlp.experts.11.down_proj.weight",
        "mlp.experts.down_proj",
        "mlp.experts.down_proj_bias",
        "mlp.shared_expert.down_proj.weight",
        "mlp.shared_experts.down_proj.weight",
        "block_sparse_moe.output_linear.weight",
        "shared_mlp.output_linear.weight",
        "experts.down_proj",
        "feed_forward.experts.3.w2.weight",
    )
    assert sorted(outputs_of(layer(*inputs, *outputs))) == sorted(outputs)
    assert outputs_of(layer("mixer.out_proj.weight", "mlp.down_proj.weight")) == [], "a mixer that is not known"
    assert outputs_of(layer("self_attn.o_proj.weight", "ffn.linear.weight")) == []
    assert scalars_of(layer("layer_scalar", "x.layer_scalar")) == ["layer_scalar"]


def test_experts_are_recognised() -> None:
    assert is_sparse(layer("mlp.experts.0.w1.weight"))
    assert is_sparse(layer("experts.gate_up_proj"))
    assert is_sparse(layer("block_sparse_moe.input_linear.weight"))
    assert not is_sparse(layer("mlp.shared_experts.down_proj.weight", "mlp.gate_proj.weight"))


def test_every_list_with_an_entry_a_layer_is_carried() -> None:
    config = {
        "num_hidden_layers": 3,
        "layer_types": ["a", "b", "c"],
        "no_rope_layers": [1, 0, 1],
        "moe_topk": [2, 1, 2],
        "eos_token_id": [1, 2, 3],
        "full_attn_idxs": [0, 2],
        "per_layer_config": {"1": {"head_dim": 4}},
        "mlp_only_layers": [0],
        "decoder_sparse_step": 2,
        "rope": [1, 2],
    }
    made = with_layers(config, [0, 1, 1, 2], [False, True, True, True], "m")
    assert made == {
        "num_hidden_layers": 4,
        "layer_types": ["a", "b", "b", "c"],
        "no_rope_layers": [1, 0, 0, 1],
        "moe_topk": [2, 1, 1, 2],
        "eos_token_id": [1, 2, 3],
        "full_attn_idxs": [0, 3],
        "per_layer_config": {"1": {"head_dim": 4}, "2": {"head_dim": 4}},
        "mlp_only_layers": [0],
        "decoder_sparse_step": 1,
        "rope": [1, 2],
    }


@pytest.mark.parametrize(
    ("config", "sparse", "told"),
    [
        ({"first_k_dense_replace": 9}, [False, True, True], {"first_k_dense_replace": 1}),
        ({"num_dense_layers": 9}, [True, True], {"num_dense_layers": 0}),
        ({"mlp_layer_types": []}, [False, True], {"mlp_layer_types": ["dense", "sparse"]}),
        ({"moe_layers": []}, [True, False, True], {"moe_layers": [0, 2], "interleave_moe_layer_step": 1}),
        (
            {"moe_layer_start_index": 1},
            [False, True, True, False],
            {"moe_layer_start_index": 1, "moe_layer_end_index": 2, "moe_layer_interval": 1},
        ),
        ({}, [True, True], {}),
        ({}, [False, False], {}),
    ],
)
def test_configs_tell_which_layers_have_experts(config: dict, sparse: list[bool], told: dict) -> None:
    assert sparse_layers(config, sparse, "m") == told


@pytest.mark.parametrize("config", [{}, {"first_k_dense_replace": 0}, {"moe_layer_start_index": 0}])
def test_configs_that_cannot_tell_are_refused(config: dict) -> None:
    with pytest.raises(UnsupportedModel, match=r"experts in the layers \[0, 2\] and none in \[1\]"):
        sparse_layers(config, [True, False, True], "m")


def test_models_in_which_the_number_of_a_layer_counts_are_refused() -> None:
    check_positions_do_not_count({"num_kv_shared_layers": 0, "laurel_rank": None}, "m")
    with pytest.raises(UnsupportedModel, match="num_kv_shared_layers: is 2: layers share keys and values"):
        check_positions_do_not_count({"num_kv_shared_layers": 2}, "m")

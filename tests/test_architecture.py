import pytest
import torch

from merger.architecture import (
    differences,
    embedding_of,
    head_of,
    is_running_statistic,
    kept_in_float32,
    layer_of,
    ties_embeddings,
    with_dtype,
    with_ties,
)

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
}


def model_of(kind, **fields):
    """A model of a transformers architecture without its values."""
    from transformers import AutoConfig, AutoModelForCausalLM  # seconds

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **fields))


def name_of(model, module):
    return next(name for name, found in model.named_modules() if found is module) + ".weight"


@pytest.mark.parametrize(
    "kind", ["llama", "qwen3", "mixtral", "gemma2", "gpt2", "gpt_neox", "opt", "bloom", "mpt", "phi3", "cohere"]
)
def test_embedding_and_head_are_found_where_transformers_has_them(kind):
    model = model_of(kind)
    assert embedding_of(model.state_dict()) == name_of(model, model.get_input_embeddings())
    assert head_of(model.state_dict()) == name_of(model, model.get_output_embeddings())
    assert ties_embeddings(model.config.to_dict()) == model.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("deepseek_v3", EXPERTS),
        ("glm4_moe", EXPERTS),
        ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0}),
    ],
)
def test_what_transformers_keeps_in_float32_is_kept(kind, fields):
    model = model_of(kind, **fields)
    names = list(model.state_dict())
    wanted = {name for name in names if any(part in name for part in model._keep_in_fp32_modules_strict)}
    assert wanted
    assert wanted <= {name for name in names if kept_in_float32(name, {"model_type": kind})}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_other_weights_are_not_kept(kind):
    assert not any(kept_in_float32(name, {"model_type": kind}) for name in model_of(kind).state_dict())


def test_the_models_own_output_head_is_not_mistaken_for_a_layers_output():
    names = ["embed_tokens.weight", "layers.0.attention.output.weight", "lm_head.weight"]
    assert head_of(names) == "lm_head.weight"


def test_two_embeddings_are_none():
    assert embedding_of(["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]) is None
    assert head_of(["model.norm.weight"]) is None


def test_running_statistics_are_those_that_torch_keeps_as_buffers():
    norm = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    buffers = {name for name, _ in norm.named_buffers()}
    assert {name for name in norm.state_dict() if is_running_statistic(name)} == buffers
    assert all(
        is_running_statistic(name) for name in torch.nn.BatchNorm1d(2).state_dict() if name.startswith("running")
    )


# ---- configs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        (None, False),
        ({}, False),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, False),
        ({"tie_word_embeddings": True, "text_config": {"hidden_size": 8}}, True),
        ({"tie_word_embeddings": True, "text_config": None}, True),
    ],
)
def test_whether_embeddings_are_tied(config, tied):
    assert ties_embeddings(config) is tied


def test_untied_sets_every_place_that_says_tied():
    config = {"a": 1, "tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True, "b": 2}}
    assert with_ties(config, False) == {
        "a": 1,
        "tie_word_embeddings": False,
        "text_config": {"tie_word_embeddings": False, "b": 2},
    }
    assert not ties_embeddings(with_ties(config, False))
    assert config["tie_word_embeddings"]
    assert config["text_config"]["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, {"dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"torch_dtype": "float32", "dtype": "float32"}, {"torch_dtype": "bfloat16", "dtype": "bfloat16"}),
        (
            {"dtype": "float32", "vision_config": {"dtype": "float32", "depth": 2}},
            {"dtype": "bfloat16", "vision_config": {"dtype": "bfloat16", "depth": 2}},
        ),
        (
            {"dtype": "float32", "text_config": {"torch_dtype": "float32"}},
            {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16"}},
        ),
    ],
)
def test_the_dtype_is_named_under_the_keys_that_are_there(config, wanted):
    assert with_dtype(config, "bfloat16") == wanted


def test_differences_are_dotted_and_come_with_both_values():
    first = {"hidden_size": 8, "rope": {"theta": 1e4, "type": "default"}, "only_here": 1}
    other = {"hidden_size": 8, "rope": {"theta": 1e6, "type": "default"}, "only_there": 2}
    assert differences(first, other) == {"rope.theta": (1e4, 1e6), "only_here": (1, None), "only_there": (None, 2)}


@pytest.mark.parametrize("key", ["_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache"])
def test_what_does_not_change_the_function_is_no_difference(key):
    assert differences({key: 1, "text_config": {key: 1}}, {key: 2, "text_config": {key: 2}}) == {}


def test_a_key_that_is_missing_is_as_good_as_none():
    assert differences({"rope_scaling": None}, {}) == {}
    assert differences(None, None) == {}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3"),
        ("model.layers.12.block_sparse_moe.experts.0.w1.weight", "model.layers.12"),
        ("transformer.h.0.ln_1.weight", "transformer.h.0"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("model.norm.weight", "model.norm"),
        ("lm_head.weight", "lm_head.weight"),
        ("layers.7", "layers.7"),
        ("conv1.weight", "conv1.weight"),
    ],
)
def test_the_layer_of_a_tensor(name, layer):
    assert layer_of(name) == layer

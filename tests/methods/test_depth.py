"""Block expansion and stacking: logits in transformers, tensors on disk, configs."""

import json
from pathlib import Path

import pytest
import torch

from merger.errors import IncompatibleSources, RecipeError, RequestError, UnsupportedModel
from tests import tiny
from tests.methods.making import make, plan

# Part A9 of the reference: the families whose expansion is exact, with options that matter.
FAMILIES = {
    "llama": {},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-tied": {"tie_word_embeddings": True},
    "mistral": {},
    "qwen2": {},
    "qwen2-windows": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {},
    "olmo2": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma4_text": {},
    "phi3": {},
    "granite": {},
    "cohere": {},
    "cohere2": {},
    "gpt2": {},
    "gpt_neox": {},
    "phi": {},
    "starcoder2": {},
    "smollm3": {},
    "exaone4": {},
    "glm4": {},
    "mixtral": {},
    "qwen2_moe": {"mlp_only_layers": [1]},
    "gpt_oss": {},
    "lfm2": {},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_expanded_model_computes_the_same_to_the_bit(tmp_path: Path, family: str, dtype: str) -> None:
    source = tiny.save(tmp_path / "source", family.partition("-")[0], dtype, **FAMILIES[family])
    make({"method": "expand", "source": str(source), "groups": 2}, tmp_path / "out")
    assert torch.equal(tiny.logits(source, dtype), tiny.logits(tmp_path / "out", dtype))
    assert tiny.load(tmp_path / "out", dtype).config.num_hidden_layers == 6


def test_frozen_tensors_are_the_same_bytes_and_experts_keep_their_numbers(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "mixtral", "bfloat16")
    make({"method": "expand", "source": str(source), "groups": 2}, tmp_path / "out")
    before, after = tiny.stored(source), tiny.stored(tmp_path / "out")
    new = json.loads((tmp_path / "out" / "trainable.json").read_text())
    assert new["layers"] == [2, 5]
    moved = {0: 0, 1: 1, 2: 3, 3: 4}
    for name, tensor in before.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(moved[int(parts[2])])
        assert torch.equal(after.pop(".".join(parts)), tensor)
    assert sorted(after) == sorted(new["tensors"])
    zero = {name for name, tensor in after.items() if not tensor.any()}
    outputs = {"self_attn.o_proj.weight", *(f"block_sparse_moe.experts.{e}.w2.weight" for e in range(4))}
    assert zero == {f"model.layers.{layer}.{rest}" for layer in (2, 5) for rest in outputs}
    copied = "block_sparse_moe.experts.3.w1.weight"
    assert torch.equal(after[f"model.layers.5.{copied}"], before[f"model.layers.3.{copied}"])


@pytest.mark.parametrize("family", ["llama", "olmo2", "qwen3"])
def test_only_output_projections_of_new_blocks_have_gradients_at_first(tmp_path: Path, family: str) -> None:
    source = tiny.save(tmp_path / "source", family)
    make({"method": "expand", "source": str(source), "groups": 1}, tmp_path / "out")
    model = tiny.load(tmp_path / "out")
    model(tiny.tokens(), labels=tiny.tokens()).loss.backward()
    for name, parameter in model.named_parameters():
        if ".layers.4." in name:
            is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert bool(parameter.grad.any()) == is_output, name


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"groups": 4}, [0, "0", 1, "1", 2, "2", 3, "3"]),
        ({"groups": 2}, [0, 1, "1", 2, 3, "3"]),
        ({"groups": 2, "added_per_group": 2}, [0, 1, "0", "1", 2, 3, "2", "3"]),
        ({"groups": 2, "placement": "suffix"}, [0, 1, 2, 3, "1", "3"]),
        ({"insert": [1, 1, 3]}, [0, 1, "1", "1", 2, 3, "3"]),
    ],
)
def test_new_blocks_stand_where_they_were_asked(tmp_path: Path, fields: dict, layers: list) -> None:
    source = tiny.save(tmp_path / "source", "cohere2")
    make({"method": "expand", "source": str(source), **fields}, tmp_path / "out")
    before, after = tiny.stored(source), tiny.stored(tmp_path / "out")
    for index, layer in enumerate(layers):
        gate = "mlp.gate_proj.weight"
        assert torch.equal(after[f"model.layers.{index}.{gate}"], before[f"model.layers.{int(layer)}.{gate}"])
        assert after[f"model.layers.{index}.mlp.down_proj.weight"].any() == isinstance(layer, int)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == len(layers)
    assert config["layer_types"] == [tiny.MIXED[int(layer)] for layer in layers]
    assert torch.equal(tiny.logits(source), tiny.logits(tmp_path / "out"))


def test_configs_have_every_default_of_their_family(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama")
    config = json.loads((source / "config.json").read_text())
    for key in ("rms_norm_eps", "rope_parameters", "num_key_value_heads"):
        del config[key]
    config["num_key_value_heads"] = 2
    (source / "config.json").write_text(json.dumps(config))
    make({"method": "expand", "source": str(source), "groups": 2}, tmp_path / "out")
    full = json.loads((tmp_path / "out" / "config.json").read_text())
    assert full["rms_norm_eps"] == 1e-6
    assert full["rope_parameters"]["rope_theta"] == 10000.0
    assert "_name_or_path" not in full


@pytest.mark.parametrize(
    ("kind", "config", "fields", "problem"),
    [
        ("llama", {}, {"groups": 3}, "groups: 3 does not divide the 4 layers of the source\nChoose one of 1, 2, 4"),
        ("llama", {}, {"groups": 4, "added_per_group": 2}, "added_per_group: 2 is more than the 1 layers of a group"),
        ("llama", {}, {"insert": [4]}, "insert: 4 is no layer: the source has 0 to 3"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, {"groups": 2}, "scaled by the layer's number"),
        ("gemma4_text", {"num_kv_shared_layers": 2}, {"groups": 2}, "share keys and values"),
        ("llama4_text", {"num_local_experts": 2}, {"groups": 2}, "follows the layer's number"),
    ],
)
def test_what_cannot_be_expanded_is_refused_in_the_plan(
    tmp_path: Path, kind: str, config: dict, fields: dict, problem: str
) -> None:
    source = tiny.save(tmp_path / "source", kind, **config)
    with pytest.raises(RequestError) as caught:
        plan({"method": "expand", "source": str(source), **fields})
    assert problem in str(caught.value)


@pytest.mark.parametrize("fields", [{}, {"groups": 2, "insert": [1]}, {"insert": []}, {"groups": 0}])
def test_wrong_fields_are_refused(fields: dict) -> None:
    with pytest.raises(RecipeError):
        plan({"method": "expand", "source": "nowhere", **fields})


def test_two_stacks_of_layers_and_unknown_families_are_refused(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UnsupportedModel, match="the layers 0 to 3 in its files and 3 by its config"):
        plan({"method": "expand", "source": str(source), "groups": 3})
    (source / "config.json").write_text(json.dumps({**config, "model_type": "mystery"}))
    with pytest.raises(UnsupportedModel, match="'mystery' is not known to transformers"):
        plan({"method": "expand", "source": str(source), "groups": 2})
    (source / "config.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"has no config\.json"):
        plan({"method": "expand", "source": str(source), "groups": 2})


# ---- stacking -----------------------------------------------------------------------------------------


def test_a_stack_is_the_layers_that_were_named(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "cohere2")
    slices = [{"source": str(source), "layers": "0-2"}, {"source": str(source), "layers": "1-3"}]
    make({"method": "stack", "slices": slices}, tmp_path / "out")
    before, after = tiny.stored(source), tiny.stored(tmp_path / "out")
    for index, layer in enumerate([0, 1, 2, 1, 2, 3]):
        for rest in ("mlp.down_proj.weight", "self_attn.o_proj.weight", "input_layernorm.weight"):
            assert torch.equal(after[f"model.layers.{index}.{rest}"], before[f"model.layers.{layer}.{rest}"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == [tiny.MIXED[layer] for layer in (0, 1, 2, 1, 2, 3)]
    tiny.load(tmp_path / "out")


def test_layers_of_several_models_of_different_depth(tmp_path: Path) -> None:
    first = tiny.save(tmp_path / "first", "qwen2", seed=1)
    other = tiny.save(tmp_path / "other", "qwen2", seed=2, num_hidden_layers=2)
    slices = [{"source": str(first), "layers": [3, 0]}, {"source": str(other), "layers": 1}]
    make({"method": "stack", "slices": slices}, tmp_path / "out")
    after = tiny.stored(tmp_path / "out")
    expected = [(first, 3), (first, 0), (other, 1)]
    for index, (model, layer) in enumerate(expected):
        name = "self_attn.q_proj.bias"
        assert torch.equal(after[f"model.layers.{index}.{name}"], tiny.stored(model)[f"model.layers.{layer}.{name}"])
    assert torch.equal(after["lm_head.weight"], tiny.stored(first)["lm_head.weight"])
    assert tiny.load(tmp_path / "out").config.num_hidden_layers == 3


def test_all_layers_in_their_order_are_the_model(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama")
    make({"method": "stack", "slices": [{"source": str(source), "layers": "0-3"}]}, tmp_path / "out")
    before, after = tiny.stored(source), tiny.stored(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_stacks_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    source = str(tiny.save(tmp_path / "source", "llama"))
    wider = str(tiny.save(tmp_path / "wider", "llama", intermediate_size=64))
    other = str(tiny.save(tmp_path / "other", "gpt_neox"))
    for slices, problem in [
        ([{"source": source, "layers": "2-4"}], "4 is no layer: there are 0 to 3"),
        ([{"source": source, "layers": "3-1"}], "names no layer"),
        ([{"source": source, "layers": "some"}], "must be a number, a range"),
    ]:
        with pytest.raises(RecipeError, match=problem):
            plan({"method": "stack", "slices": slices})
    for model in (wider, other):
        with pytest.raises(IncompatibleSources):
            plan({"method": "stack", "slices": [{"source": source, "layers": 0}, {"source": model, "layers": 0}]})

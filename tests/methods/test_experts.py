"""Sparse upcycling: logits in transformers, names as transformers saves them, statistics of what is drawn."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from merger.errors import RecipeError, RequestError, UnsupportedModel
from merger.families import FAMILIES
from tests import tiny
from tests.methods.making import make, plan

# Table G of the reference: source, config, fields of the recipe, family of the result.
ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "llama": ("llama", {}, {}, "mixtral"),
    "llama-tied-wide-heads": ("llama", {"tie_word_embeddings": True, "head_dim": 16}, {}, "mixtral"),
    "llama3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        {},
        "mixtral",
    ),
    "mistral-window": ("mistral", {}, {}, "mixtral"),
    "one-expert-a-token": ("llama", {}, {"experts_per_token": 1}, "mixtral"),
    "all-experts": ("llama", {}, {"experts_per_token": 4}, "mixtral"),
    "llama-partial": ("llama", {}, {"layers": {"every": 2}}, "qwen2_moe"),
    "mistral-partial": ("mistral", {}, {"layers": [1]}, "qwen2_moe"),
    "llama-qwen2_moe": ("llama", {"head_dim": 16}, {"target": "qwen2_moe"}, "qwen2_moe"),
    "llama-shared": ("llama", {}, {"target": "qwen2_moe", "shared_experts": 1}, "qwen2_moe"),
    "phi3": ("phi3", {}, {}, "mixtral"),
    "phi3-partial": ("phi3", {}, {"layers": [2]}, "qwen2_moe"),
    "qwen2": ("qwen2", {}, {}, "qwen2_moe"),
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        {},
        "qwen2_moe",
    ),
    "qwen2-shared-last": ("qwen2", {}, {"shared_experts": 1, "layers": {"last": 2}}, "qwen2_moe"),
    "qwen3": ("qwen3", {}, {}, "qwen3_moe"),
    "qwen3-partial": ("qwen3", {"attention_bias": True}, {"layers": [0, 3]}, "qwen3_moe"),
    "olmo2": ("olmo2", {"attention_bias": True}, {}, "flex_olmo"),
    "granite": (
        "granite",
        {"embedding_multiplier": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0},
        {},
        "granitemoe",
    ),
    "llama-biases": ("llama", {"attention_bias": True}, {}, "granitemoe"),
    "ernie4_5": ("ernie4_5", {}, {}, "ernie4_5_moe"),
    "ernie4_5-last": ("ernie4_5", {}, {"layers": {"last": 3}}, "ernie4_5_moe"),
    "hunyuan": ("hunyuan_v1_dense", {}, {}, "hunyuan_v1_moe"),
    "hunyuan-shared": ("hunyuan_v1_dense", {}, {"shared_experts": 1}, "hunyuan_v1_moe"),
    "cohere2": ("cohere2", {}, {}, "cohere2_moe"),
    "lfm2": ("lfm2", {}, {}, "lfm2_moe"),
    "lfm2-last": ("lfm2", {}, {"layers": {"last": 2}}, "lfm2_moe"),
    "llama-glm4_moe": ("llama", {}, {"target": "glm4_moe"}, "glm4_moe"),
    "qwen2-glm4_moe": ("qwen2", {}, {"target": "glm4_moe", "shared_experts": 1}, "glm4_moe"),
    "qwen3-glm4_moe": ("qwen3", {}, {"target": "glm4_moe", "layers": {"last": 3}}, "glm4_moe"),
    "qwen3-dots1": ("qwen3", {}, {"target": "dots1"}, "dots1"),
    "qwen3_5": ("qwen3_5_text", {}, {}, "qwen3_5_moe_text"),
    "qwen3_5-shared": ("qwen3_5_text", {}, {"shared_experts": 1}, "qwen3_5_moe_text"),
    "gemma4": ("gemma4_text", {}, {}, "gemma4_text"),
    "llama4": ("llama", {}, {"target": "llama4_text"}, "llama4_text"),
    "groups": ("llama", {}, {"experts": 8, "experts_per_token": 4, "granularity": 2}, "mixtral"),
    "groups-of-four": ("qwen2", {}, {"experts": None, "expansion": 2, "granularity": 4}, "qwen2_moe"),
    "groups-stacked": ("granite", {}, {"granularity": 2}, "granitemoe"),
    "groups-of-three": ("llama", {}, {"experts": 6, "experts_per_token": 3, "granularity": 3}, "mixtral"),
}


def recipe_of(row: str, source: Path) -> dict[str, Any]:
    fields = {"method": "upcycle", "source": str(source), "experts": 4, **ROWS[row][2]}
    return {key: value for key, value in fields.items() if value is not None}


@pytest.mark.parametrize("row", ROWS)
def test_an_upcycled_model_computes_the_same_under_the_names_of_its_family(tmp_path: Path, row: str) -> None:
    kind, config, _, family = ROWS[row]
    source = tiny.save(tmp_path / "source", kind, **config)
    make(recipe_of(row, source), tmp_path / "out")
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made["model_type"] == family
    before = tiny.logits(source)
    bound = 1e-4 if family == "gemma4_text" else 1e-5  # there a second norm has an epsilon of its own
    assert (before - tiny.logits(tmp_path / "out")).abs().max() < bound
    names = {name: tuple(tensor.shape) for name, tensor in tiny.stored(tmp_path / "out").items()}
    if family != "qwen3_5_moe_text":  # published with fused experts, saved one by one by transformers; it loads both
        assert names == tiny.own_names(tmp_path / "out", tmp_path / "own")


def test_every_family_has_a_row() -> None:
    assert {family.kind for family in FAMILIES} == {row[3] for row in ROWS.values()}
    assert {source for family in FAMILIES for source in family.sources} - {row[0] for row in ROWS.values()} == {"olmo3"}


def test_olmo3_without_windows_is_olmo2(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "olmo3", layer_types=["full_attention"] * 4)
    make({"method": "upcycle", "source": str(source), "experts": 4}, tmp_path / "out")
    assert (tiny.logits(source) - tiny.logits(tmp_path / "out")).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("kind", "config", "problem"),
    [
        ("gpt2", {}, "gpt2: its MLP is not gated"),
        ("gpt_neox", {}, "gpt_neox: its MLP is not gated"),
        ("phi", {}, "phi: its MLP is not gated"),
        ("starcoder2", {}, "starcoder2: its MLP is not gated"),
        ("gemma", {}, "there is no gemma with experts"),
        ("gemma2", {}, "there is no gemma 2"),
        ("gemma3_text", {}, "there is no gemma 3"),
        ("stablelm", {}, "no family with experts has its norms"),
        ("smollm3", {}, "leaves out rotary"),
        ("exaone4", {}, "norms before the blocks"),
        ("glm4", {}, "norms before the blocks"),
        ("olmo", {}, "olmoe normalises"),
        ("cohere", {}, "cohere: cohere2_moe"),
        ("llama", {"mlp_bias": True}, "mlp_bias is true"),
        ("qwen3", {"layer_types": tiny.MIXED, "use_sliding_window": True, "sliding_window": 8}, "several kinds"),
        ("olmo3", {"layer_types": tiny.MIXED, "sliding_window": 8}, "several kinds"),
        ("phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial or longrope"),
    ],
)
def test_families_that_are_not_exact_are_refused_with_the_reason(
    tmp_path: Path, kind: str, config: dict, problem: str
) -> None:
    source = tiny.save(tmp_path / "source", kind, **config)
    with pytest.raises(UnsupportedModel) as caught:
        plan({"method": "upcycle", "source": str(source), "experts": 4})
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"experts": 4, "experts_per_token": 5}, "experts_per_token: 5 is more than the 4 experts"),
        ({"experts": 4, "granularity": 3}, "experts: 4 is not a multiple of granularity 3"),
        ({"expansion": 2, "granularity": 5}, "granularity: 5 does not divide d_ff 48"),
        ({"experts": 4, "expansion": 3}, "experts: 4 is not expansion 3 * granularity 1"),
        ({}, "needs experts, or expansion"),
        ({"experts": 4, "router": "zero"}, "a router of zeros ties all experts"),
        ({"experts": 4, "router": {"std": 0}}, "greater than 0"),
        ({"experts": 4, "layers": [4]}, "layers: 4 is no layer: there are 0 to 3"),
        ({"experts": 4, "layers": []}, "names no layer"),
        ({"experts": 4, "layers": {"last": 5}}, "there are only 4 layers"),
        ({"experts": 4, "layers": {"every": 1, "last": 1}}, "exactly one of every and last"),
        ({"experts": 4, "layers": "some"}, "'all'"),
        ({"experts": 4, "target": "mixtral", "layers": [0]}, "all of its layers have experts"),
        ({"experts": 4, "target": "qwen3_moe"}, "llama cannot become qwen3_moe; it can become mixtral"),
        ({"experts": 4, "normalize": False}, "mixtral always makes the weights sum to 1"),
        ({"experts": 4, "shared_experts": 1}, "mixtral has no shared expert"),
        ({"experts": 4, "target": "llama4_text", "drop": 0.5}, "can only begin with a zero output"),
        ({"experts": 4, "optimizer": "carry"}, "no AdamW moments"),
        ({"experts": 4, "experts_from": ["a", "b"]}, "exactly one of source and experts_from"),
        ({"experts": 4, "expert": 4}, "expert: is not a field; did you mean 'experts'?"),
    ],
)
def test_bad_recipes_are_refused_in_the_plan_with_the_numbers(tmp_path: Path, fields: dict, problem: str) -> None:
    source = tiny.save(tmp_path / "source", "llama")
    with pytest.raises(RequestError) as caught:
        plan({"method": "upcycle", "source": str(source), **fields})
    assert problem in str(caught.value)


def test_quantized_sources_are_refused(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama")
    config = json.loads((source / "config.json").read_text())
    quantized = {**config, "quantization_config": {"quant_method": "fp8"}}
    (source / "config.json").write_text(json.dumps(quantized))
    for recipe in ({"method": "upcycle", "experts": 4}, {"method": "expand", "groups": 2}):
        with pytest.raises(UnsupportedModel, match="is quantized"):
            plan({**recipe, "source": str(source)})


def test_weights_in_which_nothing_is_calculated_are_refused(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama")
    narrow = {
        name: tensor.to(torch.float8_e4m3fn) if ".mlp." in name else tensor
        for name, tensor in tiny.stored(source).items()
    }
    save_file(narrow, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"mlp.*F8_E4M3, whose numbers mean nothing without their scales"):
        plan({"method": "upcycle", "source": str(source), "experts": 4})


# ---- routers and experts ------------------------------------------------------------------------------


def test_gradients_of_the_experts_are_those_of_the_mlp_and_the_router_has_none(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "qwen3")
    make({"method": "upcycle", "source": str(source), "experts": 4}, tmp_path / "out")
    dense, moe = tiny.load(source), tiny.load(tmp_path / "out")
    for model in (dense, moe):
        model(tiny.tokens(), labels=tiny.tokens()).loss.backward()
    for before, after in zip(dense.model.layers, moe.model.layers, strict=True):
        assert after.mlp.gate.weight.grad.abs().max() < 1e-6
        total = after.mlp.experts.down_proj.grad.sum(0)
        assert torch.allclose(total, before.mlp.down_proj.weight.grad, atol=1e-6)


def test_the_router_is_normal_with_the_deviation_that_was_asked(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama")
    routers = {}
    for seed, std in ((0, 0.02), (0, 0.5), (1, 0.02)):
        out = tmp_path / f"out-{seed}-{std}"
        make({"method": "upcycle", "source": str(source), "experts": 64, "seed": seed, "router": {"std": std}}, out)
        found = [t for name, t in tiny.stored(out).items() if "block_sparse_moe.gate" in name]
        routers[seed, std] = torch.cat(found)
    values = routers[0, 0.02].double()
    assert abs(values.mean()) < 5 * 0.02 / math.sqrt(values.numel())
    assert abs(values.std() - 0.02) < 5 * 0.02 / math.sqrt(2 * values.numel())
    assert torch.allclose(routers[0, 0.5].double(), 25 * values, rtol=1e-6)
    assert not torch.equal(routers[0, 0.02], routers[1, 0.02])
    assert len({tuple(row.tolist()) for row in routers[0, 0.02]}) == 4 * 64, "every layer and expert has its own row"


def test_the_parts_of_an_mlp_make_it_up_and_share_a_row_of_the_router(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama", "bfloat16")
    fields = {"experts": 8, "experts_per_token": 4, "granularity": 4}
    make({"method": "upcycle", "source": str(source), **fields}, tmp_path / "out")
    before, after = tiny.stored(source), tiny.stored(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 12
    moe, mlp = "model.layers.2.block_sparse_moe", "model.layers.2.mlp"
    for copy in range(2):
        parts = [f"{moe}.experts.{copy * 4 + s}" for s in range(4)]
        gate = torch.cat([after[f"{part}.w1.weight"] for part in parts])
        down = torch.cat([after[f"{part}.w2.weight"] for part in parts], dim=1)
        assert torch.equal(gate, before[f"{mlp}.gate_proj.weight"])
        assert torch.equal(down, 4 * before[f"{mlp}.down_proj.weight"])
        rows = after[f"{moe}.gate.weight"][copy * 4 : copy * 4 + 4]
        assert torch.equal(rows, rows[:1].expand(4, -1))
    assert not torch.equal(after[f"{moe}.gate.weight"][0], after[f"{moe}.gate.weight"][4])


def test_the_published_scale_is_the_third_root_on_each_matrix(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama")
    fields = {"experts": 8, "experts_per_token": 4, "granularity": 2, "scale": "nvidia"}
    outcome = make({"method": "upcycle", "source": str(source), **fields}, tmp_path / "out")
    before, after = tiny.stored(source), tiny.stored(tmp_path / "out")
    root = 2.0 ** (1 / 3)
    for ours, theirs in (("w1", "gate_proj"), ("w3", "up_proj")):
        expected = before[f"model.layers.0.mlp.{theirs}.weight"][:24].double() * root
        made = after[f"model.layers.0.block_sparse_moe.experts.0.{ours}.weight"].double()
        assert torch.allclose(made, expected, rtol=6e-8, atol=0)
    assert outcome.plan.checkpoint.origin.claim == "none"
    assert "before the activation" in outcome.plan.checkpoint.origin.reason


def test_weights_that_are_not_made_to_sum_to_one(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "qwen3")
    recipe = {"method": "upcycle", "source": str(source), "experts": 4, "normalize": False}
    part = make(recipe, tmp_path / "part").plan.checkpoint
    every = make({**recipe, "experts_per_token": 4}, tmp_path / "every").plan.checkpoint
    assert (part.origin.claim, every.origin.claim) == ("none", "close")
    assert json.loads((tmp_path / "part" / "config.json").read_text())["norm_topk_prob"] is False
    assert (tiny.logits(source) - tiny.logits(tmp_path / "every")).abs().max() < 2e-5
    assert (tiny.logits(source) - tiny.logits(tmp_path / "part")).abs().max() > 1e-2


# ---- drop and noise -----------------------------------------------------------------------------------

DROP = {"experts": 4, "drop": 0.5, "seed": 3}
MATRICES = (("w1", "gate_proj", 0), ("w3", "up_proj", 0), ("w2", "down_proj", 1))


def changed(made: torch.Tensor, original: torch.Tensor, axis: int) -> torch.Tensor:
    """Which rows (axis 0) or columns (axis 1) differ anywhere."""
    return (made != original).any(dim=1 - axis)


def test_the_same_share_of_neurons_is_drawn_in_all_three_matrices(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama", hidden_size=64, intermediate_size=333)
    make({"method": "upcycle", "source": str(source), **DROP}, tmp_path / "out")
    before, after = tiny.stored(source), tiny.stored(tmp_path / "out")
    chosen = set()
    for layer in range(4):
        for expert in range(4):
            masks = []
            for ours, theirs, axis in MATRICES:
                original = before[f"model.layers.{layer}.mlp.{theirs}.weight"]
                made = after[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{ours}.weight"]
                mask = changed(made, original, axis)
                masks.append(mask)
                assert mask.sum() == math.floor(0.5 * 333)
                fresh, replaced = (t.index_select(axis, mask.nonzero()[:, 0]).double() for t in (made, original))
                count = fresh.numel()
                assert abs(fresh.mean() - replaced.mean()) < 5 * replaced.std() / math.sqrt(count)
                assert abs(fresh.std() - replaced.std()) < 5 * replaced.std() / math.sqrt(2 * count)
            assert torch.equal(masks[0], masks[1])
            assert torch.equal(masks[0], masks[2])
            chosen.add(tuple(masks[0].tolist()))
    assert len(chosen) == 16, "every expert of every layer has a choice of its own"


def test_a_drop_of_zero_is_the_plain_copy(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama", "bfloat16")
    recipe = {"method": "upcycle", "source": str(source), "experts": 4}
    make(recipe, tmp_path / "plain")
    make({**recipe, "drop": 0.0}, tmp_path / "zero")
    assert contents(tmp_path / "plain") == contents(tmp_path / "zero")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("model*"))}


@pytest.mark.parametrize(
    "fields", [DROP, {"experts": 4, "noise": 0.01}, {"experts": 8, "granularity": 4, **{"drop": 0.3}}]
)
def test_the_same_seed_gives_the_same_bytes_however_the_work_is_cut(tmp_path: Path, fields: dict) -> None:
    source = tiny.save(tmp_path / "source", "llama", "bfloat16", hidden_size=64, intermediate_size=512)
    recipe = {"method": "upcycle", "source": str(source), **fields, "output": {"shard_size": "300kB"}}
    make(recipe, tmp_path / "one", threads=1, memory=2 << 20)
    make(recipe, tmp_path / "four", threads=4, memory=1 << 30)
    make({**recipe, "seed": 99}, tmp_path / "other")
    one = contents(tmp_path / "one")
    assert len(one) > 4
    assert one == contents(tmp_path / "four")
    assert one != contents(tmp_path / "other")


def test_noise_has_the_deviation_that_was_asked(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama", hidden_size=64, intermediate_size=256)
    make({"method": "upcycle", "source": str(source), "experts": 2, "noise": 0.01}, tmp_path / "out")
    before, after = tiny.stored(source), tiny.stored(tmp_path / "out")
    apart = [
        after[f"model.layers.{layer}.block_sparse_moe.experts.{e}.{ours}.weight"].double()
        - before[f"model.layers.{layer}.mlp.{theirs}.weight"].double()
        for layer in range(4)
        for e in range(2)
        for ours, theirs, _ in MATRICES
    ]
    values = torch.cat([part.flatten() for part in apart])
    assert abs(values.mean()) < 5 * 0.01 / math.sqrt(values.numel())
    assert abs(values.std() - 0.01) < 5 * 0.01 / math.sqrt(2 * values.numel())
    assert abs(np.corrcoef(apart[0].flatten(), apart[3].flatten())[0, 1]) < 0.05


# ---- several models, and growing ----------------------------------------------------------------------


def test_experts_from_several_models(tmp_path: Path) -> None:
    models = [tiny.save(tmp_path / f"model-{i}", "llama", "bfloat16", seed=i) for i in range(2)]
    recipe = {"method": "upcycle", "experts_from": [str(model) for model in models], "experts": 4}
    outcome = make(recipe, tmp_path / "out")
    before, after = [tiny.stored(model) for model in models], tiny.stored(tmp_path / "out")
    for e in range(4):
        for ours, theirs, _ in MATRICES:
            made = after[f"model.layers.1.block_sparse_moe.experts.{e}.{ours}.weight"]
            assert torch.equal(made, before[e % 2][f"model.layers.1.mlp.{theirs}.weight"])
    for name in ("model.embed_tokens.weight", "model.layers.3.self_attn.q_proj.weight", "model.norm.weight"):
        mean = (before[0][name].double() + before[1][name].double()) / 2
        assert torch.equal(after[name], mean.to(torch.bfloat16))
    assert outcome.plan.checkpoint.origin.claim == "none"
    with pytest.raises(RecipeError, match="3 is not a multiple of the 2 models"):
        plan({**recipe, "experts": 3})


def test_experts_from_the_same_model_are_copies(tmp_path: Path) -> None:
    source = str(tiny.save(tmp_path / "source", "llama"))
    make({"method": "upcycle", "experts_from": [source, source], "experts": 4}, tmp_path / "several")
    make({"method": "upcycle", "source": source, "experts": 4}, tmp_path / "one")
    several, one = tiny.stored(tmp_path / "several"), tiny.stored(tmp_path / "one")
    assert all(torch.equal(several[name], one[name]) for name in one)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss"])
def test_a_mixture_grows_and_computes_the_same(tmp_path: Path, kind: str) -> None:
    source = tiny.save(tmp_path / "source", kind)
    recipe = {"method": "upcycle", "source": str(source), "experts": 8}
    outcome = make(recipe, tmp_path / "out")
    assert (tiny.logits(source) - tiny.logits(tmp_path / "out")).abs().max() < 2e-5
    assert outcome.plan.checkpoint.origin.claim == "close"
    config = tiny.load(tmp_path / "out").config
    assert (config.num_local_experts, config.num_experts_per_tok) == (8, 4)
    kept = plan({**recipe, "experts_per_token": 2}).checkpoint.origin
    assert (kept.claim, kept.reason) == ("none", "a token takes 2 experts; 4 would compute what the source did")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"experts": 6}, "experts: 6 is not 2, 3, ... times the 4 experts"),
        ({"experts": 8, "drop": 0.5}, "drop: is for"),
    ],
)
def test_a_mixture_that_cannot_grow_so_is_refused(tmp_path: Path, fields: dict, problem: str) -> None:
    source = tiny.save(tmp_path / "source", "mixtral")
    with pytest.raises(RecipeError) as caught:
        plan({"method": "upcycle", "source": str(source), **fields})
    assert problem in str(caught.value)


# ---- nesting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["llama", "llama-partial", "groups", "granite", "llama4"])
def test_three_methods_in_one_pass_give_what_three_runs_give(tmp_path: Path, row: str) -> None:
    kind, config, fields, _ = ROWS[row]
    run = tmp_path / "run"
    for step in range(3):
        tiny.save(run / f"step-{step}", kind, seed=step, **config)
    lawa = {"method": "lawa", "checkpoints": f"{run}/step-*", "k": 3}
    expand = {"method": "expand", "groups": 2}
    upcycle = {"method": "upcycle", "experts": 4, **fields}
    if "layers" in fields:
        upcycle["layers"] = [1]
    make(lawa, tmp_path / "lawa")
    make({**expand, "source": str(tmp_path / "lawa")}, tmp_path / "expand")
    make({**upcycle, "source": str(tmp_path / "expand")}, tmp_path / "steps")
    make({**upcycle, "source": {**expand, "source": lawa}}, tmp_path / "nested")
    assert contents(tmp_path / "steps") == contents(tmp_path / "nested")
    steps, nested = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("steps", "nested"))
    assert steps == nested
    assert (tiny.logits(tmp_path / "lawa") - tiny.logits(tmp_path / "nested")).abs().max() < 3e-5


# ---- moments ------------------------------------------------------------------------------------------


def write_moments(source: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    moments = {"step": torch.tensor(100.0)}
    for name, tensor in tiny.stored(source).items():
        moments[f"exp_avg.{name}"] = torch.randn(tensor.shape, generator=generator)
        moments[f"exp_avg_sq.{name}"] = torch.rand(tensor.shape, generator=generator)
    save_file(moments, source / "optimizer.safetensors")
    return moments


def read_moments(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "optimizer.safetensors")


def test_moments_follow_their_weights(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama", "bfloat16")
    moments = write_moments(source)
    fields = {"experts": 8, "experts_per_token": 4, "granularity": 2, "optimizer": "carry"}
    make({"method": "upcycle", "source": str(source), **fields}, tmp_path / "out")
    made, weights = read_moments(tmp_path / "out"), tiny.stored(tmp_path / "out")
    assert {name.partition(".")[2] for name in made} - {""} == set(weights)
    assert made["step"] == 100
    moe, mlp = "model.layers.1.block_sparse_moe", "model.layers.1.mlp"
    for power, kind in ((1, "exp_avg"), (2, "exp_avg_sq")):
        assert torch.equal(made[f"{kind}.{moe}.experts.5.w1.weight"], moments[f"{kind}.{mlp}.gate_proj.weight"][24:])
        down = moments[f"{kind}.{mlp}.down_proj.weight"][:, 24:] / 2**power
        assert torch.equal(made[f"{kind}.{moe}.experts.5.w2.weight"], down)
        assert not made[f"{kind}.{moe}.gate.weight"].any()
        assert torch.equal(made[f"{kind}.model.norm.weight"], moments[f"{kind}.model.norm.weight"])
    assert tiny.logits(tmp_path / "out", "bfloat16").shape[-1] == 96, "the file is no part of the model"


def test_moments_of_new_blocks_and_of_drawn_neurons_begin_anew(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama")
    moments = write_moments(source)
    nested = {"method": "expand", "source": str(source), "groups": 2, "optimizer": "carry"}
    make({"method": "upcycle", "source": nested, **DROP, "optimizer": "carry"}, tmp_path / "out")
    made, weights, before = read_moments(tmp_path / "out"), tiny.stored(tmp_path / "out"), tiny.stored(source)
    assert not any(made[f"exp_avg.{name}"].any() for name in weights if ".layers.2." in name)
    name = "block_sparse_moe.experts.1.w1.weight"
    mask = changed(weights[f"model.layers.4.{name}"], before["model.layers.3.mlp.gate_proj.weight"], 0)
    kept = moments["exp_avg.model.layers.3.mlp.gate_proj.weight"]
    assert torch.equal(made[f"exp_avg.model.layers.4.{name}"], torch.where(mask[:, None], torch.zeros(()), kept))
    assert mask.sum() == 24


def test_moments_that_do_not_belong_to_the_weights_are_refused(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama")
    moments = write_moments(source)
    del moments["exp_avg.model.norm.weight"]
    save_file(moments, source / "optimizer.safetensors")
    recipe = {"method": "expand", "source": str(source), "groups": 2, "optimizer": "carry"}
    with pytest.raises(RequestError, match=r"has no moment of the parameter 'model\.norm\.weight'"):
        plan(recipe)
    average = {"method": "average", "checkpoints": [str(source), str(source)]}
    with pytest.raises(RequestError, match="no AdamW moments"):
        plan({**recipe, "source": average})

"""Experts in the order of another mixture's: permuted copies made by the test in memory, where every axis of six is one
of experts.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from merger.errors import IncompatibleSources, RecipeError, UnsupportedModel
from merger.methods.method import Means, settled
from merger.methods.soups import Soup
from merger.recipe import make_document
from merger.sources import LocalSources
from tests import tiny
from tests.judges import Here
from tests.methods.making import make, plan
from tests.methods.test_soups import NoTrainer

EXPERTS = 6
COUNT = {"num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "moe_num_experts": EXPERTS}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
GROUPS = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_experts_per_tok": 2}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {"mlp_only_layers": [1]},
    "granitemoe": {"num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_k": 2, "moe_intermediate_size": 24, "head_dim": 8, "moe_layer_start_index": 0},
    "gpt_oss": {},
    "glm4_moe": {**GROUPS, "n_group": 1, "moe_intermediate_size": 24, "head_dim": 8},
    "deepseek_v3": {**GROUPS, **LATENT, "moe_intermediate_size": 24, "num_key_value_heads": 4},
}
# Experts 0 to 2 are one group of two, and stay together.
ORDERS = ([4, 3, 5, 0, 2, 1], [0, 2, 1, 5, 4, 3], [1, 2, 0, 3, 5, 4], [3, 4, 5, 1, 0, 2])


def mixture(kind: str, seed: int = 0) -> torch.nn.Module:
    return tiny.model(kind, seed, **{**COUNT, **KINDS[kind]})


def permuted(model: torch.nn.Module, noise: float = 0.0) -> torch.nn.Module:
    """The model with the experts of each layer in another order, in place."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(7)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if EXPERTS in tensor.shape:
                layer = int(name.split("layers.")[1].split(".")[0])
                tensor.copy_(tensor.index_select(tensor.shape.index(EXPERTS), torch.tensor(ORDERS[layer])))
            tensor.add_(torch.randn_like(tensor) * noise)
    return model


def save(model: torch.nn.Module, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def settle(recipe: dict[str, Any]) -> dict[str, Any]:
    document = make_document({**recipe, "output": {"path": "unused"}})
    made, _ = settled(document.recipe, Means(LocalSources(), Here(), NoTrainer()))
    return {"method": made.method, **made.model_dump(mode="json", by_alias=True, exclude_none=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_permuted_copy_is_recovered(kind, tmp_path):
    first, other = save(mixture(kind), tmp_path / "a"), save(permuted(mixture(kind)), tmp_path / "b")
    before, moved = tiny.stored(tmp_path / "a"), tiny.stored(tmp_path / "b")
    assert any(not torch.equal(before[name], moved[name]) for name in before)
    assert (tiny.logits(tmp_path / "a") - tiny.logits(tmp_path / "b")).abs().max() < 1e-5
    recipe = settle({"method": "align_experts", "source": other, "like": first})
    make(recipe, tmp_path / "aligned")
    after = tiny.stored(tmp_path / "aligned")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    sparse = [layer for layer, order in enumerate(recipe["orders"]) if order]
    assert all([ORDERS[i][e] for e in recipe["orders"][i]] == list(range(EXPERTS)) for i in sparse)
    assert len(sparse) == 4 - (kind in ("qwen3_moe", "glm4_moe", "deepseek_v3"))


@pytest.mark.parametrize("kind", ["mixtral", "granitemoe"])
def test_the_average_of_permuted_copies_is_the_model(kind, tmp_path):
    models = [save(mixture(kind), tmp_path / "a"), save(permuted(mixture(kind)), tmp_path / "b")]
    make(settle({"method": "average", "checkpoints": models, "align_experts": True}), tmp_path / "out")
    before, after = tiny.stored(tmp_path / "a"), tiny.stored(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    make({"method": "average", "checkpoints": models}, tmp_path / "blind")
    blind = tiny.logits(tmp_path / "blind")
    assert (blind - tiny.logits(tmp_path / "a")).abs().max() > 0.1  # what the option is for


def test_an_order_is_found_under_noise_and_keeps_the_function(tmp_path):
    first, other = mixture("mixtral"), permuted(mixture("mixtral"), noise=0.03)
    recipe = settle(
        {"method": "align_experts", "source": save(other, tmp_path / "b"), "like": save(first, tmp_path / "a")}
    )
    assert all([ORDERS[i][e] for e in order] == list(range(EXPERTS)) for i, order in enumerate(recipe["orders"]))
    outcome = make(recipe, tmp_path / "out")
    assert (tiny.logits(tmp_path / "out") - tiny.logits(tmp_path / "b")).abs().max() < 1e-5
    assert outcome.plan.checkpoint.origin.claim == "close"
    assert any("21 of 24 experts" in note for note in outcome.plan.checkpoint.notes)


def test_a_recipe_within_is_aligned_like_a_model(tmp_path):
    """The aligned mixture is a soup of two, and goes into a soup itself."""
    first, other = save(mixture("mixtral"), tmp_path / "a"), save(permuted(mixture("mixtral")), tmp_path / "b")
    inner = {"method": "align_experts", "source": {"method": "soup", "models": [other, other]}, "like": first}
    recipe = settle({"method": "soup", "models": [first, inner]})
    assert isinstance(make_document({**recipe, "output": {"path": "x"}}).recipe, Soup)
    make(recipe, tmp_path / "out")
    before, after = tiny.stored(tmp_path / "a"), tiny.stored(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_refused(tmp_path, llama_run):
    run = llama_run()
    dense = {"method": "align_experts", "source": str(run / "step-100"), "like": str(run / "step-200")}
    with pytest.raises(UnsupportedModel, match="has no experts"):
        plan(dense)
    with pytest.raises(UnsupportedModel, match="has no experts"):
        plan({"method": "average", "checkpoints": [dense["source"], dense["like"]], "align_experts": True})
    a = save(mixture("mixtral"), tmp_path / "a")
    b = save(tiny.model("mixtral", num_local_experts=4), tmp_path / "b")
    with pytest.raises(IncompatibleSources) as found:
        plan({"method": "align_experts", "source": a, "like": b})
    assert "experts.4.w1.weight" in found.value.where
    same = {"method": "align_experts", "source": a, "like": a}
    for orders, words in (([[0] * 6] * 4, "layer 0 is no order"), ([list(range(6))] * 3, "not as many as layers")):
        with pytest.raises(RecipeError, match=words) as refused:
            plan({**same, "orders": orders})
        assert refused.value.where == "orders"

"""Files of mergekit-moe, against mergekit-moe itself and against transformers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from merger.errors import IncompatibleSources, RecipeError, RequestError, UnsupportedModel
from merger.given import as_text, from_text
from merger.methods.method import Means, settled
from merger.methods.moe import Moe
from merger.recipe import make_document
from merger.sources import LocalSources
from tests import tiny
from tests.judges import Here
from tests.methods.making import make, plan
from tests.methods.test_soups import NoTrainer

KINDS = ("llama", "mistral", "qwen2", "qwen3")
LAYERS, SIZE = tiny.SIZES["num_hidden_layers"], tiny.SIZES["hidden_size"]
CODE, CHAT, SUMS = ["def f(x):", "return"], ["hello", "how are you?"], ["1 + 1 = 2"]

# Runs mergekit-moe on pairs of a file and a folder; the base runs in float32 there as here, not in bfloat16.
_PEER = """
import sys
import torch
from mergekit.moe import router
from mergekit.scripts.moe import main

class InFloat32:
    @staticmethod
    def from_pretrained(path, **options):
        return plain.from_pretrained(path, **{**options, "torch_dtype": torch.float32})

plain, router.AutoModelForCausalLM = router.AutoModelForCausalLM, InFloat32
for config, out in zip(sys.argv[1::2], sys.argv[2::2]):
    flags = ["--i-understand-this-is-not-useful-without-training", "--device", "cpu"]
    main([config, out, *flags], standalone_mode=False)
"""


def expert(model: Path, positive: list[str] | None = None, **fields: Any) -> dict[str, Any]:
    prompts = {"positive_prompts": positive} if positive else {}
    return {"source_model": str(model), **prompts, **fields}


def moe(models: Path, kind: str, mode: str, shared: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """Three experts, the second of them scaled."""
    experts = [
        expert(models / f"{kind}-1", CODE, negative_prompts=CHAT),
        expert(models / f"{kind}-2", CHAT, residual_scale=0.5),
        expert(models / f"{kind}-1", SUMS),
    ]
    more = {"shared_experts": [shared]} if shared else {}
    base = {"base_model": str(models / f"{kind}-0"), "gate_mode": mode, "dtype": "float32"}
    return {**base, "experts": experts, **more, **fields}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    for kind in KINDS:
        for seed in range(3):
            place = tiny.save(folder / f"{kind}-{seed}", kind, seed=seed, vocab_size=260, sliding_window=None)
            tiny.byte_tokenizer(place, bos_token="<s>")
    return folder


@pytest.fixture(scope="module")
def recipes(models) -> dict[str, dict[str, Any]]:
    shared = {kind: expert(models / f"{kind}-2", ["any text"], residual_scale=0.25) for kind in KINDS}
    hidden = moe(models, "llama", "hidden")
    padded = {**hidden, "experts": [{**e, "positive_prompts": e["positive_prompts"][:1]} for e in hidden["experts"]]}
    return {
        "llama": moe(models, "llama", "cheap_embed"),
        "mistral": moe(models, "mistral", "cheap_embed", experts_per_token=1),
        "qwen2": moe(models, "qwen2", "cheap_embed", shared["qwen2"]),
        "llama-as-qwen": moe(models, "llama", "cheap_embed", shared["llama"], architecture="qwen"),
        "qwen3": moe(models, "qwen3", "cheap_embed"),
        "deepseek": moe(models, "llama", "cheap_embed", architecture="DeepSeek"),
        "deepseek-shared": moe(models, "llama", "cheap_embed", expert(models / "llama-2", residual_scale=0.25)),
        "hidden": hidden,
        "hidden_last": moe(models, "qwen3", "hidden_last"),
        "hidden_avg": {**padded, "gate_mode": "hidden_avg", "experts": [_one(e) for e in padded["experts"]]},
    }


def _one(expert: dict[str, Any]) -> dict[str, Any]:
    """The expert with no prompts of several lengths: mergekit's mean counts the padding of the shorter ones."""
    return {key: value[:1] if key == "negative_prompts" else value for key, value in expert.items()}


@pytest.fixture(scope="module")
def peers(recipes, tmp_path_factory) -> Path:
    """What mergekit-moe makes of the recipes."""
    folder = tmp_path_factory.mktemp("peers")
    arguments = []
    for name, recipe in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.dump(recipe))
        arguments += [str(folder / f"{name}.yaml"), str(folder / name)]
    done = subprocess.run([sys.executable, "-c", _PEER, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def settle(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with its routers measured, as data."""
    document = make_document({**recipe, "output": {"path": "unused"}})
    made, choices = settled(document.recipe, Means(LocalSources(), Here(), NoTrainer()))
    assert choices == ()
    return {"method": made.method, **made.model_dump(mode="json", by_alias=True, exclude_none=True)}


def compare(name: str, mine: torch.Tensor, theirs: torch.Tensor) -> None:
    if "gate.weight" in name:  # rows of length 1
        assert (mine - theirs).norm(dim=-1).max() < 1e-5, name
    else:
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "llama-as-qwen", "qwen3", "hidden", "hidden_last"])
def test_all_tensors_are_those_of_mergekit(name, recipes, peers, tmp_path):
    make(settle(recipes[name]), tmp_path / "moe")
    mine, theirs = tiny.load(tmp_path / "moe"), tiny.load(peers / name)
    own, other = mine.state_dict(), theirs.state_dict()
    zeros = {key for key in other.keys() - own.keys() if key.endswith("_proj.bias") and not other[key].any()}
    assert own.keys() == other.keys() - zeros
    for key, tensor in own.items():
        compare(key, tensor, other[key])
    assert mine.config.num_experts_per_tok == recipes[name].get("experts_per_token", 2)
    with torch.no_grad():
        assert (mine(tiny.tokens()).logits - theirs(tiny.tokens()).logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["deepseek", "deepseek-shared"])
def test_deepseek_is_written_with_the_names_of_mergekit(name, recipes, peers, tmp_path):
    make(settle(recipes[name]), tmp_path / "moe")
    own, other = load_file(tmp_path / "moe" / "model.safetensors"), tiny.stored(peers / name)
    assert own.keys() == other.keys()
    for key, tensor in own.items():
        compare(key, tensor, other[key])
    mine, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "moe", peers / name))
    for key in ("auto_map", "model_type", "n_routed_experts", "n_shared_experts", "norm_topk_prob", "scoring_func"):
        assert mine.get(key) == theirs.get(key), key
    assert mine["rope_theta"] == 10000.0  # the model's own code knows no rope_parameters


def test_a_mean_over_tokens_is_that_of_mergekit_where_nothing_is_padded(recipes, peers):
    rows = from_text(settle(recipes["hidden_avg"])["gates"], (LAYERS, 3, SIZE))
    for layer in range(LAYERS):
        theirs = tiny.stored(peers / "hidden_avg")[f"model.layers.{layer}.mlp.gate.weight"]
        assert np.abs(rows[layer] - theirs.numpy()).max() < 1e-5


def test_names_are_those_of_checkpoints_on_the_hub(recipes, tmp_path):
    for name in ("llama", "qwen2", "qwen3"):
        make(settle(recipes[name]), tmp_path / name)
        shapes = {key: tuple(tensor.shape) for key, tensor in tiny.stored(tmp_path / name).items()}
        assert shapes == tiny.own_names(tmp_path / name, tmp_path / f"{name}-own")


# ---- rows of routers ----------------------------------------------------------------------------------


def test_rows_follow_from_hidden_states_in_transformers(models):
    recipe = settle(moe(models, "llama", "hidden_avg"))
    rows = from_text(recipe["gates"], (LAYERS, 3, SIZE))
    model = tiny.load(models / "llama-0").double()

    def mean(prompts):
        found = []
        for prompt in prompts:
            ids = torch.tensor([[256, *tiny.tokens_of(prompt)]])
            with torch.no_grad():
                states = model(ids, output_hidden_states=True).hidden_states
            found.append([states[layer][0].mean(0) for layer in range(LAYERS)])
        return torch.stack([torch.stack(states) for states in found]).mean(0)

    wanted = torch.stack([mean(CODE) - mean(CHAT), mean(CHAT), mean(SUMS)], 1)
    wanted = wanted / wanted.norm(dim=-1, keepdim=True)
    assert np.abs(rows - wanted.numpy()).max() < 1e-5


def test_rows_follow_from_embeddings(models):
    rows = from_text(settle(moe(models, "llama", "cheap_embed"))["gates"], (LAYERS, 3, SIZE))
    embed = tiny.stored(models / "llama-0")["model.embed_tokens.weight"].double().numpy()

    def direction(prompts):
        total = sum(embed[[256, *tiny.tokens_of(prompt)]].sum(0) for prompt in prompts)
        return total / np.linalg.norm(total)

    first = direction(CODE) - direction(CHAT)
    assert np.abs(rows[2, 0] - first / np.linalg.norm(first)).max() < 1e-6
    assert np.abs(rows[1, 2] - direction(SUMS)).max() < 1e-6


@pytest.mark.parametrize(("mode", "deviation"), [("random", 1.0), ("uniform_random", (1 / 3 / SIZE) ** 0.5)])
def test_random_rows_need_no_prompts_and_no_run_of_the_base(mode, deviation, models, tmp_path):
    recipe = {
        "base_model": str(models / "qwen2-0"),
        "gate_mode": mode,
        "experts": [expert(models / "qwen2-1"), expert(models / "qwen2-2")],
        "shared_experts": [expert(models / "qwen2-0")],
    }
    document = make_document({**recipe, "output": {"path": "unused"}})
    assert document.recipe.evaluations() == ()
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        make({**recipe, "seed": seed}, tmp_path / folder)
    a, b, c = (tiny.stored(tmp_path / name) for name in "abc")
    gates = [key for key in a if key.endswith("gate.weight")]
    assert len(gates) == 2 * LAYERS  # of the experts, and of the shared one
    assert all(torch.equal(a[key], b[key]) and not torch.equal(a[key], c[key]) for key in gates)
    numbers = torch.cat([a[key].flatten() for key in gates]).double()
    assert abs(numbers.std() / deviation - 1) < 5 / (2 * len(numbers)) ** 0.5
    assert abs(numbers.mean()) < 5 * deviation / len(numbers) ** 0.5
    if mode == "uniform_random":
        assert numbers.abs().max() < SIZE**-0.5
    tiny.load(tmp_path / "a")


# ---- experts ------------------------------------------------------------------------------------------


def test_noise_and_the_residual_scale(models, tmp_path):
    experts = [
        expert(models / "llama-1", noise_scale=0.1, residual_scale=2.0),
        expert(models / "llama-1", residual_scale=0.0),
    ]
    make({"base_model": str(models / "llama-0"), "gate_mode": "random", "experts": experts}, tmp_path / "moe")
    made, dense = tiny.stored(tmp_path / "moe"), tiny.stored(models / "llama-1")
    for old, new, factor in (("gate", "w1", 1.0), ("up", "w3", 1.0), ("down", "w2", 2.0)):
        weight = dense[f"model.layers.1.mlp.{old}_proj.weight"]
        name = "model.layers.1.block_sparse_moe.experts.{}." + f"{new}.weight"
        added = (made[name.format(0)].double() / factor - weight.double()).flatten()
        assert abs(added.std() / 0.1 - 1) < 5 / (2 * len(added)) ** 0.5
        assert abs(added.mean()) < 5 * 0.1 / len(added) ** 0.5
        assert torch.equal(made[name.format(1)], weight * (0.0 if old == "down" else 1.0))


def test_copies_of_the_base_compute_what_it_does(models, tmp_path):
    experts = [expert(models / "llama-0"), expert(models / "llama-0")]
    recipe = {"base_model": str(models / "llama-0"), "gate_mode": "random", "experts": experts}
    outcome = make(recipe, tmp_path / "moe")
    assert outcome.plan.checkpoint.origin.claim == "close"
    assert (tiny.logits(tmp_path / "moe") - tiny.logits(models / "llama-0")).abs().max() < 1e-5
    assert any("all experts are the same model" in warning for warning in outcome.warnings)


def test_other_families_of_ours_and_nested_recipes(models, tmp_path):
    """granitemoe is none of mergekit-moe's; an expert may be a mean of two models."""
    soup = {"method": "soup", "models": [str(models / "llama-1"), str(models / "llama-2")]}
    experts = [{"source_model": soup}, expert(models / "llama-2")]
    base = {"base_model": str(models / "llama-0"), "gate_mode": "random", "experts": experts}
    make({**base, "architecture": "granitemoe"}, tmp_path / "moe")
    tiny.load(tmp_path / "moe")
    made = tiny.stored(tmp_path / "moe")
    a, b = (tiny.stored(models / f"llama-{seed}")["model.layers.3.mlp.down_proj.weight"].double() for seed in (1, 2))
    found = made["model.layers.3.block_sparse_moe.output_linear.weight"].double()
    assert (found[0] - (a + b) / 2).abs().max() < 1e-7
    assert torch.equal(found[1], b)


# ---- refusals -----------------------------------------------------------------------------------------


def refusal(recipe: dict[str, Any]) -> RequestError:
    with pytest.raises(RequestError) as found:
        plan(recipe)
    return found.value


def changed(recipe: dict[str, Any], place: int, **fields: Any) -> dict[str, Any]:
    experts = [dict(expert) for expert in recipe["experts"]]
    experts[place] = {key: value for key, value in {**experts[place], **fields}.items() if value is not None}
    return {**recipe, "experts": experts}


def test_what_is_wrong_is_told_with_its_place(models):
    good = moe(models, "llama", "hidden")
    shared = expert(models / "llama-2", ["x"])
    for recipe, where, words in (
        (changed(good, 1, positive_prompts=None), "experts[1].positive_prompts", "is missing"),
        (changed(good, 1, postive_prompts=["x"]), "experts[1].postive_prompts", "did you mean 'positive_prompts'"),
        ({**good, "gate_mod": "random"}, "gate_mod", "did you mean 'gate_mode'"),
        ({**good, "experts_per_token": 4}, "experts_per_token", "of 3 experts"),
        ({**good, "gate_mode": "hiden"}, "gate_mode", "hidden_avg"),
        ({**good, "architecture": "gpt"}, "architecture", "'gpt' is no architecture"),
        ({**good, "architecture": "qwen3"}, "architecture", "llama cannot become qwen3"),
        ({**good, "shared_experts": [shared, shared]}, "shared_experts", "exactly one shared expert, not 2"),
        ({**good, "architecture": "mixtral", "shared_experts": [shared]}, "shared_experts", "has no shared experts"),
        ({**good, "architecture": "qwen moe"}, "shared_experts", "exactly one shared expert, not 0"),
        (
            {**good, "architecture": "deepseek", "shared_experts": [shared]},
            "shared_experts[0].positive_prompts",
            "no gate",
        ),
        (
            {**good, "architecture": "qwen", "shared_experts": [expert(models / "llama-2")]},
            "shared_experts[0].positive_prompts",
            "needs prompts",
        ),
        (changed(good, 0, source_model=f"{models}/llama-1+my/lora"), "experts[0].source_model", "with an adapter"),
        (
            changed(good, 0, source_model={"model": {"path": "a", "revison": "b"}}),
            "experts[0].source_model",
            "nothing else",
        ),
        ({**good, "gates": as_text(np.zeros(5, np.float32))}, "gates", "reshape"),
    ):
        error = refusal(recipe)
        assert (error.where, type(error)) == (where, RecipeError)
        assert words in error.message


def test_prompts_that_are_the_same_for_all(models):
    good = moe(models, "llama", "hidden")
    experts = [{"source_model": e["source_model"], "positive_prompts": ["x"]} for e in good["experts"]]
    assert refusal({**good, "experts": experts}).where == "experts[0].positive_prompts"


def test_models_that_do_not_go_together(models, tmp_path):
    good = moe(models, "llama", "hidden")
    other = changed(good, 2, source_model=str(models / "mistral-0"))
    error = refusal(other)
    assert (type(error), error.where) == (IncompatibleSources, "experts[2].source_model")
    assert "is a mistral and the base a llama" in error.message
    tiny.save(tmp_path / "wide", "llama", vocab_size=260, intermediate_size=64)
    error = refusal(changed(good, 1, source_model=str(tmp_path / "wide")))
    assert (type(error), error.where) == (IncompatibleSources, "experts[1].source_model")
    assert "[64, 32], the base [48, 32]" in error.message
    tiny.save(tmp_path / "gelu", "llama", vocab_size=260, hidden_act="gelu")
    assert "hidden_act is 'gelu'" in refusal(changed(good, 1, source_model=str(tmp_path / "gelu"))).message
    tiny.save(tmp_path / "deep", "llama", vocab_size=260, num_hidden_layers=6)
    assert "6 layers and the base 4" in refusal(changed(good, 1, source_model=str(tmp_path / "deep"))).message


def test_a_base_without_a_tokenizer_and_one_without_a_family(models, tmp_path):
    tiny.save(tmp_path / "bare", "llama", vocab_size=260)
    recipe = {**moe(models, "llama", "hidden"), "base_model": str(tmp_path / "bare")}
    assert refusal(recipe).where == "base_model"
    tiny.save(tmp_path / "gemma", "gemma", vocab_size=260)
    experts = [expert(tmp_path / "gemma"), expert(tmp_path / "gemma")]
    error = refusal({"base_model": str(tmp_path / "gemma"), "gate_mode": "random", "experts": experts})
    assert isinstance(error, UnsupportedModel)
    assert "there is no gemma with experts" in error.message


def test_references_as_mergekit_writes_them():
    base = {"model": {"path": "org/name", "revision": "v2"}, "lora": None}
    made = Moe(base_model=base, experts=[{"source_model": {"model": "./a"}}])
    assert (made.base_model, made.experts[0].source_model) == ("org/name@v2", "./a")


# ---- the whole way ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_measures_once_and_gives_the_same_bytes(models, tmp_path, monkeypatch):
    (tmp_path / "moe.yaml").write_text(yaml.dump(moe(models, "llama", "hidden")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(output: str) -> str:
        command = [sys.executable, "-m", "merger", "run", "moe.yaml", "-o", output]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert "measuring" in run("first")
    assert "measuring" not in run("second")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second
    recipe = json.loads((tmp_path / "first" / "merger.json").read_text())["recipe"]
    rows = from_text(recipe["gates"], (LAYERS, 3, SIZE))
    stored = tiny.stored(tmp_path / "first")["model.layers.1.block_sparse_moe.gate.weight"]
    assert np.array_equal(rows[1], stored.numpy())

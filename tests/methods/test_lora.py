"""Sums of adapters, against what PEFT makes of the adapters and of their sum, and against float64."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from merger.assessment import assess
from merger.checkpoint import open_checkpoint
from merger.errors import FormatError, IncompatibleSources, PickledWeights, RecipeError, SourceError, UnsupportedModel
from merger.evaluation import Score, Text
from merger.methods.lora import with_adapter
from merger.methods.method import Judge
from merger.values import values
from tests import adapters, tiny
from tests.checkpoints import as_float64
from tests.methods.making import make, plan

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]
PLANS: dict[str, tuple[str, list[dict]]] = {
    "alike": ("llama", [{"r": 4, "target_modules": LINEAR}] * 2),
    "ranks": ("llama", [{"r": 2, "target_modules": LINEAR}, {"r": 7, "lora_alpha": 3, "target_modules": LINEAR}]),
    "modules": ("llama", [{"r": 2, "target_modules": ["q_proj", "gate_proj"]}, {"r": 3, "target_modules": LINEAR}]),
    "rslora": ("llama", [{"r": 4, "target_modules": LINEAR, "use_rslora": True}, {"r": 3, "target_modules": LINEAR}]),
    "patterns": (
        "llama",
        [
            {
                "r": 4,
                "lora_alpha": 6,
                "target_modules": LINEAR,
                "rank_pattern": {
                    r"layers\.[01]\.self_attn\.q_proj": 9,
                    "^model.layers.2.mlp.up_proj": 1,
                    r".*own_proj": 5,
                },
                "alpha_pattern": {"v_proj": 11, r"model.layers.3.*": 2},
            },
            {"r": 2, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 3}, "use_rslora": True},
        ],
    ),
    "layers": (
        "llama",
        [
            {"r": 2, "target_modules": LINEAR, "layers_to_transform": [1]},
            {"r": 3, "target_modules": r".*\.[02]\.mlp\.up_proj"},
        ],
    ),
    "embeddings": ("llama", [{"r": 3, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}] * 2),
    "gpt2": (
        "gpt2",
        [
            {"r": 2, "target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True},
            {"r": 5, "target_modules": ["c_attn", "c_proj", "lm_head"]},
        ],
    ),
    "biases": ("qwen2", [{"r": 2, "target_modules": ["q_proj"], "bias": "all"}] * 2),
    "biases of modules": ("qwen2", [{"r": 2, "target_modules": ["q_proj"], "bias": "lora_only"}] * 2),
    "saved": ("llama", [{"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}] * 2),
    "three": ("qwen3", [{"r": r, "target_modules": "all-linear"} for r in (1, 2, 8)]),
}
HALVES = ("biases", "biases of modules", "saved")  # hold whole tensors, of which there are only means


def weights_of(name: str, count: int) -> list[float]:
    return [0.25, 0.75] if name in HALVES else [0.7, -0.4, 1.3][:count]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Base and adapters of a plan."""
    made: dict[str, tuple[Path, list[Path]]] = {}

    def get(name: str) -> tuple[Path, list[Path]]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
            kind, plans = PLANS[name]
            base = tiny.save(folder / "base", kind, tie_word_embeddings=False)
            found = [adapters.save(folder / f"a{i}", kind, seed=i + 1, **some) for i, some in enumerate(plans)]
            made[name] = base, found
        return made[name]

    return get


def recipe(found, weights, **fields):
    entries = [{"source": str(path), "weight": weight} for path, weight in zip(found, weights, strict=True)]
    return {"method": "lora", "adapters": entries, **fields}


def summed(base, found, weights):
    """The sum of the changes as PEFT computes each."""
    total: dict[str, torch.Tensor] = {}
    for path, weight in zip(found, weights, strict=True):
        for module, delta in adapters.deltas(base, path).items():
            total[module] = total.get(module, 0) + weight * delta
    return total


def agree(made, wanted, tolerance=1e-5):
    assert made.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (made[name] - value).abs().max() <= tolerance * max(1.0, float(value.abs().max())), name


def in_numpy(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """B and A of the modules in a merged adapter, in float64."""
    found = adapters.stored(folder)
    return {
        name.removesuffix(".lora_A.weight"): (
            found[name.replace("lora_A", "lora_B")].double().numpy(),
            found[name].double().numpy(),
        )
        for name in found
        if "lora_A" in name
    }


# ---- one adapter of many ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_the_merged_adapter_changes_the_model_by_the_sum_of_the_changes(sets, tmp_path, name):
    base, found = sets(name)
    weights = weights_of(name, len(found))
    make(recipe(found, weights), tmp_path / "out")
    agree(adapters.deltas(base, tmp_path / "out"), summed(base, found, weights))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {a.shape[1] for a, _ in in_numpy(tmp_path / "out").values()} <= {config["r"]} == {config["lora_alpha"]}
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("name", [name for name in PLANS if name not in ("embeddings", "gpt2")])
def test_the_sum_in_the_base_computes_what_the_merged_adapter_on_it_does(sets, tmp_path, name):
    base, found = sets(name)
    weights = weights_of(name, len(found))
    make(recipe(found, weights), tmp_path / "adapter")
    make(recipe(found, weights, base=str(base)), tmp_path / "model")
    a, b = adapters.logits(base, tmp_path / "adapter"), tiny.logits(tmp_path / "model")
    assert (a - b).abs().max() <= 1e-5 * float(b.abs().max())


def test_the_sum_of_one_adapter_is_itself(sets, tmp_path):
    _, found = sets("alike")
    make(recipe(found[:1], [1.0]), tmp_path / "out")
    before, after = adapters.stored(found[0]), adapters.stored(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_factors_are_exact_but_for_one_rounding_of_b(sets, tmp_path):
    _, found = sets("ranks")
    make(recipe(found, [0.7, -0.4]), tmp_path / "out")
    made, first, other = in_numpy(tmp_path / "out"), in_numpy(found[0]), in_numpy(found[1])
    for module, (b, a) in made.items():
        assert np.array_equal(a, np.concatenate([first[module][1], other[module][1]]))
        wanted = np.concatenate([0.7 * 4.0 * first[module][0], -0.4 * (3 / 7) * other[module][0]], axis=1)
        assert np.array_equal(b, wanted.astype(np.float32).astype(np.float64))


def test_targets_are_ends_of_names_where_that_says_enough(sets, tmp_path):
    for name in ("modules", "layers"):
        _, found = sets(name)
        make(recipe(found, [1.0, 1.0]), tmp_path / name)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        modules = sorted(module.removeprefix("base_model.model.") for module in in_numpy(tmp_path / name))
        assert config["target_modules"] == (sorted({*LINEAR, "gate_proj"}) if name == "modules" else modules)


def test_sums_of_sums_are_one_sum(sets, tmp_path):
    base, found = sets("ranks")
    inner = recipe(found, [0.5, 0.5])
    outer = {"method": "lora", "adapters": [{"source": inner, "weight": 2.0}, str(found[0])]}
    make(outer, tmp_path / "out")
    agree(adapters.deltas(base, tmp_path / "out"), summed(base, [*found, found[0]], [1.0, 1.0, 1.0]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrower_dtype_is_rounded_to_once(sets, tmp_path, dtype):
    _, found = sets("ranks")
    make({**recipe(found, [0.7, -0.4]), "output": {"dtype": dtype}}, tmp_path / "narrow")
    pairs = [(0.7 * 4.0, adapters.stored(found[0])), (-0.4 * (3 / 7), adapters.stored(found[1]))]
    for name, tensor in adapters.stored(tmp_path / "narrow").items():
        assert tensor.dtype == getattr(torch, dtype)
        if "lora_B" in name:
            wanted = torch.cat([w * values[name].double() for w, values in pairs], 1)
            ulp = 2.0 ** (torch.floor(torch.log2(wanted.abs())) - (7 if dtype == "bfloat16" else 10))
            assert ((tensor.double() - wanted).abs() <= ulp.clamp(min=2.0**-24) / 2).all()


# ---- a lower rank -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_lower_rank_is_the_best_approximation(sets, tmp_path, rank):
    base, found = sets("ranks")
    weights = [0.7, -0.4]
    outcome = make(recipe(found, weights, rank=rank), tmp_path / "out")
    wanted, made = summed(base, found, weights), in_numpy(tmp_path / "out")
    kept = whole = 0.0
    for module, delta in wanted.items():
        b, a = made[f"base_model.model.{module}"]
        values = np.linalg.svd(delta.numpy(), compute_uv=False)
        error = np.linalg.norm(delta.numpy() - b @ a)
        assert b.shape[1] == rank
        assert abs(error - np.linalg.norm(values[rank:])) <= 1e-6 * values[0]
        kept, whole = kept + (values[:rank] ** 2).sum(), whole + (values**2).sum()
    [told] = [check for check in outcome.checks if check.name == "rank"]
    assert told.detail.startswith(f"{kept / whole:.3%}"[:-2])
    agree(
        adapters.deltas(base, tmp_path / "out"),
        {k: torch.tensor(made[f"base_model.model.{k}"][0] @ made[f"base_model.model.{k}"][1]) for k in wanted},
    )


def test_an_approximation_of_an_approximation_needs_a_folder_between(sets, tmp_path):
    base, found = sets("ranks")
    inner = recipe(found, [1.0, 1.0], rank=4)
    refused({"method": "lora", "adapters": [inner], "rank": 2}, UnsupportedModel, "cannot be measured again")
    outer = {"method": "lora", "adapters": [{"source": inner, "weight": 2.0}], "base": str(base)}
    make(outer, tmp_path / "a")
    make(inner, tmp_path / "inner")
    make({"method": "lora", "adapters": [str(tmp_path / "inner")], "scale": 2.0, "base": str(base)}, tmp_path / "b")
    agree(tiny.stored(tmp_path / "a"), tiny.stored(tmp_path / "b"), 1e-6)


def test_a_rank_that_is_enough_changes_nothing(sets, tmp_path):
    base, found = sets("modules")
    outcome = make(recipe(found, [1.0, 1.0], rank=5), tmp_path / "out")
    agree(adapters.deltas(base, tmp_path / "out"), summed(base, found, [1.0, 1.0]))
    assert "rank" not in {check.name for check in outcome.checks}


@pytest.mark.parametrize("fields", [{"rank": 2}, {}, {"combine": "factors"}])
def test_adapters_that_cancel_out_leave_zeros(sets, tmp_path, fields):
    _, found = sets("alike")
    make(recipe([found[0], found[0]], [1.0, -1.0], **fields), tmp_path / "out")
    for b, a in in_numpy(tmp_path / "out").values():
        assert np.abs(b @ a).max() < 1e-12


def test_factors_that_depend_on_each_other_are_no_obstacle(sets, tmp_path):
    base, found = sets("alike")
    make(recipe([found[0], found[0], found[1]], [0.5, 0.5, 1.0], rank=8), tmp_path / "out")
    agree(adapters.deltas(base, tmp_path / "out"), summed(base, found, [1.0, 1.0]))


@pytest.mark.parametrize("fields", [{}, {"rank": 3}, {"base": True}])
def test_the_bytes_depend_on_neither_threads_nor_memory(sets, tmp_path, fields):
    base, found = sets("gpt2")
    fields = {**fields, **({"base": str(base)} if "base" in fields else {})}
    for name, options in (("a", {"threads": 1}), ("b", {"threads": 4}), ("c", {"threads": 3, "memory": 300 << 10})):
        make(recipe(found, [0.7, -0.4], **fields), tmp_path / name, **options)
    for path in (tmp_path / "a").glob("*.safetensors"):
        assert len({(tmp_path / name / path.name).read_bytes() for name in "abc"}) == 1


# ---- into the base ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_one_adapter_in_the_base_is_what_peft_makes_of_it(sets, tmp_path, name):
    base, found = sets(name)
    make(recipe(found[:1], [1.0], base=str(base)), tmp_path / "out")
    wanted = adapters.load(base, found[0]).merge_and_unload()
    wanted.save_pretrained(tmp_path / "wanted")
    agree(tiny.stored(tmp_path / "out"), tiny.stored(tmp_path / "wanted"))


def test_a_sum_in_bfloat16_is_within_half_an_ulp(tmp_path):
    base = tiny.save(tmp_path / "base", "llama", "bfloat16", tie_word_embeddings=False)
    found = [adapters.save(tmp_path / f"a{i}", seed=i, r=3, target_modules=LINEAR) for i in (1, 2)]
    make(recipe(found, [0.7, -0.4], base=str(base)), tmp_path / "out")
    before, after = tiny.stored(base), tiny.stored(tmp_path / "out")
    for name, value in after.items():
        wanted = before[name].double()
        for path, weight in zip(found, [0.7, -0.4], strict=True):
            b, a = in_numpy(path).get(f"base_model.model.{name.removesuffix('.weight')}", (None, None))
            if b is not None:
                wanted += weight * (8 / 3) * torch.tensor(b @ a)
        ulp = 2.0 ** (torch.floor(torch.log2(wanted.abs().clamp(min=2.0**-120))) - 7)
        assert value.dtype == torch.bfloat16
        assert ((value.double() - wanted).abs() <= 0.5000001 * ulp).all(), name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("target", ["embedding", "lm_head"])
def test_tied_embeddings_are_untied_where_one_of_them_changes(tmp_path, kind, target):
    base = tiny.save(tmp_path / "base", kind, tie_word_embeddings=True)
    targets = [{"llama": "embed_tokens", "gpt2": "wte"}[kind] if target == "embedding" else "lm_head"]
    adapter = adapters.save(tmp_path / "a", kind, sizes={"tie_word_embeddings": True}, r=3, target_modules=targets)
    make(recipe([adapter], [1.0], base=str(base)), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    a, b = adapters.logits(base, adapter), tiny.logits(tmp_path / "out")
    assert (a - b).abs().max() <= 1e-5 * float(b.abs().max())


def test_tied_embeddings_that_nothing_changes_stay_tied(tmp_path):
    base = tiny.save(tmp_path / "base", "llama", tie_word_embeddings=True)
    adapter = adapters.save(tmp_path / "a", sizes={"tie_word_embeddings": True}, r=3, target_modules=["q_proj"])
    make(recipe([adapter], [1.0], base=str(base)), tmp_path / "out")
    assert "lm_head.weight" not in tiny.stored(tmp_path / "out")
    a, b = adapters.logits(base, adapter), tiny.logits(tmp_path / "out")
    assert (a - b).abs().max() <= 1e-5 * float(b.abs().max())


def test_a_base_that_is_stored_without_its_prefix(sets, tmp_path):
    base, found = sets("ranks")
    shutil.copytree(base, tmp_path / "bare")
    whole = tiny.stored(base)
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in whole.items()}, tmp_path / "bare" / "model.safetensors"
    )
    make(recipe(found, [1.0, 1.0], base=str(base)), tmp_path / "a")
    make(recipe(found, [1.0, 1.0], base=str(tmp_path / "bare")), tmp_path / "b")
    a, b = tiny.stored(tmp_path / "a"), tiny.stored(tmp_path / "b")
    assert all(torch.equal(tensor, b[name.removeprefix("model.")]) for name, tensor in a.items())


def test_a_base_that_is_an_average_is_rounded_once(sets, tmp_path):
    base, found = sets("ranks")
    other = tiny.save(tmp_path / "other", "llama", seed=9, tie_word_embeddings=False)
    mean = {"method": "average", "checkpoints": [str(base), str(other)]}
    make(recipe(found, [0.7, -0.4], base=mean), tmp_path / "out")
    total = summed(base, found, [0.7, -0.4])
    a, b, made = tiny.stored(base), tiny.stored(other), tiny.stored(tmp_path / "out")
    wanted = {k: (a[k].double() + b[k].double()) / 2 + total.get(k.removesuffix(".weight"), 0) for k in a}
    agree(made, wanted, 1e-6)


class Deaf(Judge):
    """Keeps what it was asked for."""

    def __init__(self):
        self.asked = []

    def score(self, candidate, evaluation, key=None):
        self.asked.append(candidate)
        return Score({"loss": 1.0}, "tokens", (1.0,), (1.0,))


def test_a_result_is_compared_with_its_base_and_not_with_adapters(sets, tmp_path):
    base, found = sets("alike")
    outcome = make(recipe(found, [0.5, 0.5], base=str(base)), tmp_path / "out")
    judge = Deaf()
    assess(outcome.plan, tmp_path / "out", Text(data=[__file__], better_than=["sources"]), judge)
    assert judge.asked[1:] == [str(base)]


def test_weights_of_zero_leave_the_base(sets, tmp_path):
    base, found = sets("ranks")
    make(recipe(found, [0.0, 0.0], base=str(base)), tmp_path / "out")
    a, b = tiny.stored(base), tiny.stored(tmp_path / "out")
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---- summed factors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("in_base", [False, True])
def test_summed_factors_have_cross_terms(sets, tmp_path, in_base):
    base, found = sets("alike")
    make(recipe(found, [0.7, -0.4], combine="factors", **({"base": str(base)} if in_base else {})), tmp_path / "out")
    first, other = in_numpy(found[0]), in_numpy(found[1])
    wanted = {
        module.removeprefix("base_model.model."): torch.tensor(
            2.0 * (0.7 * first[module][0] - 0.4 * other[module][0]) @ (0.7 * first[module][1] - 0.4 * other[module][1])
        )
        for module in first
    }
    if in_base:
        before, after = tiny.stored(base), tiny.stored(tmp_path / "out")
        made = {module: after[f"{module}.weight"] - before[f"{module}.weight"].double() for module in wanted}
    else:
        made = adapters.deltas(base, tmp_path / "out")
    agree(made, wanted)


# ---- refusals -----------------------------------------------------------------------------------------


def refused(recipe, kind, match):
    with pytest.raises(kind, match=match):
        plan(recipe)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "is a DoRA"),
        ({"peft_type": "ADALORA"}, "of the type ADALORA, not LORA"),
        ({"lora_bias": True}, "biases in its factors"),
        ({"layer_replication": [[0, 2], [1, 4]]}, "repeats layers"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "fused modules"),
        ({"trainable_token_indices": [1]}, "rows of the embedding"),
        ({"alora_invocation_tokens": [1]}, "some tokens only"),
        ({"ensure_weight_tying": True}, "tied modules"),
        ({"init_lora_weights": "pissa_niter_16"}, "began as 'pissa_niter_16', which changes the base too"),
        ({"init_lora_weights": "loftq"}, "began as 'loftq'"),
        ({"init_lora_weights": "olora"}, "began as 'olora'"),
        ({"task_type": "SEQ_CLS"}, "is CAUSAL_LM in .* and SEQ_CLS in"),
        ({"r": 3}, "where the config says rank 3"),
        ({"r": "three"}, "is 'three', not a number"),
        ({"rank_pattern": {"(": 3}}, "holds no pattern"),
        ({"rank_pattern": ["q_proj"]}, "is not a mapping"),
        ({"lora_alpha": float("inf")}, "is inf, not a number"),
    ],
)
def test_adapters_that_mean_something_else_are_refused(sets, tmp_path, changes, says):
    _, found = sets("alike")
    odd = adapters.configure(shutil.copytree(found[1], tmp_path / "odd"), **changes)
    refused(recipe([found[0], odd], [1.0, 1.0]), (UnsupportedModel, IncompatibleSources, FormatError), says)


def test_a_real_dora_is_refused_and_passes_alone(sets, tmp_path):
    base, found = sets("alike")
    dora = adapters.save(tmp_path / "dora", r=2, target_modules=["q_proj"], use_dora=True)
    for some in (recipe([found[0], dora], [1.0, 1.0]), recipe([dora], [1.0], base=str(base)), recipe([dora], [0.5])):
        refused(some, UnsupportedModel, "dora: is a DoRA")
    make(recipe([dora], [1.0]), tmp_path / "out")
    assert torch.equal(adapters.logits(base, dora), adapters.logits(base, tmp_path / "out"))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "biases in its factors"),
        ({"trainable_token_indices": [3, 4], "target_modules": ["q_proj"]}, "rows of the embedding of its own"),
    ],
)
def test_real_variants_are_refused(sets, tmp_path, config, says):
    _, found = sets("alike")
    kind = "qwen2" if "lora_bias" in config else "llama"
    odd = adapters.save(tmp_path / "odd", kind, r=2, **config)
    refused(recipe([found[0], odd], [1.0, 1.0]), UnsupportedModel, says)


def test_parts_that_the_config_says_nothing_of_are_refused(sets, tmp_path):
    _, found = sets("alike")
    dora = adapters.save(tmp_path / "dora", r=2, target_modules=["q_proj"], use_dora=True)
    adapters.configure(dora, use_dora=False)
    refused(
        recipe([found[0], dora], [1.0, 1.0]), UnsupportedModel, "lora_magnitude_vector, which is no part of a plain"
    )


def test_settings_that_are_not_known_are_a_warning(sets, tmp_path):
    _, found = sets("alike")
    odd = adapters.configure(shutil.copytree(found[1], tmp_path / "odd"), use_quantum=True)
    assert "use_quantum is not known here" in plan(recipe([found[0], odd], [1.0, 1.0])).checkpoint.warnings[0]


@pytest.mark.parametrize("name", HALVES)
def test_whole_tensors_have_means_only(sets, name):
    _, found = sets(name)
    refused(recipe(found, [1.0, 1.0]), IncompatibleSources, "the weights sum to 2, not to 1")
    assert plan(recipe(found, [1.0, 1.0], scale=0.5))


def test_whole_tensors_that_one_adapter_lacks_are_refused(sets):
    _, saved = sets("saved")
    _, plain = sets("alike")
    refused(recipe([saved[0], plain[0]], [0.5, 0.5]), IncompatibleSources, "and .* has none")


def test_whole_numbers_have_no_mean(sets, tmp_path):
    _, found = sets("saved")
    odd = shutil.copytree(found[0], tmp_path / "odd")
    name = "base_model.model.model.norm.weight"
    save_file({**adapters.stored(odd), name: torch.arange(32)}, odd / "adapter_model.safetensors")
    refused(recipe([odd, odd], [0.25, 0.75]), UnsupportedModel, "is I64, of which there is no mean")


def test_a_mean_of_whole_tensors(sets, tmp_path):
    _, found = sets("saved")
    make(recipe(found, [0.25, 0.75]), tmp_path / "out")
    made, a, b = adapters.stored(tmp_path / "out"), adapters.stored(found[0]), adapters.stored(found[1])
    for name in ("base_model.model.lm_head.weight", "base_model.model.model.norm.weight"):
        assert not torch.equal(a[name], b[name])
        assert (made[name].double() - 0.25 * a[name].double() - 0.75 * b[name].double()).abs().max() < 1e-7


def test_shapes_that_differ_are_refused(sets, tmp_path):
    base, found = sets("alike")
    _, other = sets("gpt2")
    big = {"hidden_size": 64, "intermediate_size": 48}
    wide = adapters.save(tmp_path / "wide", sizes=big, r=2, target_modules=["q_proj"])
    refused(
        recipe([found[0], wide], [1.0, 1.0]), IncompatibleSources, r"has the shape \(32, 32\) in .*a0 and \(64, 64\)"
    )
    model = tiny.save(tmp_path / "big", "llama", **big)
    refused(recipe(found, [1.0, 1.0], base=str(model)), IncompatibleSources, r"has the shape \[64, 48\] in .*big and")
    refused(recipe(other, [1.0, 1.0], base=str(base)), IncompatibleSources, "transformer.h.0.*has no such tensor")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "base: is quantized"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "base: ties its embeddings, of which one is changed"),
    ],
)
def test_bases_that_cannot_take_a_sum_are_refused(tmp_path, change, says):
    base = tiny.save(tmp_path / "base", "llama", tie_word_embeddings=True)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **change}))
    adapter = adapters.save(tmp_path / "a", sizes={"tie_word_embeddings": True}, r=2, target_modules=["lm_head"])
    refused(recipe([adapter], [1.0], base=str(base)), UnsupportedModel, says)


def test_copies_of_other_bases_are_refused(sets, tmp_path):
    base, found = sets("embeddings")
    odd = shutil.copytree(found[1], tmp_path / "odd")
    tensors = adapters.stored(odd)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] += 0.5
    save_file(tensors, odd / "adapter_model.safetensors")
    for fields in ({}, {"base": str(base)}):
        refused(recipe([found[0], odd], [1.0, 1.0], **fields), IncompatibleSources, "embed_tokens.* differs between")


def test_factors_of_other_ranks_are_not_summed(sets):
    _, found = sets("ranks")
    refused(recipe(found, [1.0, 1.0], combine="factors"), IncompatibleSources, "not the same rank and scale")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rank": 2, "base": "base"}, "`rank` is for an adapter"),
        ({"rank": 2, "combine": "factors"}, "keeps the rank"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"scale": 0.0}, "every weight is zero"),
        ({"evaluate": {"task": "text", "data": __file__}}, "the result is an adapter"),
    ],
)
def test_recipes_that_ask_for_what_cannot_be(sets, fields, says):
    _, found = sets("alike")
    refused(recipe(found, [1.0, 1.0], **fields), RecipeError, says)


def test_models_and_adapters_are_told_apart(sets, tmp_path):
    base, found = sets("alike")
    refused(recipe([found[0], base], [1.0, 1.0]), UnsupportedModel, "base: is a model, not an adapter")
    refused(recipe(found, [1.0, 1.0], base=str(found[0])), UnsupportedModel, "is an adapter, not a model")
    average = {"method": "average", "checkpoints": [str(path) for path in found]}
    refused(average, UnsupportedModel, "the mean of its factors A and B apart")
    refused(
        {"method": "upcycle", "source": str(found[0]), "experts": 2}, UnsupportedModel, "is an adapter, not a model"
    )


def test_folders_that_are_no_adapters(sets, tmp_path):
    _, found = sets("alike")
    bare = shutil.copytree(found[1], tmp_path / "bare")
    (bare / "adapter_config.json").unlink()
    refused(recipe([found[0], bare], [1.0, 1.0]), SourceError, "holds adapter_model.safetensors and no adapter_config")
    pickled = shutil.copytree(found[1], tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused(recipe([found[0], pickled], [1.0, 1.0]), PickledWeights, "is a pickle")


def test_bases_of_other_names_are_a_note(sets, tmp_path):
    _, found = sets("alike")
    odd = adapters.configure(shutil.copytree(found[1], tmp_path / "odd"), base_model_name_or_path="org/other")
    notes = plan(recipe([found[0], odd], [1.0, 1.0])).checkpoint.notes
    assert any("name their base differently" in note for note in notes)


# ---- model+lora ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alike", "rslora", "embeddings", "gpt2", "saved"])
def test_a_model_with_an_adapter_is_what_peft_makes_of_them(sets, name):
    base, [found, *_] = sets(name)
    made = with_adapter(open_checkpoint(base), open_checkpoint(found))
    assert made.label == f"{base}+{found}"
    assert [part.source.reference for part in made.parts] == [str(found), str(base)]
    peft = adapters.load(base, found).merge_and_unload().state_dict()
    whole = {key: value.double().numpy() for key, value in peft.items()}
    for key, tensor, content in values(made):
        computed = as_float64(content.tobytes(), tensor.dtype).reshape(tensor.shape)
        wanted = whole.get(key, whole.get(f"transformer.{key}"))
        np.testing.assert_allclose(computed, wanted, rtol=1e-5, atol=2e-6, err_msg=key)


def test_an_adapter_for_a_model_of_another_size_is_refused_in_the_plan(sets, tmp_path):
    _, [found, *_] = sets("alike")
    other = tiny.save(tmp_path / "other", "llama", hidden_size=64, tie_word_embeddings=False)
    with pytest.raises(IncompatibleSources, match="has the shape") as caught:
        with_adapter(open_checkpoint(other), open_checkpoint(found))
    assert str(found) in caught.value.where
    assert "model.layers" in caught.value.where


def test_what_is_no_adapter_is_refused_behind_a_plus(sets):
    base, [found, *_] = sets("alike")
    with pytest.raises(UnsupportedModel, match="not an adapter"):
        with_adapter(open_checkpoint(base), open_checkpoint(base))
    with pytest.raises(UnsupportedModel, match="is an adapter, not a model"):
        with_adapter(open_checkpoint(found), open_checkpoint(found))

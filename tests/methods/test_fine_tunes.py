"""Task arithmetic and its kin, against float64 from the definitions; what does not stem from one model is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from merger.errors import IncompatibleSources, RecipeError, UnsupportedModel
from tests.checkpoints import as_float64, read_raw, write_model
from tests.methods.making import make, plan

SHAPE = (7, 4)
CONFIG = {"model_type": "llama", "hidden_size": 4, "num_attention_heads": 1}


def model(tmp_path, name, seed, config=CONFIG, **side_files):
    random = np.random.default_rng(seed)
    tensors = {"model.norm.weight": random.normal(size=4), "lm_head.weight": random.normal(size=SHAPE)}
    write_model(tmp_path / name, {k: v.astype(np.float32) for k, v in tensors.items()}, config, side_files=side_files)
    return str(tmp_path / name)


@pytest.fixture
def models(tmp_path):
    return {name: model(tmp_path, name, seed) for seed, name in enumerate(["base", "a", "b", "c"])}


def values(folder):
    return {k: as_float64(content, dtype) for k, (dtype, _, content) in read_raw(folder / "model.safetensors").items()}


def made(recipe, tmp_path):
    make(recipe, tmp_path / "out")
    return values(tmp_path / "out")


def by_weights(models, weights):
    """The sum of weight * model in float64."""
    stored = {name: values(Path(models[name])) for name in weights}
    return {key: sum(w * stored[name][key] for name, w in weights.items()) for key in stored[next(iter(weights))]}


@pytest.mark.parametrize(
    ("recipe", "weights"),
    [
        (
            lambda m: {
                "method": "task_arithmetic",
                "base": m["base"],
                "models": [{"source": m["a"], "weight": 0.6}, {"source": m["b"], "weight": -0.3}, m["c"]],
                "scale": 0.5,
            },
            {"base": 1 - 0.65, "a": 0.3, "b": -0.15, "c": 0.5},
        ),
        (
            lambda m: {"method": "task_arithmetic", "base": m["base"], "models": [{"source": m["a"], "weight": -1}]},
            {"base": 2.0, "a": -1.0},
        ),
        (
            lambda m: {"method": "wise_ft", "base": m["base"], "fine_tuned": m["a"], "alpha": 0.3},
            {"base": 0.7, "a": 0.3},
        ),
        (
            lambda m: {"method": "interpolate", "sources": [m["a"], m["b"]], "t": 1.25},
            {"a": -0.25, "b": 1.25},
        ),
        (
            lambda m: {
                "method": "rewarded_soup",
                "models": [{"source": m["a"], "weight": 0.7}, {"source": m["b"], "weight": 0.3}],
            },
            {"a": 0.7, "b": 0.3},
        ),
        (lambda m: {"method": "soup", "models": [m["a"], m["b"], m["c"]]}, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}),
        (
            lambda m: {"method": "ratatouille", "base": m["base"], "auxiliary": [m["c"]], "targets": [m["a"], m["b"]]},
            {"a": 0.5, "b": 0.5},
        ),
    ],
    ids=["arithmetic", "negation", "wise_ft", "beyond", "rewarded", "soup", "ratatouille"],
)
def test_the_result_is_the_rounded_sum_of_the_definition(models, tmp_path, recipe, weights):
    result, wanted = made(recipe(models), tmp_path), by_weights(models, weights)
    for key, value in wanted.items():
        assert np.abs(result[key] - value).max() <= np.abs(np.spacing(value.astype(np.float32))).max()


def test_ratatouille_without_auxiliary_models_is_diwa_and_of_one_model_inter_training(models, tmp_path):
    diwa = made({"method": "ratatouille", "base": models["base"], "targets": [models["a"], models["b"]]}, tmp_path)
    shutil.rmtree(tmp_path / "out")
    soup = made({"method": "soup", "models": [models["a"], models["b"]]}, tmp_path)
    shutil.rmtree(tmp_path / "out")
    one = made(
        {"method": "ratatouille", "base": models["base"], "auxiliary": [models["c"]], "targets": [models["a"]]},
        tmp_path,
    )
    assert all(np.array_equal(diwa[key], soup[key]) for key in soup)
    assert all(np.array_equal(one[key], value) for key, value in by_weights(models, {"a": 1.0}).items())


def test_wise_ft_reaches_both_ends_exactly(models, tmp_path):
    for alpha, name in [(0.0, "base"), (1.0, "a")]:
        recipe = {"method": "wise_ft", "base": models["base"], "fine_tuned": models["a"], "alpha": alpha}
        result = made(recipe, tmp_path)
        shutil.rmtree(tmp_path / "out")
        assert all(np.array_equal(result[key], value) for key, value in by_weights(models, {name: 1.0}).items())


# ---- refusals -----------------------------------------------------------------------------------------


def refused(recipe, kind, match):
    with pytest.raises(kind, match=match):
        plan(recipe)


def test_weights_off_the_simplex_and_sums_of_nothing_are_refused(models):
    pair = [{"source": models["a"], "weight": 0.7}, {"source": models["b"], "weight": 0.4}]
    refused({"method": "rewarded_soup", "models": pair}, RecipeError, r"sum to 1, not 1\.1")
    nothing = {"method": "task_arithmetic", "base": models["base"], "models": [models["a"]], "scale": 0.0}
    assert [part.source.reference for part in plan(nothing).checkpoint.parts] == [models["base"]]


def test_a_misspelt_field_of_an_entry_is_named(models):
    entry = {"source": models["a"], "wieght": 0.7}
    recipe = {"method": "task_arithmetic", "base": models["base"], "models": [entry]}
    refused(recipe, RecipeError, r"models\[0\]\.wieght: is not a field; did you mean 'weight'")


def test_models_of_other_functions_are_refused(models, tmp_path):
    odd = model(tmp_path, "odd", 9, {**CONFIG, "rms_norm_eps": 0.5})
    refused(
        {"method": "soup", "models": [models["a"], odd]},
        IncompatibleSources,
        "rms_norm_eps is 1e-06 in .*a and 0.5 in .*odd: they do not stem from one model",
    )


def test_defaults_that_one_config_leaves_out_are_no_difference(models, tmp_path):
    stated = model(tmp_path, "stated", 9, {**CONFIG, "rms_norm_eps": 1e-6, "attention_dropout": 0.1})
    assert len(plan({"method": "soup", "models": [models["a"], stated]}).checkpoint.parts) == 2


def test_other_vocabularies_are_refused(models, tmp_path):
    vocabularies = [json.dumps(words) for words in ({"a": 0, "b": 1}, {"a": 1, "b": 0})]
    pair = [model(tmp_path, f"v{i}", i, **{"vocab.json": text}) for i, text in enumerate(vocabularies)]
    refused({"method": "soup", "models": pair}, IncompatibleSources, "do not use the same vocabulary")


def test_other_labels_are_refused(tmp_path):
    def labelled(name, *labels):
        return model(tmp_path, name, 0, {**CONFIG, "id2label": {str(i): label for i, label in enumerate(labels)}})

    first, swapped, other = labelled("x", "no", "yes"), labelled("y", "yes", "no"), labelled("z", "no", "maybe")
    refused({"method": "soup", "models": [first, swapped]}, IncompatibleSources, "the same labels in another order")
    refused({"method": "soup", "models": [first, other]}, IncompatibleSources, "'yes' is not in both")


def test_a_model_that_equals_its_base_is_refused(models, tmp_path):
    twin = model(tmp_path, "twin", 0)  # the seed of the base
    recipe = {"method": "task_arithmetic", "base": models["base"], "models": [models["a"], twin]}
    refused(recipe, IncompatibleSources, "twin: equals its base .*base: there is nothing in it to add")


def test_a_model_without_a_head_is_no_reward_model(models):
    refused({"method": "warm", "models": [models["a"], models["b"]]}, UnsupportedModel, "no head that gives a reward")


# ---- experts ------------------------------------------------------------------------------------------


def experts(tmp_path, name, order, drift=0.0, fused=False):
    random = np.random.default_rng(0)
    rows = random.normal(size=(8, 6, 4)).astype(np.float32)
    rows = rows[list(order)] + drift * random.normal(size=rows.shape).astype(np.float32)
    prefix = "model.layers.0.mlp.experts"
    whole = (
        {f"{prefix}.down_proj": rows} if fused else {f"{prefix}.{i}.up_proj.weight": row for i, row in enumerate(rows)}
    )
    write_model(tmp_path / name, whole, {"model_type": "mixtral"})
    return str(tmp_path / name)


@pytest.mark.parametrize("fused", [False, True])
def test_experts_in_another_order_are_refused(tmp_path, fused):
    pair = [experts(tmp_path, "x", range(8), fused=fused), experts(tmp_path, "y", [1, 0, 3, 2, 5, 4, 7, 6], 0.1, fused)]
    refused(
        {"method": "soup", "models": pair}, IncompatibleSources, "stand in another order .* 0 of one is nearest to 1"
    )


def test_experts_that_were_trained_on_are_the_same_experts(tmp_path):
    same = [experts(tmp_path, "x", range(8)), experts(tmp_path, "y", range(8), 0.3)]
    copies = [experts(tmp_path, "c", [0] * 8), experts(tmp_path, "d", [0] * 8, 0.1)]
    for pair in (same, copies):
        assert plan({"method": "soup", "models": pair})

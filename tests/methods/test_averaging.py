"""The averaging recipes on real files: every value against a float64 computation from the definitions."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from merger.cli.terminal import Silent
from merger.errors import RecipeError, RequestError
from merger.recipe import make_document, resolve
from merger.run import Options, run
from tests.checkpoints import as_float64, bfloat16, read_raw, write_model

STEPS = [100, 200, 300, 400, 600, 1000]
DTYPES = ["F32", "BF16", "F16"]
MANTISSA = {"F32": 24, "BF16": 8, "F16": 11}
SMALLEST = {"F32": -149, "BF16": -133, "F16": -24}
SIZE = 5000


def stored(values: np.ndarray, dtype: str):
    if dtype == "BF16":
        return bfloat16(values)
    return values.astype(np.float16 if dtype == "F16" else np.float32)


def write_run(folder: Path, points: Sequence[np.ndarray], dtype: str, steps: Sequence[int] = STEPS) -> None:
    for step, point in zip(steps, points, strict=True):
        tensors = {"model.layers.0.weight": stored(point, dtype), "model.norm.weight": stored(point[:7], dtype)}
        write_model(folder / f"step-{step}", tensors, {"model_type": "llama"})


def exactly(folder: Path, name: str = "model.layers.0.weight") -> np.ndarray:
    dtype, _, content = read_raw(folder / "model.safetensors")[name]
    return as_float64(content, dtype)


def make(folder: Path, recipe: dict) -> Path:
    output = folder / "out"
    run(make_document({**recipe, "output": {"path": str(output)}}), Options(), Silent())
    return output


def check(output: Path, folder: Path, weights: dict[int, float], dtype: str) -> None:
    """Promise 4 of the design: half a unit in the last place, and n * 2^-24 of the terms' size."""
    assert sum(weights.values()) == pytest.approx(1, abs=1e-12)
    for name in ("model.layers.0.weight", "model.norm.weight"):
        terms = [weight * exactly(folder / f"step-{step}", name) for step, weight in weights.items()]
        exact, size = sum(terms), sum(abs(term) for term in terms)
        exponent = np.floor(np.log2(np.maximum(abs(exact), 2.0**-149)))
        half_ulp = 0.5 * 2.0 ** np.maximum(exponent - MANTISSA[dtype] + 1, SMALLEST[dtype])
        assert read_raw(output / "model.safetensors")[name][0] == dtype
        assert np.all(abs(exactly(output, name) - exact) <= half_ulp + len(terms) * 2.0**-24 * size)


# ---- weights by the definitions, as recursions over the checkpoints -------------------------------------


def by_recursion(decays: Sequence[float], steps: Sequence[int]) -> dict[int, float]:
    """The weight of each point in e_i = b_i e_(i-1) + (1 - b_i) x_i, with e_1 = x_1."""
    weights = {steps[0]: 1.0}
    for step, decay in zip(steps[1:], decays, strict=True):
        weights = {at: decay * weight for at, weight in weights.items()} | {step: 1 - decay}
    return weights


def by_replay(scales: Sequence[float], steps: Sequence[int]) -> dict[int, float]:
    """The weight of each point when every update after the first is taken with its scale."""
    weights = dict.fromkeys(steps, 0.0) | {steps[0]: 1.0}
    for (before, after), scale in zip(itertools.pairwise(steps), scales, strict=True):
        weights[after] += scale
        weights[before] -= scale
    return weights


GAMMA = 6.937204  # of sigma_rel 0.10, arXiv 2312.02696

RECIPES = [
    ({"method": "average"}, dict.fromkeys(STEPS, 1 / 6)),
    (
        {"method": "average", "weights": [1, 2, 3, 4, 5, 5]},
        dict(zip(STEPS, [0.05, 0.1, 0.15, 0.2, 0.25, 0.25], strict=True)),
    ),
    ({"method": "average", "weights": [-1, 0, 0, 0, 0, 2], "normalize": False}, {100: -1.0, 1000: 2.0}),
    ({"method": "swa", "start": 300}, dict.fromkeys([300, 400, 600, 1000], 0.25)),
    ({"method": "swa", "start": "40%"}, dict.fromkeys([400, 600, 1000], 1 / 3)),
    ({"method": "swa", "start": 200, "every": 400}, dict.fromkeys([200, 600, 1000], 1 / 3)),
    ({"method": "ema", "decay": 0.8}, by_recursion([0.8] * 5, STEPS)),
    ({"method": "ema", "decay": 0.9, "decay_steps": 100}, by_recursion([0.9, 0.9, 0.9, 0.81, 0.6561], STEPS)),
    ({"method": "ema", "decay": 0.9, "warmup": "ratio"}, by_recursion([2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15], STEPS)),
    ({"method": "lawa", "k": 3}, dict.fromkeys([400, 600, 1000], 1 / 3)),
    ({"method": "lawa", "k": 3, "interval": 400}, dict.fromkeys([200, 600, 1000], 1 / 3)),
    ({"method": "lawa", "k": 2, "end": 300}, dict.fromkeys([200, 300], 0.5)),
    (
        {"method": "power_ema", "gamma": 2},
        by_recursion([(a / b) ** 3 for a, b in itertools.pairwise(STEPS)], STEPS),
    ),
    (
        {"method": "power_ema", "sigma_rel": 0.1},
        by_recursion([(a / b) ** (GAMMA + 1) for a, b in itertools.pairwise(STEPS)], STEPS),
    ),
    ({"method": "pma", "n": 4, "weighting": "linear"}, {300: 0.1, 400: 0.2, 600: 0.3, 1000: 0.4}),
    ({"method": "pma", "weighting": "ema", "alpha": 0.2}, by_recursion([0.8] * 5, STEPS)),
    ({"method": "wsm", "decay": "linear"}, by_replay([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6], STEPS)),
    ({"method": "wsm", "decay": "cosine", "n": 3}, by_replay([0.75, 0.25], [400, 600, 1000])),
    ({"method": "wsm", "decay": "sqrt", "n": 4}, by_replay([1 - i**0.5 / 2 for i in (1, 2, 3)], [300, 400, 600, 1000])),
]
NAMES = ["-".join(str(value) for value in recipe.values()) for recipe, _ in RECIPES]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("recipe", "weights"), RECIPES, ids=NAMES)
def test_every_average_is_within_half_a_unit_of_float64(tmp_path, recipe, weights, dtype):
    rng = np.random.default_rng(7)
    write_run(tmp_path, rng.standard_normal((6, SIZE)) * 10.0 ** rng.uniform(-3, 3, SIZE), dtype)
    check(make(tmp_path, {**recipe, "checkpoints": str(tmp_path / "step-*")}), tmp_path, weights, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "recipe", [{"method": "average"}, {"method": "wsm", "decay": "sqrt"}, {"method": "ema", "decay": 0.5}]
)
def test_sums_that_cancel_keep_what_is_left(tmp_path, recipe, dtype):
    """Huge values of both signs: the sum is as small as a rounding of its terms."""
    rng = np.random.default_rng(8)
    huge = rng.standard_normal(SIZE) * 1000
    points = [huge, -huge, huge * 1.01, -huge * 1.01, huge + 0.01, -huge + rng.standard_normal(SIZE)]
    write_run(tmp_path, points, dtype)
    document = make_document({**recipe, "checkpoints": str(tmp_path / "step-*")})
    weights = document.recipe.weights(STEPS)  # checked by themselves in test_coefficients
    output = make(tmp_path, {**recipe, "checkpoints": str(tmp_path / "step-*")})
    check(output, tmp_path, dict(zip(STEPS, weights, strict=True)), dtype)


@pytest.mark.parametrize(
    ("recipe", "function"),
    [
        ({"method": "swa", "start": 0}, get_swa_multi_avg_fn()),
        ({"method": "ema", "decay": 0.8}, get_ema_multi_avg_fn(0.8)),
    ],
)
def test_torch_gets_the_same_average(tmp_path, recipe, function):
    rng = np.random.default_rng(9)
    points = rng.standard_normal((6, SIZE)).astype(np.float32)
    write_run(tmp_path, points, "F32")
    model = torch.nn.Linear(SIZE, 1, bias=False)
    average = AveragedModel(model, multi_avg_fn=function)
    for point in points:
        model.weight.data[0] = torch.from_numpy(point)
        average.update_parameters(model)
    output = make(tmp_path, {**recipe, "checkpoints": str(tmp_path / "step-*")})
    found, theirs = exactly(output), average.module.weight.data[0].double().numpy()
    np.testing.assert_allclose(found, theirs, rtol=0, atol=12 * 2.0**-24 * abs(points).max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_of_one_is_the_last_checkpoint_bit_for_bit(tmp_path, dtype):
    rng = np.random.default_rng(10)
    points = rng.standard_normal((6, SIZE))
    points[-1, :4] = [0.0, -0.0, 1e-40, 3e-5]
    write_run(tmp_path, points, dtype)
    output = make(tmp_path, {"method": "lawa", "k": 1, "checkpoints": str(tmp_path / "step-*")})
    assert read_raw(output / "model.safetensors") == read_raw(tmp_path / "step-1000" / "model.safetensors")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "method", [{"method": "average"}, {"method": "ema", "decay": 0.7}, {"method": "wsm", "decay": "cosine"}]
)
def test_equal_checkpoints_average_to_themselves(tmp_path, method, dtype):
    rng = np.random.default_rng(11)
    point = rng.standard_normal(SIZE)
    point[:2] = [-0.0, 0.0]
    write_run(tmp_path, [point] * 6, dtype)
    output = make(tmp_path, {**method, "checkpoints": str(tmp_path / "step-*")})
    assert read_raw(output / "model.safetensors") == read_raw(tmp_path / "step-100" / "model.safetensors")


def test_recipes_within_recipes_are_one_sum_rounded_once(tmp_path):
    rng = np.random.default_rng(12)
    write_run(tmp_path, rng.standard_normal((6, SIZE)), "BF16")
    pattern = str(tmp_path / "step-*")
    nested = [
        {"method": "lawa", "k": 2, "checkpoints": pattern},
        str(tmp_path / "step-100"),
        {"method": "ema", "decay": 0.5, "checkpoints": pattern},
    ]
    output = make(tmp_path, {"method": "average", "checkpoints": nested, "weights": [0.5, 0.25, 0.25]})
    weights = {step: weight / 4 for step, weight in by_recursion([0.5] * 5, STEPS).items()}
    for step, weight in ((600, 0.25), (1000, 0.25), (100, 0.25)):
        weights[step] += weight
    check(output, tmp_path, weights, "BF16")


def test_posthoc_ema_finds_a_tracked_snapshot_again(tmp_path):
    """The wanted average is one that was tracked: the least squares give it weight 1."""
    rng = np.random.default_rng(13)
    for sigma in ("0.05", "0.10"):
        write_run(tmp_path / sigma, rng.standard_normal((6, SIZE)), "F32")
    tracks = [
        {"sigma_rel": float(sigma), "checkpoints": str(tmp_path / sigma / "step-*")} for sigma in ("0.05", "0.10")
    ]
    output = make(tmp_path, {"method": "posthoc_ema", "tracks": tracks, "sigma_rel": 0.1, "step": 1000})
    np.testing.assert_allclose(exactly(output), exactly(tmp_path / "0.10" / "step-1000"), rtol=0, atol=1e-9)
    weights = [
        part.weight
        for part in resolve(make_document({"method": "posthoc_ema", "tracks": tracks, "sigma_rel": 0.07})).parts
    ]
    assert sum(weights) == pytest.approx(1, abs=1e-12)


def test_posthoc_ema_needs_steps_above_zero(tmp_path):
    write_run(tmp_path, np.zeros((2, 8)), "F32", steps=[0, 10])
    track = {"sigma_rel": 0.05, "checkpoints": str(tmp_path / "step-*")}
    with pytest.raises(RecipeError, match="above 0"):
        resolve(make_document({"method": "posthoc_ema", "tracks": [track], "sigma_rel": 0.07}))


# ---- which checkpoints, at which steps ------------------------------------------------------------------


def parts_of(recipe: dict) -> dict[str, float]:
    return {Path(part.source.reference).name: part.weight for part in resolve(make_document(recipe)).parts}


def test_a_checkpoint_of_weight_zero_is_not_opened(tmp_path):
    write_run(tmp_path, np.zeros((6, 8)), "F32")
    (tmp_path / "step-100" / "model.safetensors").write_bytes(b"damaged")
    assert parts_of({"method": "lawa", "k": 2, "checkpoints": str(tmp_path / "step-*")}) == {
        "step-600": 0.5,
        "step-1000": 0.5,
    }


def test_steps_come_from_the_recipe_where_it_states_them(tmp_path):
    write_run(tmp_path, np.zeros((3, 8)), "F32", steps=[1, 2, 3])
    recipe = {"method": "swa", "start": 500, "checkpoints": str(tmp_path / "step-*"), "steps": [100, 500, 900]}
    assert parts_of(recipe) == {"step-2": 0.5, "step-3": 0.5}


def test_steps_come_from_the_trainer_where_names_have_none(tmp_path):
    for name, step in (("first", 10), ("second", 20)):
        write_model(tmp_path / name, {"x": np.zeros(2, np.float32)}, {})
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    recipe = {"method": "swa", "start": 20, "checkpoints": [str(tmp_path / "first"), str(tmp_path / "second")]}
    assert parts_of(recipe) == {"second": 1.0}


def test_checkpoints_without_steps_count_in_their_order(tmp_path):
    for name in ("first", "second", "third"):
        write_model(tmp_path / name, {"x": np.zeros(2, np.float32)}, {})
    recipe = {"method": "lawa", "k": 2, "checkpoints": [str(tmp_path / name) for name in ("first", "second", "third")]}
    checkpoint = resolve(make_document(recipe))
    assert [Path(part.source.reference).name for part in checkpoint.parts] == ["second", "third"]
    assert any("1, 2, 3" in note for note in checkpoint.notes)


@pytest.mark.parametrize("order", [[200, 100], [100, 100]])
def test_checkpoints_of_a_run_come_oldest_first_and_once(tmp_path, order):
    write_run(tmp_path, np.zeros((2, 8)), "F32", steps=[100, 200])
    with pytest.raises(RecipeError, match="oldest first"):
        resolve(
            make_document({"method": "lawa", "k": 2, "checkpoints": [str(tmp_path / f"step-{step}") for step in order]})
        )


@pytest.mark.parametrize(
    ("recipe", "problem"),
    [
        ({"method": "lawa", "k": 7}, "k=7 needs 7 checkpoints"),
        ({"method": "lawa", "k": 3, "interval": 300}, "needs checkpoints at 400|needs checkpoints at"),
        ({"method": "lawa", "k": 1, "end": 5}, "no checkpoint at step 5"),
        ({"method": "swa", "start": 2000}, "no checkpoint is at or after step 2000"),
        ({"method": "pma", "n": 9}, "n=9 needs 9 checkpoints"),
        ({"method": "wsm", "n": 9}, "n=9 needs 9 checkpoints"),
        ({"method": "average", "weights": [1, 2]}, "2 weights were given for 6 checkpoints"),
        ({"method": "average", "weights": [1, -1, 0, 0, 0, 0]}, "cannot be normalised"),
        ({"method": "lawa", "k": 1, "steps": [1, 2]}, "2 entries for 6 checkpoints"),
    ],
)
def test_what_the_checkpoints_do_not_allow_is_refused(tmp_path, recipe, problem):
    write_run(tmp_path, np.zeros((6, 8)), "F32")
    with pytest.raises(RequestError, match=problem):
        resolve(make_document({**recipe, "checkpoints": str(tmp_path / "step-*")}))

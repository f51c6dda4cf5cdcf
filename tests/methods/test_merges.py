"""Merges by rank, by sign, by chance and by angle as recipes, against float64 from their definitions."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger.errors import RecipeError, UnsupportedModel
from merger.rank_kernels import _DIGIT, _sort_all
from tests.checkpoints import as_float64, read_raw, write_model
from tests.methods.making import make, plan

CONFIG = {"model_type": "llama", "hidden_size": 40, "num_attention_heads": 1}
SHAPES = {"model.layers.0.mlp.up_proj.weight": (60, 40), "model.norm.weight": (40,), "lm_head.weight": (30, 40)}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    """A base and three fine-tunes whose layers changed by different amounts."""
    base = {name: np.random.default_rng(0).normal(size=shape) for name, shape in SHAPES.items()}
    for seed, name in enumerate(["base", "a", "b", "c"]):
        rng = np.random.default_rng(seed)
        scale = {name: 0.01 * (i + 1) for i, name in enumerate(SHAPES)} if seed else dict.fromkeys(SHAPES, 0.0)
        tensors = {key: (value + scale[key] * rng.normal(size=value.shape)).astype("f4") for key, value in base.items()}
        write_model(tmp_path / name, tensors, CONFIG)
    return {name: str(tmp_path / name) for name in ("base", "a", "b", "c")}


def values(folder: Path | str) -> dict[str, np.ndarray]:
    raw = read_raw(Path(folder) / "model.safetensors")
    return {name: as_float64(content, dtype).reshape(shape) for name, (dtype, shape, content) in raw.items()}


def made(recipe: dict, tmp_path: Path) -> dict[str, np.ndarray]:
    make(recipe, tmp_path / "out")
    return values(tmp_path / "out")


def close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    for name, value in wanted.items():
        assert np.allclose(found[name], value, rtol=0, atol=1e-6), name


def deltas(models: dict[str, str], names: str) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    base = values(models["base"])
    return base, [{key: value - base[key] for key, value in values(models[name]).items()} for name in names]


def trimmed(delta: np.ndarray, count: int) -> np.ndarray:
    """The `count` largest magnitudes."""
    least = np.sort(np.abs(delta).reshape(-1))[-count]
    return np.where(np.abs(delta) >= least, delta, 0.0)


def elected(kept: list[np.ndarray], weights: list[float], by: list[np.ndarray]) -> np.ndarray:
    """The weighted mean of those that have the sign of the sum of `by`."""
    sign = np.where(sum(by) >= 0, 1.0, -1.0)
    agree = [np.sign(delta) == sign for delta in kept]
    divisor = sum(weight * mask for weight, mask in zip(weights, agree, strict=True))
    total = sum(weight * delta * mask for weight, delta, mask in zip(weights, kept, agree, strict=True))
    return total / np.where(divisor == 0, 1.0, divisor)


@pytest.mark.parametrize("definition", ["paper", "mergekit"])
@pytest.mark.parametrize("trim", ["tensor", "model"])
def test_ties(models: dict[str, str], tmp_path: Path, definition: str, trim: str) -> None:
    weights = [1.0, 0.4, 2.0]
    entries = [{"source": models[name], "weight": weight} for name, weight in zip("abc", weights, strict=True)]
    recipe = {"method": "ties", "base": models["base"], "models": entries, "density": 0.3, "scale": 0.8}
    found = made({**recipe, "definition": definition, "trim": trim}, tmp_path)
    base, vectors = deltas(models, "abc")
    if trim == "model":
        flat = [np.concatenate([vector[name].reshape(-1) for name in base]) for vector in vectors]
        least = [np.sort(np.abs(vector))[-int(0.3 * vector.size)] for vector in flat]
    wanted = {}
    for name in base:
        if trim == "model":
            kept = [np.where(np.abs(v[name]) >= t, v[name], 0.0) for v, t in zip(vectors, least, strict=True)]
        else:
            kept = [trimmed(vector[name], int(0.3 * base[name].size)) for vector in vectors]
        by = kept if definition == "paper" else [w * k for w, k in zip(weights, kept, strict=True)]
        wanted[name] = base[name] + 0.8 * elected(kept, weights, by)
    close(found, wanted)


def test_a_whole_model_is_trimmed_alike_whatever_the_shards(models: dict[str, str], tmp_path: Path) -> None:
    recipe = {"method": "ties", "base": models["base"], "models": [models["a"], models["b"]], "trim": "model"}
    make(recipe, tmp_path / "one")
    make({**recipe, "output": {"shard_size": 6000}}, tmp_path / "many", threads=1)
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 1
    together = {name: raw for shard in shards for name, raw in read_raw(shard).items()}
    assert together == read_raw(tmp_path / "one" / "model.safetensors")


def test_what_is_measured_cannot_be_trimmed_as_one(models: dict[str, str]) -> None:
    inner = {"method": "slerp", "sources": [models["a"], models["b"]]}
    recipe = {"method": "ties", "base": models["base"], "models": [inner, models["c"]], "trim": "model"}
    with pytest.raises(UnsupportedModel, match="trim: what is measured already"):
        plan(recipe)
    plan({**recipe, "trim": "tensor"})


def test_recipes_within_are_measured_first(models: dict[str, str], tmp_path: Path) -> None:
    inner = {"method": "slerp", "sources": [models["a"], models["b"]], "t": 0.3}
    make({**inner, "output": {"dtype": "float32"}}, tmp_path / "inner")
    recipe = {"method": "ties", "base": models["base"], "density": 0.5}
    make({**recipe, "models": [inner, models["c"]]}, tmp_path / "nested")
    make({**recipe, "models": [str(tmp_path / "inner"), models["c"]]}, tmp_path / "apart")
    close(values(tmp_path / "nested"), values(tmp_path / "apart"))


@pytest.mark.parametrize("definition", ["paper", "mergekit"])
def test_dare(models: dict[str, str], tmp_path: Path, definition: str) -> None:
    recipe = {"method": "dare", "base": models["base"], "models": [models["a"]], "density": 0.4}
    found = made({**recipe, "definition": definition}, tmp_path)
    base, [vector] = deltas(models, "a")
    for name, delta in vector.items():
        left = found[name] - base[name]
        kept = np.abs(left) > 1e-9
        factor = 2.5 if definition == "paper" else np.abs(delta).sum() / np.abs(delta[kept]).sum()
        assert np.allclose(left[kept], factor * delta[kept], atol=1e-6)
    big = "model.layers.0.mlp.up_proj.weight"
    assert (np.abs(found[big] - base[big]) > 1e-9).mean() == pytest.approx(0.4, abs=0.05)


def test_dare_draws_apart_for_models_and_tensors_and_seeds(models: dict[str, str], tmp_path: Path) -> None:
    recipe = {"method": "dare", "base": models["base"], "models": [models["a"], models["a"]]}
    first = made(recipe, tmp_path)
    base, [vector] = deltas(models, "a")
    big = "model.layers.0.mlp.up_proj.weight"
    taken = np.round((first[big] - base[big]) / (2 * vector[big])).astype(int)
    assert [(taken == count).mean() for count in range(3)] == pytest.approx([0.25, 0.5, 0.25], abs=0.05)
    make({**recipe, "seed": 1}, tmp_path / "other")
    assert not np.array_equal(values(tmp_path / "other")[big], first[big])


def test_della_divides_each_change_by_its_own_probability(models: dict[str, str], tmp_path: Path) -> None:
    """MagPrune (section 3.1): probabilities on a line over the ranks of a row, the largest the likeliest."""
    recipe = {"method": "della", "base": models["base"], "models": [models["a"]], "density": 0.6, "epsilon": 0.5}
    found = made({**recipe, "elect": False}, tmp_path)
    base, [vector] = deltas(models, "a")
    for name, delta in vector.items():
        rows = np.abs(delta.reshape(-1, delta.shape[-1]))
        ranks = rows.argsort(axis=1).argsort(axis=1).reshape(delta.shape)  # no two are equal
        wanted = 0.35 + 0.5 * ranks / (delta.shape[-1] - 1)
        left = found[name] - base[name]
        kept = np.abs(left) > 1e-9
        assert np.allclose(left[kept], (delta / wanted)[kept], atol=1e-6)
        if kept.size > 1000:
            for low, high in ((0, 10), (15, 25), (30, 40)):
                some = (ranks >= low) & (ranks < high)
                assert kept[some].mean() == pytest.approx(wanted[some].mean(), abs=0.06)
    make({**recipe, "elect": False}, tmp_path / "again", threads=1, memory=1 << 20)
    assert all(np.array_equal(value, found[name]) for name, value in values(tmp_path / "again").items())


def test_della_elects_signs_and_means(models: dict[str, str], tmp_path: Path) -> None:
    """What is left of each model is what is left of it alone; weights count after the election."""
    entries = [{"source": models["a"], "weight": 0.5}, {"source": models["b"], "weight": 2.0}]
    recipe = {"method": "della", "base": models["base"], "density": 0.7, "epsilon": 0.2, "seed": 3}
    base = values(models["base"])
    alone = []
    for i in range(2):
        one = [{**entry, "weight": float(i == j)} for j, entry in enumerate(entries)]
        left = made({**recipe, "models": one, "elect": False}, tmp_path / str(i))
        alone.append({name: value - base[name] for name, value in left.items()})
    found = made({**recipe, "models": entries, "scale": 1.5}, tmp_path)
    for name, value in found.items():
        parts = [each[name] for each in alone]
        sure = np.abs(sum(parts)) > 1e-7
        wanted = base[name] + 1.5 * elected(parts, [0.5, 2.0], parts)
        assert np.allclose(value[sure], wanted[sure], atol=2e-6)


@pytest.mark.parametrize(("density", "epsilon"), [(1.0, 0.3), (0.4, 0.0)])
def test_della_at_its_ends(models: dict[str, str], tmp_path: Path, density: float, epsilon: float) -> None:
    """Everything is kept, or every element is as likely: DARE."""
    recipe = {"base": models["base"], "models": [models["a"]], "density": density, "elect": False}
    found = made({"method": "della", "epsilon": epsilon, **recipe}, tmp_path)
    close(found, made({"method": "dare", **recipe}, tmp_path / "dare"))


@given(keys=st.lists(st.integers(0, 7) | st.integers(0, 2**31 - 1), min_size=1, max_size=300))
def test_ranks_are_those_of_a_stable_sort(keys: list[int]) -> None:
    count = len(keys)
    ranks, order, other = np.empty(count, np.int64), np.empty(count, np.uint32), np.empty(count, np.uint32)
    _sort_all(ranks, np.array(keys, np.uint32), order, other, np.empty((1 << _DIGIT) + 1, np.int64))
    wanted = [sum(b < a or (b == a and j > i) for j, b in enumerate(keys)) for i, a in enumerate(keys)]
    assert ranks.tolist() == wanted


@pytest.mark.parametrize("definition", ["paper", "mergekit"])
@pytest.mark.parametrize("rows", [False, True])
def test_model_stock(models: dict[str, str], tmp_path: Path, definition: str, rows: bool) -> None:
    recipe = {"method": "model_stock", "base": models["base"], "models": [models[name] for name in "abc"]}
    found = made({**recipe, "definition": definition, "rows": rows}, tmp_path)
    base, vectors = deltas(models, "abc")

    def stock(parts: list[np.ndarray]) -> np.ndarray:
        cosines = [
            float(a.reshape(-1) @ b.reshape(-1)) / (np.linalg.norm(a) * np.linalg.norm(b))
            for i, a in enumerate(parts)
            for b in parts[i + 1 :]
        ]
        cosine = np.mean(cosines)
        cosine = max(0.0, cosine) if definition == "paper" else cosine
        return 3 * cosine / (1 + 2 * cosine) * sum(parts) / 3

    for name in base:
        parts = [vector[name] for vector in vectors]
        if rows and base[name].ndim > 1:
            delta = np.stack([stock([part[row] for part in parts]) for row in range(len(base[name]))])
        else:
            delta = stock(parts)
        assert np.allclose(found[name], base[name] + delta, rtol=0, atol=1e-6), name


def test_slerp_goes_from_the_first_to_the_second(models: dict[str, str], tmp_path: Path) -> None:
    a, b = values(models["a"]), values(models["base"])
    b = {name: np.roll(value, 7) for name, value in b.items()}
    write_model(tmp_path / "turned", {name: value.astype("f4") for name, value in b.items()}, CONFIG)
    found = made({"method": "slerp", "sources": [models["a"], str(tmp_path / "turned")], "t": 0.25}, tmp_path)
    for name, x in a.items():
        y = b[name].astype("f4").astype("f8")
        angle = np.arccos(float(x.reshape(-1) @ y.reshape(-1)) / np.linalg.norm(x) / np.linalg.norm(y))
        wanted = (np.sin(0.75 * angle) * x + np.sin(0.25 * angle) * y) / np.sin(angle)
        assert np.allclose(found[name], wanted, rtol=0, atol=1e-6)
    manifest = json.loads((tmp_path / "out" / "merger.json").read_text())
    assert [source["weight"] for source in manifest["sources"]] == [0.75, 0.25]


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"method": "model_stock", "models": ["a"]}, "models: model_stock merges at least 2 models beside the base"),
        ({"method": "sce", "models": [{"source": "a", "weight": 0.5}]}, "found by SCE itself"),
        ({"method": "ties", "models": ["a"], "density": 0}, "density: input should be greater than 0"),
        ({"method": "della", "models": ["a"], "density": 0.9, "epsilon": 0.3}, "density 0.9 and epsilon 0.3"),
        (
            {"method": "della", "models": ["a"], "density": 0.9, "epsilon": 0.2, "definition": "mergekit"},
            "density 0.9 and epsilon 0.2",
        ),
        ({"method": "dare", "models": ["a"], "drop": 0.3}, "drop: is not a field"),
        ({"method": "ties", "models": ["a"], "definition": "mergkit"}, "definition: input should be 'paper' or"),
    ],
)
def test_what_cannot_be_is_refused(models: dict[str, str], recipe: dict, words: str) -> None:
    def there(entry: str | dict) -> str | dict:
        return models[entry] if isinstance(entry, str) else {**entry, "source": models[entry["source"]]}

    recipe = {**recipe, "base": models["base"], "models": [there(entry) for entry in recipe["models"]]}
    with pytest.raises(RecipeError) as caught:
        plan(recipe)
    assert words in str(caught.value)

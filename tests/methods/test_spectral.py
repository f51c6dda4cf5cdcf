"""Merges by singular values as recipes: the whole way to files, against numpy's float64; what is refused and told."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from merger import host, spilling
from merger.errors import (
    IncompatibleSources,
    NonFiniteInput,
    NotEnoughMemory,
    NotInstalled,
    RecipeError,
    RequestError,
)
from merger.methods import spectral
from merger.recipe import make_document
from merger.run import Options, plan_of
from tests.checkpoints import as_float64, bfloat16, read_raw, write_model
from tests.methods.making import make, plan

CONFIG = {"model_type": "llama", "hidden_size": 12, "num_attention_heads": 1}
SHAPES = {
    "model.embed_tokens.weight": (20, 12),
    "model.layers.0.mlp.up_proj.weight": (16, 12),
    "model.layers.0.mlp.down_proj.weight": (12, 16),
    "model.layers.0.input_layernorm.weight": (12,),
    "model.layers.0.mlp.experts.gate_up_proj": (2, 4, 6),
}
MATRICES = [name for name, shape in SHAPES.items() if len(shape) == 2]
NAMES = ["base", "a", "b", "c"]


def write(folder: Path, seed: int, dtype: str = "F32") -> Path:
    random = np.random.default_rng(seed)
    start = np.random.default_rng(99)
    values = {k: start.normal(size=s) + (0.1 * random.normal(size=s) if seed else 0) for k, s in SHAPES.items()}
    tensors = {k: bfloat16(v) if dtype == "BF16" else v.astype("f4") for k, v in values.items()}
    return write_model(folder, tensors, CONFIG)


@pytest.fixture
def models(tmp_path):
    return {name: str(write(tmp_path / name, seed)) for seed, name in enumerate(NAMES)}


def values(folder):
    return {
        name: as_float64(content, dtype).reshape(shape)
        for name, (dtype, shape, content) in read_raw(Path(folder) / "model.safetensors").items()
    }


def recipe(models, method, count=3, **fields):
    return {"method": method, "base": models["base"], "models": [models[n] for n in NAMES[1 : count + 1]], **fields}


def changes(models, folder, count=3):
    """What was made less the base, and the task vectors, both in float64."""
    base = values(models["base"])
    tasks = {name: [values(models[n])[name] - base[name] for n in NAMES[1 : count + 1]] for name in SHAPES}
    return {name: value - base[name] for name, value in values(folder).items()}, tasks


def near(found, expected, scale=1.0):
    """Within the rounding of float32 of the result (of size 4 at most) and of the change."""
    assert np.abs(found - expected).max() <= 2.0**-21 * scale


def iso_c(tasks):
    u, s, v = np.linalg.svd(sum(tasks), full_matrices=False)
    return s.mean() * u @ v


@pytest.mark.parametrize(("scale", "weights"), [(1.0, (1, 1, 1)), (0.5, (1, -2, 0.5))])
def test_iso_c(models, tmp_path, scale, weights):
    given = [{"source": models[n], "weight": w} for n, w in zip(NAMES[1:], weights, strict=True)]
    make({"method": "iso_c", "base": models["base"], "models": given, "scale": scale}, tmp_path / "out")
    found, tasks = changes(models, tmp_path / "out")
    for name in SHAPES:
        weighted = [w * task for w, task in zip(weights, tasks[name], strict=True)]
        near(found[name], scale * (iso_c(weighted) if name in MATRICES else np.mean(weighted, axis=0)))


def test_tsv_of_one_model_is_that_model(models, tmp_path):
    make(recipe(models, "tsv", 1), tmp_path / "out")
    found, made = values(tmp_path / "out"), values(models["a"])
    for name in SHAPES:
        near(found[name], made[name])


def test_tsv_keeps_the_largest_directions(models, tmp_path):
    make(recipe(models, "tsv", 2), tmp_path / "out")
    found, tasks = changes(models, tmp_path / "out", 2)
    for name in MATRICES:
        parts = [np.linalg.svd(task, full_matrices=False) for task in tasks[name]]
        kept = min(SHAPES[name]) // 2
        u = np.concatenate([p[0][:, :kept] for p in parts], 1)
        v = np.concatenate([p[2][:kept] for p in parts])
        p, _, q = np.linalg.svd(u, full_matrices=False)
        x, _, y = np.linalg.svd(v, full_matrices=False)
        near(found[name], p @ q @ np.diag(np.concatenate([part[1][:kept] for part in parts])) @ x @ y)


def test_a_matrix_with_fewer_directions_than_tasks_is_averaged(tmp_path):
    shape = (2, 30)
    for seed, name in enumerate(NAMES):
        write_model(
            tmp_path / name, {"w": np.random.default_rng(seed).normal(size=shape).astype("f4")}, {"model_type": "x"}
        )
    made = recipe({name: str(tmp_path / name) for name in NAMES}, "tsv")
    make(made, tmp_path / "out")
    near(values(tmp_path / "out")["w"], np.mean([values(tmp_path / n)["w"] for n in NAMES[1:]], axis=0))


def test_iso_cts_with_all_directions_common_is_iso_c(models, tmp_path):
    make(recipe(models, "iso_cts", common=1.0), tmp_path / "out")
    found, tasks = changes(models, tmp_path / "out")
    for name in MATRICES:
        near(found[name], iso_c(tasks[name]))


@pytest.mark.parametrize("steps", [None, 5])
def test_wudi_of_one_model_is_that_model(models, tmp_path, steps):
    make(recipe(models, "wudi", 1, steps=steps), tmp_path / "out")
    found, made = values(tmp_path / "out"), values(models["a"])
    for name in SHAPES:
        near(found[name], made[name])


def test_wudi_is_the_minimum(models, tmp_path):
    make(recipe(models, "wudi"), tmp_path / "out")
    found, tasks = changes(models, tmp_path / "out")
    for name in MATRICES:
        near(found[name], wudi(tasks[name]))


def calibrated(merged, tasks):
    u, s, v = np.linalg.svd(merged, full_matrices=False)
    whole, parts = u.T @ merged, [u.T @ task for task in tasks]
    shares = [np.maximum(1.0, (whole * part).sum(1) / (part * part).sum(1)) for part in parts]
    return u @ np.diag(len(tasks) / np.sum(shares, axis=0) * s) @ v


def wudi(tasks):
    grams = [task.T @ task / np.linalg.norm(task) ** 2 for task in tasks]
    target = sum(task @ gram for task, gram in zip(tasks, grams, strict=True))
    return target @ np.linalg.pinv(sum(grams), rcond=1e-12)


def test_calibration_as_a_method_and_after_another(models, tmp_path):
    make(recipe(models, "svc", scale=0.5), tmp_path / "alone")
    make(recipe(models, "wudi", svc=True), tmp_path / "after")
    alone, tasks = changes(models, tmp_path / "alone")
    after, _ = changes(models, tmp_path / "after")
    for name in MATRICES:
        near(alone[name], 0.5 * calibrated(sum(tasks[name]), tasks[name]))
        near(after[name], calibrated(wudi(tasks[name]), tasks[name]), 8)
    with pytest.raises(RecipeError, match="svc"):  # equal singular values have no directions of their own
        plan(recipe(models, "iso_c", svc=True))


def test_identical_models_count_once(models, tmp_path):
    given = {"method": "svc", "base": models["base"], "models": [models["a"]] * 4}
    make(given, tmp_path / "out")
    found, made = values(tmp_path / "out"), values(models["a"])
    for name in SHAPES:
        near(found[name], made[name])


def test_matrices_that_are_named_are_averaged(models, tmp_path):
    outcome = make(recipe(models, "iso_c", averaged=["embed", "^lm_head"]), tmp_path / "out")
    found, tasks = changes(models, tmp_path / "out")
    near(found["model.embed_tokens.weight"], np.mean(tasks["model.embed_tokens.weight"], axis=0))
    near(found[MATRICES[1]], iso_c(tasks[MATRICES[1]]))
    assert "3 of 5 tensors are no matrices to decompose: their mean" in outcome.plan.checkpoint.notes
    with pytest.raises(RecipeError, match="is no regular expression"):
        plan(recipe(models, "iso_c", averaged=["("]))


def test_recipes_nest_in_both_directions(models, tmp_path):
    """A merge of merges: what is made as a whole is made of what was made as a whole, and averaged with the rest."""
    inner = recipe(models, "iso_c", 2)
    outer = {"method": "tsv", "base": models["base"], "models": [inner]}
    make({"method": "interpolate", "sources": [outer, models["c"]], "t": 0.25}, tmp_path / "out")
    found, tasks = changes(models, tmp_path / "out")
    for name in MATRICES:
        near(found[name], 0.75 * iso_c(tasks[name][:2]) + 0.25 * tasks[name][2])


def test_what_no_model_has_changed_stays(models, tmp_path):
    """Models that share a stored tensor with their base: nothing is decomposed where there is nothing."""
    made = recipe({**models, "a": models["base"]}, "iso_c", 1)
    folder = tmp_path / "out"
    with pytest.raises(IncompatibleSources, match="equals its base"):
        make(made, folder)
    half = {"method": "interpolate", "sources": [models["base"], models["a"]], "t": 0.5}
    make({"method": "tsv", "base": models["base"], "models": [half, models["b"]]}, folder)
    assert values(folder).keys() == SHAPES.keys()


def test_bfloat16_is_rounded_once(tmp_path):
    models = {name: str(write(tmp_path / name, seed, "BF16")) for seed, name in enumerate(NAMES)}
    make(recipe(models, "iso_c"), tmp_path / "out")
    _, tasks = changes(models, tmp_path / "out")
    base = values(models["base"])
    for name in MATRICES:
        dtype, _, content = read_raw(tmp_path / "out" / "model.safetensors")[name]
        exact = torch.tensor(base[name] + iso_c(tasks[name])).to(torch.bfloat16)
        assert dtype == "BF16"
        assert np.array_equal(as_float64(content, dtype).reshape(exact.shape), exact.double().numpy())


# ---- what is told and refused -------------------------------------------------------------------------


def test_it_is_told_that_these_are_experimental(models):
    for method in ("tsv", "iso_c", "iso_cts", "wudi", "svc", "consensus_ta"):
        notes = plan(recipe(models, method)).checkpoint.notes
        assert any("arXiv 2511.21437" in note for note in notes)


def test_parts_are_told_with_the_weights_of_the_recipe(models):
    parts = plan(recipe(models, "iso_c", 2)).checkpoint.parts
    assert [(Path(part.source.reference).name, part.weight) for part in parts] == [("a", 1), ("b", 1), ("base", -1)]


def test_a_matrix_that_is_not_finite_is_refused(models, tmp_path):
    tensors = {k: v.astype("f4") for k, v in values(models["b"]).items()}
    tensors[MATRICES[1]][3, 4] = np.nan
    write_model(tmp_path / "b", tensors, CONFIG)
    with pytest.raises(NonFiniteInput, match=r"b/model.safetensors: tensor 'model.layers.0.mlp.up_proj.weight'"):
        make(recipe(models, "iso_c"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_machine_cannot_hold_is_refused_in_the_plan(tmp_path, monkeypatch):
    for name in NAMES:
        tensors = {"w": np.full((300, 400), NAMES.index(name), "f4")}
        write_model(tmp_path / name, tensors, {})
    models = {name: str(tmp_path / name) for name in NAMES}
    document = make_document({**recipe(models, "tsv"), "output": {"path": "unused"}})
    found, _ = plan_of(document, Options())
    dearest = found.wholes[0]
    monkeypatch.setattr(spilling, "free_memory", lambda: dearest.cost - 1)
    with pytest.raises(NotEnoughMemory, match=f"takes {dearest.cost:,} bytes"):
        plan_of(document, Options(memory=1 << 20, threads=1))
    allowed, allotment = plan_of(document, Options(memory=dearest.cost, threads=1))
    assert allotment.memory >= dearest.cost
    monkeypatch.setattr(spilling, "free_memory", host.free_memory)
    assert plan_of(document, Options(memory=1 << 20, threads=1))[1].whole == dearest.cost > 1 << 20
    assert allowed.fingerprint == found.fingerprint


def test_torch_must_be_there(models, monkeypatch):
    monkeypatch.setattr(spectral, "find_spec", lambda _name: None)
    with pytest.raises(NotInstalled, match="need torch"):
        plan(recipe(models, "tsv"))


def test_a_gpu_must_be_there_where_one_is_asked_for(models):
    document = make_document({**recipe(models, "tsv"), "output": {"path": "unused"}})
    with pytest.raises(RequestError, match="torch sees no GPU") as caught:
        plan_of(document, Options(device="cuda"))
    assert caught.value.where == "--device"


def test_a_gpu_must_hold_the_dearest(models, monkeypatch):
    document = make_document({**recipe(models, "tsv"), "output": {"path": "unused"}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 2000))
    with pytest.raises(NotEnoughMemory, match="the GPU has 1,000 free"):
        plan_of(document, Options(device="cuda"))


def test_the_examples_are_recipes():
    for method in (spectral.TsvM, spectral.IsotropicC, spectral.IsotropicCts, spectral.WudiMerging):
        assert json.dumps(make_document_of(method.example))


def make_document_of(text):
    from merger.recipe import parse_document

    return parse_document(text).dump()

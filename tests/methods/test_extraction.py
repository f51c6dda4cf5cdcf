"""Adapters out of fine-tunes: the error is the least there is by numpy, and PEFT loads them."""

import re

import numpy as np
import pytest
import torch

from merger.checkpoint import open_checkpoint
from merger.errors import IncompatibleSources, UnsupportedModel
from tests import adapters
from tests.checkpoints import write_model
from tests.methods.making import make, plan
from tests.tiny import model, save, stored

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
PROJECTIONS = re.compile(r"_proj\.weight$")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base and a fine-tune of it, whose every tensor has moved a little."""
    folder = tmp_path_factory.mktemp("pair")
    base = save(folder / "base", "llama", tie_word_embeddings=False)
    tuned = model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        for i, parameter in enumerate(tuned.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)), alpha=0.05)
    tuned.save_pretrained(folder / "tuned")
    return base, folder / "tuned"


def recipe(pair, **fields):
    return {"method": "extract_lora", "model": str(pair[1]), "base": str(pair[0]), **fields}


@pytest.mark.parametrize("rank", [1, 6, 40])
def test_each_change_is_the_nearest_of_its_rank(pair, tmp_path, rank):
    make(recipe(pair, rank=rank), tmp_path / "out")
    found = adapters.deltas(pair[0], tmp_path / "out")
    base, tuned = stored(pair[0]), stored(pair[1])
    names = [name for name in base if PROJECTIONS.search(name)]
    assert found.keys() == {name.removesuffix(".weight") for name in names}
    for name in names:
        change = (tuned[name].double() - base[name].double()).numpy()
        u, s, v = np.linalg.svd(change, full_matrices=False)
        nearest = u[:, :rank] * s[:rank] @ v[:rank]
        assert np.abs(found[name.removesuffix(".weight")].numpy() - nearest).max() < 1e-6


def test_the_whole_rank_gives_back_the_fine_tune_where_nothing_else_has_changed(pair, tmp_path):
    tensors = {name: value.numpy() for name, value in stored(pair[0]).items()}
    tensors |= {name: value.numpy() for name, value in stored(pair[1]).items() if PROJECTIONS.search(name)}
    config = open_checkpoint(pair[0]).config
    tuned = write_model(tmp_path / "tuned", tensors, config)
    make(recipe((pair[0], tuned), rank=48), tmp_path / "adapter")
    make({"method": "lora", "base": str(pair[0]), "adapters": [str(tmp_path / "adapter")]}, tmp_path / "back")
    for name, value in stored(tmp_path / "back").items():
        assert (value - torch.tensor(tensors[name])).abs().max() < 2e-6, name


def test_large_matrices_are_decomposed_at_random_and_alike(tmp_path):
    random = np.random.default_rng(0)
    base = {"model.layers.0.mlp.up_proj.weight": random.normal(size=(600, 800)).astype("f4")}
    left, right = random.normal(size=(600, 8)), random.normal(size=(8, 800))
    tuned = {name: (value + 0.1 * left @ right).astype("f4") for name, value in base.items()}
    folders = [write_model(tmp_path / name, t, {}) for name, t in (("base", base), ("tuned", tuned))]
    for name in ("one", "two"):
        make(recipe(folders, rank=8), tmp_path / name)
    one, two = adapters.stored(tmp_path / "one"), adapters.stored(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    b, a = (next(v.double() for n, v in one.items() if f"lora_{side}" in n) for side in "BA")
    change = next(iter(tuned.values())).astype("f8") - next(iter(base.values()))
    best = np.sqrt((np.linalg.svd(change, compute_uv=False)[8:] ** 2).sum())
    assert np.linalg.norm((b @ a).numpy() - change) <= 1.01 * best + 1e-5


def test_modules_that_are_named(pair):
    made = plan(recipe(pair, modules="self_attn"))
    assert all("self_attn" in name for name in made.checkpoint.tensors)
    assert len(made.checkpoint.tensors) == 4 * 4 * 2
    assert any("what changed there is lost" in note for note in made.checkpoint.notes)
    with pytest.raises(UnsupportedModel, match="no matrices"):
        plan(recipe(pair, modules="nothing"))


def test_what_is_refused(pair, tmp_path):
    with pytest.raises(UnsupportedModel, match="inputs first"):
        plan(recipe([save(tmp_path / "gpt2", "gpt2")] * 2))
    with pytest.raises(UnsupportedModel, match="is an adapter already"):
        plan(recipe((pair[0], adapters.save(tmp_path / "adapter"))))
    with pytest.raises(IncompatibleSources, match=r"do not stem from one model|is .* in"):
        plan(recipe((pair[0], save(tmp_path / "wide", "llama", intermediate_size=64))))
    with pytest.raises(IncompatibleSources, match="equals its base"):
        plan(recipe((pair[0], pair[0])))

"""Depth routers through the module in examples/."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from merger.errors import RecipeError, UnsupportedModel
from tests import tiny
from tests.methods.making import make, plan


@pytest.fixture(scope="module")
def depths() -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "mixture_of_depths.py"
    spec = importlib.util.spec_from_file_location("mixture_of_depths", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["llama", "qwen3", "experts"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and the same with depth routers in layers 1 and 3."""
    folder = tmp_path_factory.mktemp("mod")
    source = tiny.save(folder / "source", "llama" if request.param == "experts" else request.param)
    if request.param == "experts":
        make({"method": "upcycle", "source": str(source), "experts": 4}, folder / "experts")
        source = folder / "experts"
    make({"method": "mod", "source": str(source)}, folder / "out")
    return source, folder / "out"


@torch.no_grad()
def test_at_full_capacity_it_is_the_source_to_the_bit(models: tuple[Path, Path], depths: ModuleType) -> None:
    source, out = models
    assert torch.equal(depths.load(out, capacity=1.0).eval()(tiny.tokens()).logits, tiny.logits(source))
    assert json.loads((out / "config.json").read_text())["mod"] == {"layers": [1, 3], "capacity": 0.125}


@torch.no_grad()
def test_exactly_k_tokens_are_picked_and_the_others_pass(models: tuple[Path, Path], depths: ModuleType) -> None:
    model = depths.load(models[1]).eval()
    depths.set_capacity(model, 0.25)
    layer = model.model.layers[1]
    torch.nn.init.normal_(layer.mod_router.weight)
    seen = {}
    layer.register_forward_hook(lambda _, args, out: seen.update(before=args[0], after=out))
    model(tiny.tokens())
    assert layer.picked.shape == (2, 5), "ceil(0.25 * 17)"
    assert all(len(set(row.tolist())) == 5 for row in layer.picked)
    changed = (seen["before"] != seen["after"]).any(-1)
    expected = torch.zeros(2, 17, dtype=torch.bool).scatter(1, layer.picked, value=True)
    assert torch.equal(changed, expected)


def test_routers_are_trained_through_their_scores(models: tuple[Path, Path], depths: ModuleType) -> None:
    model = depths.load(models[1], capacity=0.5)
    model(tiny.tokens(), labels=tiny.tokens()).loss.backward()
    assert model.model.layers[1].mod_router.weight.grad.any()


def test_what_cannot_be_routed_is_refused(models: tuple[Path, Path]) -> None:
    source, out = models
    with pytest.raises(RecipeError, match="layers: 4 is no layer: there are 0 to 3"):
        plan({"method": "mod", "source": str(source), "layers": [4]})
    with pytest.raises(RecipeError, match="every: there are fewer layers"):
        plan({"method": "mod", "source": str(source), "every": 5})
    with pytest.raises(RecipeError, match="takes one of every and layers"):
        plan({"method": "mod", "source": str(source), "every": 2, "layers": [1]})
    with pytest.raises(UnsupportedModel, match="which are numbered"):
        plan({"method": "expand", "source": str(out), "groups": 2})


def test_upcycling_keeps_depth_routers(tmp_path: Path, depths: ModuleType) -> None:
    source = tiny.save(tmp_path / "source", "qwen2")
    nested = {"method": "mod", "source": str(source), "layers": [0]}
    make({"method": "upcycle", "source": nested, "experts": 4}, tmp_path / "out")
    with torch.no_grad():
        made = depths.load(tmp_path / "out", capacity=1.0).eval()(tiny.tokens()).logits
    assert (made - tiny.logits(source)).abs().max() < 1e-5

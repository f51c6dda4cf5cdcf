"""LoraHub: a planted combination is found, remembered and written."""

import json
from pathlib import Path

import pytest
import torch

from merger.errors import NotGoodEnough, RecipeError
from merger.evaluation import Classification, Score, Text
from merger.methods.lora import Lora
from merger.methods.lorahub import LoraHub
from merger.methods.method import Judge, Means, settled
from merger.recipe import make_document
from merger.sources import LocalSources
from tests import adapters, tiny
from tests.methods.making import make, plan
from tests.methods.test_soups import NoTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
TEXT = Text(data=["held-out.txt"])
NAMES = ["a", "b", "c"]
PLANTED = [0.8, -0.5, 0.2]


class Bowl(Judge):
    """Scores by how far the weights are from the planted ones; keeps what it was asked for."""

    def __init__(self, planted=PLANTED, metric="loss"):
        self.planted, self.metric, self.asked = planted, metric, []

    def score(self, candidate, evaluation, key=None, along=()):
        self.asked.append(candidate)
        distance = sum((w - p) ** 2 for w, p in zip(weights_of(candidate), self.planted, strict=True))
        value = distance if self.metric == "loss" else 1.0 - distance
        return Score({self.metric: value}, "tokens", (value,), (1.0,))


def weights_of(recipe):
    return [entry.weight for entry in recipe.adapters]


@pytest.fixture
def found(tmp_path):
    folders = [tmp_path / name for name in NAMES]
    for folder in folders:
        folder.mkdir()
    return [str(folder) for folder in folders]


def search(judge, names, **fields):
    recipe = LoraHub(**{"base": "base", "adapters": names, "select_on": TEXT, **fields})
    made, [choice] = settled(recipe, Means(LocalSources(), judge, NoTrainer()))
    return made, choice


def test_a_planted_combination_is_found(found):
    judge = Bowl()
    made, choice = search(judge, found, budget=200, regularisation=0.0)
    assert sum((w - p) ** 2 for w, p in zip(weights_of(made), PLANTED, strict=True)) < 1e-3
    assert isinstance(made, Lora)
    assert (made.base, made.combine) == ("base", "factors")
    assert len(judge.asked) == 200
    assert weights_of(judge.asked[0]) == [0.0, 0.0, 0.0]  # the base alone comes first
    assert all(abs(weight) <= 1.5 for one in judge.asked for weight in weights_of(one))
    assert [row.name for row in choice.taken] == [", ".join(f"{w:g}" for w in weights_of(made))]


def test_more_of_a_metric_can_be_better(found):
    fields = {"select_on": Classification(data=["rows.jsonl"]), "regularisation": 0.0, "budget": 200}
    made, _ = search(Bowl(metric="accuracy"), found, **fields)
    assert sum((w - p) ** 2 for w, p in zip(weights_of(made), PLANTED, strict=True)) < 1e-3


def test_weights_have_a_price(found):
    made, _ = search(Bowl([1.0, 0.0, 0.0]), found, budget=200, regularisation=3.0)
    # (w - 1)^2 + 3 |w| / 3 is least at w = 1/2
    assert weights_of(made)[0] == pytest.approx(0.5, abs=0.05)


def test_the_same_seed_asks_for_the_same_sums(found):
    asked = []
    for seed in (0, 0, 1):
        judge = Bowl()
        search(judge, found, budget=25, seed=seed)
        asked.append(judge.asked)
    assert asked[0] == asked[1] != asked[2]


def test_the_sum_alone_is_measured_in_the_base_and_written_without(found):
    judge = Bowl()
    made, _ = search(judge, found, budget=30, write="adapter")
    assert made.base is None
    assert {one.base for one in judge.asked} == {"base"}


def test_nothing_that_is_better_than_the_base_is_no_adapter(found):
    with pytest.raises(NotGoodEnough, match="no sum of the adapters has a better loss"):
        search(Bowl([0.0, 0.0, 0.0]), found, budget=20, write="adapter")
    made, _ = search(Bowl([0.0, 0.0, 0.0]), found, budget=20)
    assert weights_of(made) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bounds", [[0.5, 1.0], [-1.0, -0.5], [0.0, 0.0]])
def test_bounds_hold_the_beginning(bounds):
    content = {"method": "lorahub", "base": "b", "adapters": "x", "select_on": {"task": "text", "data": "d"}}
    with pytest.raises(RecipeError, match="0, where the search begins"):
        make_document({**content, "bounds": bounds})


# ---- for real -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_adapter_that_made_a_text_is_found_by_it(tmp_path, monkeypatch):
    """Text that the base with 0.8 of one adapter finds likely; another adapter beside it. Scores are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so small a model is slower on several
    base = tiny.save(tmp_path / "base", "llama", tie_word_embeddings=False, num_hidden_layers=2)
    sizes = {"num_hidden_layers": 2}
    found = [
        adapters.save(tmp_path / f"a{i}", seed=i, sizes=sizes, r=2, lora_alpha=16, target_modules="all-linear")
        for i in (1, 2)
    ]
    make({"method": "lora", "base": str(base), "adapters": [str(found[0])], "scale": 0.8}, tmp_path / "planted")
    model = tiny.load(tmp_path / "planted")
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        rows = [
            model.generate(torch.tensor([[1, 3 + i]]), do_sample=True, max_new_tokens=40, pad_token_id=0)[0].tolist()
            for i in range(24)
        ]
    data = tmp_path / "few.jsonl"
    data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    recipe = {
        "method": "lorahub",
        "base": str(base),
        "adapters": [str(path) for path in found],
        "select_on": {"task": "text", "data": str(data), "device": "cpu"},
        "budget": 30,
        "write": "adapter",
    }
    assert any("weights are searched in the run" in note for note in plan(recipe).checkpoint.notes)
    make(recipe, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "merger.json").read_text())
    first, other = (entry["weight"] for entry in manifest["recipe"]["adapters"])
    assert manifest["recipe"]["method"] == "lora"
    assert len(list((tmp_path / "cache" / "merger").rglob("*.json"))) == 30
    assert abs(first - 0.8) < 0.45
    assert abs(other) < 0.45
    assert adapters.logits(base, tmp_path / "out").isfinite().all()
    assert Path(tmp_path / "out" / "adapter_config.json").exists()

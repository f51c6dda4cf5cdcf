"""WARM on real reward models: trained here on noisy preferences, averaged, and measured on held-out pairs."""

import json
import sys
from copy import deepcopy

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, LlamaConfig

from merger.checkpoint import open_checkpoint
from merger.errors import IncompatibleSources
from merger.evaluation import Preferences
from merger.methods.method import Member
from merger.methods.soups import Warm
from merger.scoring import score
from merger.sources import LocalSources
from tests import tiny
from tests.methods.making import make, plan

MODELS, STEPS, LENGTH, NOISE = 3, 60, 6, 0.2


def pairs(count, random, noise=0.0):
    """Chosen and rejected tokens: what is preferred has more large ones; some of the time it is the other way round."""
    a, b = (torch.randint(3, 15, (count, LENGTH), generator=random) for _ in range(2))
    swap = ((a > 8).sum(1) < (b > 8).sum(1)) ^ (torch.rand(count, generator=random) < noise)
    return torch.where(swap[:, None], b, a), torch.where(swap[:, None], a, b)


def base_model(seed, labels=1):
    torch.manual_seed(seed)
    config = LlamaConfig(**{**tiny.SIZES, "num_hidden_layers": 1}, num_labels=labels)
    return AutoModelForSequenceClassification.from_config(config)


def train(model, seed):
    """From one start with one head, on other data in another order and with another rate."""
    random = torch.Generator().manual_seed(seed)
    chosen, rejected = pairs(256, random, NOISE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 * (2 + seed % 3))
    for _ in range(STEPS):
        rows = torch.randint(len(chosen), (32,), generator=random)
        rewards = [model(input_ids=tokens[rows]).logits[:, 0] for tokens in (chosen, rejected)]
        loss = -logsigmoid(rewards[0] - rewards[1]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def accuracies(tmp_path_factory):
    """Of three starts: the accuracy of each reward model and of their mean."""
    folder = tmp_path_factory.mktemp("rewards")
    chosen, rejected = pairs(400, torch.Generator().manual_seed(99))
    rows = [{"chosen": a, "rejected": b} for a, b in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    (folder / "held-out.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluation = Preferences(data=[str(folder / "held-out.jsonl")], batch_size=400)
    found = []
    for start in range(3):
        base = train(base_model(start), 1000 + start)  # the supervised model, with the head that all share
        for i in range(MODELS):
            train(deepcopy(base), 10 * start + i).save_pretrained(folder / f"{start}" / f"m{i}")
        mean = LocalSources().open(Member(Warm(models=f"{folder}/{start}/m*"), None))
        singles = [open_checkpoint(folder / f"{start}" / f"m{i}") for i in range(MODELS)]
        found.append([score(model, evaluation).metrics["accuracy"] for model in (mean, *singles)])
    return found


def test_the_mean_of_reward_models_is_at_least_as_good_as_they_are_on_average(accuracies):
    for mean, *singles in accuracies:
        sys.stdout.write(f"WARM {mean:.3f}, its models {', '.join(f'{single:.3f}' for single in singles)}\n")
        assert min(singles) > 0.6  # they have learnt something
        assert mean >= sum(singles) / len(singles)


# ---- reward models that the recipe trains itself ------------------------------------------------------


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory):
    """Two checkpoints of a supervised run, and preferences to train and to measure by."""
    folder = tmp_path_factory.mktemp("trajectory")
    for i, step in enumerate((9, 10)):
        tiny.save(folder / f"sft/step-{step}", "llama", seed=i, num_hidden_layers=1)
    for name, seed in (("pairs", 7), ("held-out", 8)):
        chosen, rejected = pairs(256, torch.Generator().manual_seed(seed))
        rows = [{"chosen": a, "rejected": b} for a, b in zip(chosen.tolist(), rejected.tolist(), strict=True)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def warm(folder, monkeypatch, name, **fields):
    """The result of a recipe that trains, and its reward models in the order of the runs."""
    monkeypatch.chdir(folder)
    rule = {"checkpoints": "sft/step-*", "data": "pairs.jsonl", "folder": name, "runs": 4, "dropouts": [0.0]}
    make({"method": "warm", "training": {**rule, **fields}}, folder / f"{name}-mean")
    told = json.loads((folder / f"{name}-mean" / "merger.json").read_text())
    return tiny.stored(folder / f"{name}-mean"), [tiny.stored(folder / model) for model in told["recipe"]["models"]]


def test_reward_models_start_from_the_pool_with_one_head(trajectory, monkeypatch):
    """Trained at a rate of 0 they are what they started from."""
    rates = {"steps": 1, "learning_rates": [0.0], "weight_decays": [0.0], "probe_steps": 5}
    pool = ["sft/step-10", "sft/step-9"]
    _, models = warm(trajectory, monkeypatch, "still", checkpoints=pool, runs=3, **rates)
    head = tiny.stored(trajectory / "still" / "reward-head")["score.weight"]
    for model, step in zip(models, (10, 9, 10), strict=True):
        start = tiny.stored(trajectory / f"sft/step-{step}")
        assert torch.equal(model["score.weight"], head)
        bodies = model.keys() - {"score.weight"}
        assert bodies == start.keys() - {"lm_head.weight"}
        assert all(torch.equal(model[name], start[name]) for name in bodies)


@pytest.mark.slow
def test_they_learn_and_their_mean_is_the_result(trajectory, monkeypatch):
    settings = {"steps": 80, "probe_steps": 40, "learning_rates": [2e-3, 3e-3], "runs": 2}
    made, models = warm(trajectory, monkeypatch, "learnt", checkpoints="sft/step-10", **settings)
    assert made.keys() == models[0].keys()
    for name, value in made.items():
        wanted = torch.stack([model[name].double() for model in models]).mean(0)
        assert (value.double() - wanted).abs().max() <= 2e-7 * wanted.abs().max(), name
    assert not torch.equal(models[0]["score.weight"], models[1]["score.weight"])  # other batches, another rate
    evaluation = Preferences(data=["held-out.jsonl"], batch_size=256)
    for place in ("learnt-mean", "learnt/reward-0-from-step-10", "learnt/reward-1-from-step-10"):
        assert score(open_checkpoint(trajectory / place), evaluation).metrics["accuracy"] > 0.7


def test_heads_of_other_shapes_are_refused(tmp_path):
    for labels in (1, 2):
        base_model(0, labels).save_pretrained(tmp_path / f"m{labels}")
    with pytest.raises(IncompatibleSources, match=r"has the shape \[1, 32\] in .*m1 and \[2, 32\] in .*m2"):
        plan({"method": "warm", "models": [str(tmp_path / "m1"), str(tmp_path / "m2")]})

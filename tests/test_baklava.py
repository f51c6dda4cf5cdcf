"""Which reward model starts from what: Baklava's protocol, in lists and in folders."""

import json
from pathlib import Path

import numpy as np
import pytest

from merger.baklava import Baklava
from merger.errors import IncompatibleSources, RecipeError, SourceError
from merger.fine_tuning import models_of, orders_of
from merger.methods.soups import Warm
from merger.recipe import make_document
from merger.run import Options, plan_of
from merger.sources import LocalSources
from tests.checkpoints import write_model

RULE = {"checkpoints": "sft/step-*", "data": "pairs.jsonl", "folder": "work", "runs": 5}
POOL = ["sft/step-9", "sft/step-10", "sft/step-100"]


def training(**fields):
    return Baklava.model_validate({**RULE, **fields})


def plan(**fields):
    return plan_of(make_document({"method": "warm", "training": {**RULE, **fields}}), Options())[0]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A supervised run of three checkpoints, and preferences."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(POOL):
        write_model(tmp_path / name, {"w": np.full(3, i, np.float32)}, {"model_type": "llama"})
    (tmp_path / "pairs.jsonl").write_text('{"chosen": [5], "rejected": [6]}\n')
    return tmp_path


def test_run_s_starts_from_the_pool_at_s_modulo_its_size_with_the_head_of_the_last():
    stages = training().stages(POOL, with_head=True)
    assert [(stage.name, *stage.bodies, stage.head) for stage in stages] == [
        ("reward-head", ("sft/step-100", 1.0), None),
        ("reward-0-from-step-9", ("sft/step-9", 1.0), "reward-head"),
        ("reward-1-from-step-10", ("sft/step-10", 1.0), "reward-head"),
        ("reward-2-from-step-100", ("sft/step-100", 1.0), "reward-head"),
        ("reward-3-from-step-9", ("sft/step-9", 1.0), "reward-head"),
        ("reward-4-from-step-10", ("sft/step-10", 1.0), "reward-head"),
    ]
    assert {stage.task for stage in stages} == {"preferences"}


def test_the_head_is_trained_alone_once_and_each_run_trains_all_of_its_model():
    head, *rewards = training(steps=300, probe_steps=100).stages(POOL, with_head=True)
    assert (head.steps, head.head_steps) == (100, 100)
    assert {(stage.steps, stage.head_steps) for stage in rewards} == {(300, 0)}


def test_runs_draw_settings_and_differ():
    first, same, other = (training(seed=seed, runs=12).stages(POOL, with_head=True) for seed in (0, 0, 1))
    assert first == same != other
    assert {stage.learning_rate for stage in first[1:]} == {1e-5, 3e-5, 5e-5}
    assert {stage.dropout for stage in first[1:]} == {0.0, 0.1, 0.5}
    assert len({stage.seed for stage in first[1:]}) == 12


def test_the_pool_is_in_natural_order_and_a_list_in_its_own(place):
    sources = LocalSources()
    assert Warm(training=training()).starts(sources) == POOL
    assert Warm(training=training(checkpoints=POOL[::-1])).starts(sources) == POOL[::-1]


def test_a_stage_is_what_it_follows_from(place):
    def keys():
        return {order.stage.name: order.key for order in orders_of(training(), POOL, LocalSources())}

    first = keys()
    assert keys() == first
    write_model(place / "sft/step-10", {"w": np.full(3, 7, np.float32)}, {"model_type": "llama", "x": 1})
    changed = {name for name, key in keys().items() if key != first[name]}
    assert changed == {"reward-1-from-step-10", "reward-4-from-step-10"}
    write_model(place / "sft/step-100", {"w": np.full(3, 7, np.float32)}, {"model_type": "llama", "x": 1})
    assert {name for name, key in keys().items() if key != first[name]} == first.keys()  # all have its head


def test_only_the_reward_models_are_averaged(place):
    auxiliary, rewards = models_of(training(runs=2), orders_of(training(runs=2), POOL, LocalSources()))
    assert auxiliary == []
    assert rewards == [str(Path("work") / name) for name in ("reward-0-from-step-9", "reward-1-from-step-10")]


# ---- what is said and refused in the plan -------------------------------------------------------------


def test_the_plan_says_what_will_be_trained(place):
    [note] = plan(runs=3).checkpoint.notes
    assert note == "3 reward models will be trained first, from 3 checkpoints, and averaged"
    [note] = plan(runs=2).checkpoint.notes
    assert note.endswith("from 2 checkpoints, and averaged; the other 1 start none: `runs` is smaller")


def test_checkpoints_and_data_that_are_not_there_are_refused(place):
    with pytest.raises(SourceError, match=r"missing\.jsonl: is not there"):
        plan(data="missing.jsonl")
    with pytest.raises(SourceError, match="matches no folder"):
        plan(checkpoints="sft/epoch-*")
    with pytest.raises(SourceError, match="names no checkpoint"):
        plan(checkpoints=[])


def test_checkpoints_of_another_run_are_refused(place):
    write_model(place / "sft/step-11", {"w": np.ones(4, np.float32)}, {"model_type": "llama"})
    with pytest.raises(IncompatibleSources, match=r"step-11"):
        plan()


def test_unknown_tasks_and_those_without_a_reward_are_refused(place):
    with pytest.raises(RecipeError, match=r"training\.task: 'preference' is no task to train on; did you mean 'pref"):
        plan(task="preference")
    with pytest.raises(RecipeError, match=r"training\.task: a language model has no head that gives a reward"):
        plan(task="text")
    with pytest.raises(RecipeError, match="trains no head that could give a reward"):
        training().stages(POOL, with_head=False)


def test_models_and_data_are_not_mixed():
    for fields in ({}, {"models": ["a"], "training": RULE}):
        with pytest.raises(RecipeError, match="either `models` or `training`"):
            make_document({"method": "warm", **fields})
    with pytest.raises(RecipeError, match=r"training\.checkpoint: is not a field; did you mean 'checkpoints'"):
        make_document({"method": "warm", "training": {**RULE, "checkpoint": 3}})
    with pytest.raises(RecipeError, match=r"training\.checkpoints\[1\]: input should be a valid string"):
        make_document({"method": "warm", "training": {**RULE, "checkpoints": ["a", 3]}})


def test_a_recipe_survives_being_written_down():
    recipe = {"method": "warm", "training": RULE}
    document = make_document(recipe)
    assert make_document(json.loads(json.dumps(document.dump()))) == document

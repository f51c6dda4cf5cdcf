"""Which fine-tuning starts from what: the protocol of Model Ratatouille, and the order in which stages are trained."""

import hashlib
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from merger.errors import JobError, RecipeError, SourceError
from merger.fine_tuning import Order, in_order, models_of, needs, orders_of
from merger.recipe import make_document
from merger.recycling import Recycling
from merger.run import Options, plan_of
from merger.sources import LocalSources
from merger.stages import FINISHED
from tests.checkpoints import write_model

TARGETS = [f"target-{i}-from-{start}" for i, start in enumerate(["base", "a", "b", "base", "a"])]
RULE = {"task": "classification", "target": "target.jsonl", "folder": "work", "steps": 300, "probe_steps": 100}


def training(**fields):
    return Recycling.model_validate({**RULE, "auxiliary": {"a": "a.jsonl", "b": "b.jsonl"}, "runs": 5, **fields})


def test_run_s_starts_from_the_pool_at_s_modulo_its_size():
    stages = training().stages(["base"], with_head=True)
    assert [(stage.name, *stage.bodies[0], stage.head) for stage in stages] == [
        ("auxiliary-a-head", "base", 1.0, None),
        ("auxiliary-a", "base", 1.0, "auxiliary-a-head"),
        ("auxiliary-b-head", "base", 1.0, None),
        ("auxiliary-b", "base", 1.0, "auxiliary-b-head"),
        ("target-head", "base", 1.0, None),
        ("target-0-from-base", "base", 1.0, "target-head"),
        ("target-1-from-a", "auxiliary-a", 1.0, "target-head"),
        ("target-2-from-b", "auxiliary-b", 1.0, "target-head"),
        ("target-3-from-base", "base", 1.0, "target-head"),
        ("target-4-from-a", "auxiliary-a", 1.0, "target-head"),
    ]


def test_heads_are_trained_alone_first_and_a_little_more_on_auxiliary_bodies():
    stages = {stage.name: stage for stage in training(extra_head_steps=20).stages(["base"], with_head=True)}
    assert (stages["target-head"].steps, stages["target-head"].head_steps) == (100, 100)
    assert (stages["auxiliary-a"].steps, stages["auxiliary-a"].head_steps) == (300, 0)
    assert (stages["target-0-from-base"].steps, stages["target-0-from-base"].head_steps) == (300, 0)
    assert (stages["target-1-from-a"].steps, stages["target-1-from-a"].head_steps) == (320, 20)


def test_without_auxiliary_tasks_every_run_starts_from_the_base():
    stages = training(auxiliary={}).stages(["base"], with_head=True)
    assert [stage.bodies for stage in stages] == [(("base", 1.0),)] * 6


def test_fused_runs_begin_with_a_mean_of_the_whole_pool():
    stages = [
        stage for stage in training(start="fused").stages(["base"], with_head=True) if stage.name.endswith("-from-all")
    ]
    for stage in stages:
        names, weights = zip(*stage.bodies, strict=True)
        assert names == ("base", "auxiliary-a", "auxiliary-b")
        assert sum(weights) == pytest.approx(1)
        assert max(weights) / min(weights) <= np.exp(4)
        assert stage.head_steps == 20
    assert len({stage.bodies for stage in stages}) == 5


def test_a_language_model_has_no_head_to_train():
    stages = training(task="text").stages(["base"], with_head=False)
    assert [stage.name for stage in stages] == ["auxiliary-a", "auxiliary-b", *TARGETS]
    assert {stage.head_steps for stage in stages} == {0}


def test_settings_are_drawn_from_the_seed_and_runs_differ():
    first, same, other = (training(seed=seed, runs=12).stages(["base"], with_head=True) for seed in (0, 0, 1))
    assert first == same
    targets = [stage for stage in first if stage.name.startswith("target-") and stage.name != "target-head"]
    assert {stage.learning_rate for stage in targets} == {1e-5, 3e-5, 5e-5}
    assert {stage.dropout for stage in targets} == {0.0, 0.1, 0.5}
    assert len({stage.seed for stage in targets}) == 12
    assert first != other


# ---- in folders ---------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "base", {"w": np.ones(3, np.float32)}, {"model_type": "llama"})
    for name in ("a", "b", "target"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x", "label": 0}\n{"text": "y", "label": 1}')
    return tmp_path


def finish(order):
    order.folder.mkdir(parents=True)
    (order.folder / FINISHED).write_text(json.dumps({"key": order.key}))


def test_a_stage_is_what_it_follows_from(place):
    first = orders_of(training(), ["base"], LocalSources())
    assert [order.key for order in orders_of(training(), ["base"], LocalSources())] == [order.key for order in first]
    (place / "b.jsonl").write_text('{"text": "z", "label": 0}\n{"text": "y", "label": 1}')
    changed = {
        order.stage.name
        for order, old in zip(orders_of(training(), ["base"], LocalSources()), first, strict=True)
        if order.key != old.key
    }
    assert changed == {"auxiliary-b-head", "auxiliary-b", "target-2-from-b"}


def test_the_digest_of_a_ready_task_is_that_of_settings_data_and_parents(place):
    """What it was made of before tasks could be installed: finished stages of then are finished still."""
    recipe = training(
        runs=1, auxiliary={}, keep_seconds=1.0, learning_rates=[1e-5], weight_decays=[0.0], dropouts=[0.5]
    )
    head, target = recipe.stages(["base"], with_head=True)
    content = {
        "name": "target-0-from-base",
        "bodies": [["digest of the base", 1.0]],
        "head": "digest of the head",
        "task": "classification",
        "data": hashlib.sha256((place / "target.jsonl").read_bytes()).hexdigest(),
        "labels": [],
        **{"steps": 300, "head_steps": 0, "learning_rate": 1e-5, "weight_decay": 0.0, "dropout": 0.5},
        **{"batch_size": 32, "context": 128, "seed": 0},
    }
    wanted = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert target.key({"base": "digest of the base", head.name: "digest of the head"}) == wanted


def test_stages_are_trained_after_those_that_they_need_and_finished_ones_are_not(place):
    orders = orders_of(training(), ["base"], LocalSources())
    finish(orders[0])
    trained, lock = [str(orders[0].folder)], threading.Lock()

    def train(order, _stopped):
        with lock:
            assert needs(order) <= {*trained, "base"}
        finish(order)
        with lock:
            trained.append(str(order.folder))

    in_order(orders, train, 4)
    assert sorted(trained) == sorted(str(order.folder) for order in orders)
    assert len(trained) == len(set(trained))
    in_order(orders, None, 4)  # nothing is left


def test_the_first_failure_stops_the_others(place):
    orders = orders_of(training(), ["base"], LocalSources())

    def train(order: Order, stopped: threading.Event):
        if order.stage.name == "target-head":
            raise JobError("out of luck")
        assert stopped.wait(30)

    with pytest.raises(JobError, match="out of luck"):
        in_order(orders, train, 4)


def test_the_models_are_those_that_the_recipe_averages(place):
    orders = orders_of(training(), ["base"], LocalSources())
    auxiliary, targets = models_of(training(), orders)
    assert auxiliary == [str(Path("work") / name) for name in ("auxiliary-a", "auxiliary-b")]
    assert targets == [str(Path("work") / name) for name in TARGETS]


def test_data_that_are_not_there_are_refused_in_the_plan(place):
    recipe = {"method": "ratatouille", "base": "base", "training": {**RULE, "auxiliary": {"x": "missing.jsonl"}}}
    with pytest.raises(SourceError, match=r"missing\.jsonl: is not there"):
        plan_of(make_document(recipe), Options())


def test_models_and_data_are_not_mixed():
    recipe = {"method": "ratatouille", "base": "base"}
    for fields in ({}, {"targets": ["a"], "training": RULE}):
        with pytest.raises(RecipeError, match="either `targets`, models, or `training`"):
            make_document({**recipe, **fields})
    with pytest.raises(RecipeError, match="makes the auxiliary models itself"):
        make_document({**recipe, "auxiliary": ["a"], "training": RULE})
    with pytest.raises(RecipeError, match=r"training\.step: is not a field; did you mean 'steps'"):
        make_document({**recipe, "training": {**RULE, "step": 3}})

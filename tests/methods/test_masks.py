"""Masks of tasks: against numpy's float64, and what must hold at the ends."""

import numpy as np
import pytest

from merger.errors import RecipeError
from tests.methods.making import make, plan
from tests.methods.test_spectral import NAMES, SHAPES, changes, models, near, recipe, values

__all__ = ["models"]


@pytest.mark.parametrize(("k", "spread", "scale"), [(2, 0.4, 1.0), (1, 1.0, 0.3), (3, 0.2, 1.0)])
def test_the_consensus_of_tasks(models, tmp_path, k, spread, scale):
    make(recipe(models, "consensus_ta", k=k, spread=spread, scale=scale), tmp_path / "out")
    found, tasks = changes(models, tmp_path / "out")
    for name in SHAPES:
        total = sum(tasks[name])
        votes = sum(np.abs(task) >= spread * np.abs(total - task) for task in tasks[name])
        near(found[name], scale * np.where(votes >= k, total, 0.0))
        assert 0 < (votes >= k).mean() < 1 or SHAPES[name] == (12,)


def test_with_no_votes_needed_it_is_task_arithmetic(models, tmp_path):
    make(recipe(models, "consensus_ta", k=0, scale=0.4), tmp_path / "masked")
    make(recipe(models, "task_arithmetic", scale=0.4), tmp_path / "plain")
    for name, value in values(tmp_path / "plain").items():
        near(values(tmp_path / "masked")[name], value)


def test_with_more_votes_needed_than_there_are_it_is_the_base(models, tmp_path):
    make(recipe(models, "consensus_ta", k=4), tmp_path / "out")
    for name, value in values(models["base"]).items():
        assert np.array_equal(values(tmp_path / "out")[name], value)


def test_one_task_keeps_everything(models, tmp_path):
    make(recipe(models, "consensus_ta", 1, k=1, spread=1e6), tmp_path / "consensus")
    make(recipe(models, "tall_masks", 1, task=1, spread=1e6), tmp_path / "tall")
    for name, value in values(models["a"]).items():
        near(values(tmp_path / "consensus")[name], value)
        near(values(tmp_path / "tall")[name], value)


@pytest.mark.parametrize("task", [1, 3])
def test_a_task_is_found_in_the_sum_by_its_mask(models, tmp_path, task):
    make(recipe(models, "tall_masks", task=task), tmp_path / "out")
    found, tasks = changes(models, tmp_path / "out")
    for name in SHAPES:
        total, own = sum(tasks[name]), tasks[name][task - 1]
        near(found[name], np.where(np.abs(own) >= 0.4 * np.abs(total - own), total, 0.0))


def test_a_task_that_is_not_there_is_refused(models):
    with pytest.raises(RecipeError, match="is 4, of 3 models"):
        plan(recipe(models, "tall_masks", task=4))
    assert len(NAMES) == 4

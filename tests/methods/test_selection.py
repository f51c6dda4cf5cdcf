"""Which models a soup keeps and how much they count: the rules of the paper, by scores that the test makes up."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger.evaluation import Classification, Score, Text
from merger.methods import selection
from merger.methods.method import Judge
from merger.methods.selection import learned
from merger.methods.soups import Soup
from tests.judges import Table, table

TEXT = Text(data=["held-out.txt"])
ACCURACY = Classification(data=["held-out.jsonl"])


def mean(models, weights):
    return Soup(models=list(models), weights=weights)


def greedy(models, evaluation, judge):
    kept, weights, choice = selection.greedy(models, mean, evaluation, judge)
    assert weights is None
    return kept, choice


def test_models_are_tried_from_the_best_on_and_kept_where_the_mean_is_no_worse():
    judge = table(a=3.0, b=1.0, c=2.0, bc=0.9, abc=0.95)
    kept, choice = greedy(["a", "b", "c"], TEXT, judge)
    assert kept == ["b", "c"]
    assert [(step.name, step.taken) for step in choice.steps] == [("b", True), ("+ c", True), ("+ a", False)]
    assert [row.metrics["loss"] for row in choice.alone] == [3.0, 1.0, 2.0]


def test_an_equal_score_is_accepted():
    assert greedy(["a", "b"], TEXT, table(a=1.0, b=2.0, ab=1.0))[0] == ["a", "b"]


def test_more_accuracy_is_better():
    judge = table("accuracy", a=0.6, b=0.7, ab=0.65)
    kept, choice = greedy(["a", "b"], ACCURACY, judge)
    assert (kept, choice.metric) == (["b"], "accuracy")


def test_equal_models_are_tried_in_the_order_of_the_recipe():
    judge = table(a=1.0, b=1.0, c=1.0, ab=0.9, abc=0.95)
    assert greedy(["a", "b", "c"], TEXT, judge)[0] == ["a", "b"]


MODELS = "abcd"
SUBSETS = [frozenset(s) for n in range(1, 5) for s in itertools.combinations(MODELS, n)]


@given(st.fixed_dictionaries({subset: st.integers(0, 5).map(float) for subset in SUBSETS}))
def test_no_greedy_soup_is_worse_than_its_best_ingredient_and_no_candidate_is_asked_twice(values):
    judge = Table("loss", values)
    kept, _ = greedy(list(MODELS), TEXT, judge)
    assert values[frozenset(kept)] <= min(values[frozenset(model)] for model in MODELS)
    assert kept == sorted(kept)
    assert len(judge.asked) == len({frozenset(models) for models in judge.asked}) == 2 * len(MODELS) - 1


# ---- learned ------------------------------------------------------------------------------------------


class Bowl(Judge):
    """A loss of |theta - best|^2 over the means of made up models, with its slopes."""

    def __init__(self, models, best):
        self.models, self.best, self.asked = models, np.array(best), []

    def score(self, candidate, evaluation, key=None, along=()):
        names = [candidate] if isinstance(candidate, str) else candidate.models
        weights = [1.0] if isinstance(candidate, str) else candidate.weights
        theta = sum(w * np.array(self.models[name]) for w, name in zip(weights, names, strict=True))
        gradient = 2 * (theta - self.best)
        loss = float((theta - self.best) @ (theta - self.best))
        self.asked.append(tuple(weights))
        return Score({"loss": loss}, "tokens", (loss,), (1.0,), tuple(float(gradient @ self.models[m]) for m in along))


CORNERS = {"a": [0.0, 0.0], "b": [1.0, 0.0], "c": [0.0, 1.0]}


def test_descent_finds_the_weights_of_the_best_mean():
    kept, weights, choice = learned(list(CORNERS), mean, TEXT, Bowl(CORNERS, [0.2, 0.5]), 150)
    assert kept == ["a", "b", "c"]
    assert weights == pytest.approx([0.3, 0.2, 0.5], abs=0.01)
    assert choice.title == "learned soup"
    assert choice.steps[0].name == "weights 0.333 0.333 0.333"
    assert [step.taken for step in choice.steps].count(True) == len(choice.taken) == 1


def test_the_first_step_is_as_long_whatever_the_size_of_the_loss():
    judges = [Bowl(CORNERS, [0.2, 0.5]), Bowl({k: [1000 * x for x in v] for k, v in CORNERS.items()}, [200, 500])]
    for judge in judges:
        learned(list(CORNERS), mean, TEXT, judge, 5)
    assert judges[0].asked == judges[1].asked


def test_a_model_that_is_better_alone_stays_alone():
    kept, weights, choice = learned(list(CORNERS), mean, TEXT, Bowl(CORNERS, [1.0, 0.0]), 5)
    assert (kept, weights) == (["b"], None)
    assert [step.name for step in choice.taken] == ["b"]


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=2), st.integers(1, 12))
def test_no_learned_soup_is_worse_than_equal_weights_or_than_one_model(best, steps):
    judge = Bowl(CORNERS, best)
    kept, weights, _ = learned(list(CORNERS), mean, TEXT, judge, steps)
    loss = judge.score(mean(kept, weights or [1.0]), TEXT).metrics["loss"]
    others = [*CORNERS, mean(list(CORNERS), [1 / 3] * 3)]
    assert loss <= min(judge.score(other, TEXT).metrics["loss"] for other in others) + 1e-5


def test_weights_are_chosen_by_the_metric_and_not_by_the_loss():
    class Odd(Bowl):
        def score(self, candidate, evaluation, key=None, along=()):
            found = super().score(candidate, evaluation, key, along)
            return Score({"accuracy": found.metrics["loss"], **found.metrics}, "", (), (), found.slopes)

    _, weights, choice = learned(list(CORNERS), mean, ACCURACY, Odd(CORNERS, [0.4, 0.4]), 30)
    assert choice.metric == "accuracy"
    best = max((*choice.steps, *choice.alone), key=lambda tried: tried.metrics["accuracy"])
    assert best.taken
    assert weights is None

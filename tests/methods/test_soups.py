"""Which models a greedy soup keeps: the rule of the paper, by scores that the test makes up."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger.errors import RecipeError
from merger.evaluation import Classification, Score, Text
from merger.methods.averaging import Lawa
from merger.methods.method import Judge, Means, Trainer, all_evaluations, settled
from merger.methods.soups import Ratatouille, Soup, greedy
from merger.recipe import make_document
from merger.sources import LocalSources

TEXT = Text(data=["held-out.txt"])
ACCURACY = Classification(data=["held-out.jsonl"])


class Table(Judge):
    """Scores by the models that a candidate is the mean of; counts what it was asked for."""

    def __init__(self, metric, values):
        self.metric, self.values, self.asked = metric, values, []

    def score(self, candidate, evaluation, key=None):
        models = (candidate,) if isinstance(candidate, str) else tuple(candidate.models)
        self.asked.append(models)
        value = self.values[frozenset(models)]
        return Score({self.metric: value}, "tokens", (value,), (1.0,))


def table(metric="loss", **values):
    return Table(metric, {frozenset(models): value for models, value in values.items()})


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


# ---- in recipes ---------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    return {name: str(tmp_path / name) for name in "abc"}


class NoTrainer(Trainer):
    def trained(self, training, base):
        raise AssertionError("nothing is to be trained")


def means(judge):
    return Means(LocalSources(), judge, NoTrainer())


def named(folders, **values):
    return Table("loss", {frozenset(folders[name] for name in key): value for key, value in values.items()})


def test_a_settled_soup_is_the_plain_mean_of_what_was_chosen(folders):
    judge = named(folders, a=1.0, b=2.0, c=3.0, ab=0.5, abc=1.0)
    soup = Soup(models=list(folders.values()), selection="greedy", select_on=TEXT)
    recipe, [choice] = settled(soup, means(judge))
    assert recipe == Soup(models=[folders["a"], folders["b"]])
    assert choice.title == "greedy soup"


def test_a_pattern_is_opened_before_it_is_chosen_from(folders, tmp_path):
    judge = named(folders, a=1.0, b=2.0, c=3.0, ab=1.5, ac=1.5)
    recipe, _ = settled(Soup(models=f"{tmp_path}/*", selection="greedy", select_on=TEXT), means(judge))
    assert recipe == Soup(models=[folders["a"]])


def test_recipes_within_a_recipe_are_settled_first(folders):
    judge = named(folders, a=1.0, b=2.0, c=3.0, ab=1.5, ac=0.5)
    inner = Soup(models=list(folders.values()), selection="greedy", select_on=TEXT)
    outer = Lawa(checkpoints=[folders["b"], inner], k=2)
    assert list(all_evaluations(outer)) == [TEXT]
    recipe, choices = settled(outer, means(judge))
    assert recipe == Lawa(checkpoints=[folders["b"], Soup(models=[folders["a"], folders["c"]])], k=2)
    assert len(choices) == 1


def test_ratatouille_chooses_among_its_targets(folders):
    judge = named(folders, b=1.0, c=3.0, bc=2.0)
    recipe, _ = settled(
        Ratatouille(base=folders["a"], targets=[folders["b"], folders["c"]], selection="greedy", select_on=TEXT),
        means(judge),
    )
    assert recipe == Ratatouille(base=folders["a"], targets=[folders["b"]])


def test_a_recipe_without_choices_is_left_as_it_is(folders):
    soup = Soup(models=list(folders.values()))
    assert settled(soup, means(table())) == (soup, ())


def test_greedy_without_data_to_choose_by_is_refused():
    with pytest.raises(RecipeError, match="chooses by a score: say in `select_on` by which"):
        make_document({"method": "soup", "models": ["a", "b"], "selection": "greedy"})


def test_what_is_required_of_the_result_is_not_said_where_models_are_chosen():
    chooser = {"task": "text", "data": "a.txt", "require": {"loss": "< 1"}}
    with pytest.raises(RecipeError, match=r"select_on: `require` and `better_than` are said of the result"):
        make_document({"method": "soup", "models": ["a", "b"], "selection": "greedy", "select_on": chooser})

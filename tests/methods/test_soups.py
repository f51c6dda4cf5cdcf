"""Soups in recipes: what is chosen is settled before the plan, and what cannot be is refused."""

from dataclasses import replace

import numpy as np
import pytest

from merger.errors import RecipeError
from merger.evaluation import Text
from merger.methods.averaging import Lawa
from merger.methods.method import Means, Trainer, all_evaluations, settled
from merger.methods.soups import Ratatouille, Soup
from merger.recipe import make_document
from merger.sources import LocalSources
from tests.checkpoints import write_model
from tests.judges import Table, table

TEXT = Text(data=["held-out.txt"])


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


# ---- weights ------------------------------------------------------------------------------------------


def test_a_learned_soup_is_settled_to_its_weights(folders):
    class Slope(Table):
        def score(self, candidate, evaluation, key=None, along=()):
            found = super().score(candidate, evaluation, key)
            return replace(found, slopes=(0.0, 1.0) if along else ())

    judge = Slope("loss", {frozenset([folders["a"]]): 2.0, frozenset([folders["b"]]): 3.0})
    judge.values[frozenset([folders["a"], folders["b"]])] = 1.0
    soup = Soup(models=[folders["a"], folders["b"]], selection="learned", select_on=TEXT, learning_steps=3)
    recipe, [choice] = settled(soup, means(judge))
    assert recipe == Soup(models=soup.models, weights=[0.5, 0.5], learning_steps=3)
    assert choice.steps[1].name == "weights 0.550 0.450"  # Adam's first step is its rate, whatever the slope


def test_weights_count_by_their_share(tmp_path):
    for i, value in enumerate([0.0, 4.0]):
        write_model(tmp_path / f"m{i}", {"w": ("F32", (1,), np.float32(value).tobytes())})
    models = [str(tmp_path / "m0"), str(tmp_path / "m1")]
    made = Soup(models=models, weights=[3.0, 1.0]).build(LocalSources())
    assert [part.weight for part in made.parts] == [0.75, 0.25]
    with pytest.raises(RecipeError, match="weights: are 1 for 2 models"):
        Soup(models=models, weights=[1.0]).build(LocalSources())


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (
            {"selection": "learned", "select_on": {"task": "text", "data": "a"}, "weights": [1, 1]},
            "leave `weights` out",
        ),
        ({"weights": [0, 0]}, "all `weights` are zero"),
        ({"weights": [1, -1]}, "greater than or equal to 0"),
        (
            {"selection": "learned", "select_on": {"task": "harness", "tasks": ["arc"], "metric": "arc/acc"}},
            "follows the gradient of a loss",
        ),
    ],
)
def test_weights_and_learning_that_make_no_sense_are_refused(more, complaint):
    with pytest.raises(RecipeError, match=complaint):
        make_document({"method": "soup", "models": ["a", "b"], **more})

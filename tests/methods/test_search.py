"""Search over a recipe's numbers, by scores that the test makes up."""

import pytest

from merger.errors import RecipeError
from merger.evaluation import Classification, Score, Text
from merger.methods.fine_tunes import TaskArithmetic, Weighted, WiseFt
from merger.methods.method import Judge, Means, settled
from merger.methods.search import Search
from merger.recipe import make_document
from merger.sources import LocalSources
from tests.methods.test_soups import NoTrainer

TEXT = Text(data=["held-out.txt"])
PAIR = TaskArithmetic(base="base", models=["a", Weighted(source="b", weight=0.5)], scale=1.0)


class Bowl(Judge):
    """Scores by a formula of the candidate; keeps what it was asked for."""

    def __init__(self, formula, metric="loss"):
        self.formula, self.metric, self.asked = formula, metric, []

    def score(self, candidate, evaluation, key=None, along=()):
        self.asked.append(candidate)
        value = self.formula(candidate)
        return Score({self.metric: value}, "tokens", (value,), (1.0,))


def search(recipe, judge):
    made, [choice] = settled(recipe, Means(LocalSources(), judge, NoTrainer()))
    return made, choice


def distance(candidate):
    return (candidate.scale - 0.3) ** 2 + (candidate.models[1].weight - 0.8) ** 2


def test_two_numbers_are_found_by_evolution():
    judge = Bowl(distance)
    recipe = Search(
        recipe=PAIR, parameters={"scale": (0.0, 1.0), "models[1].weight": (0.0, 1.0)}, select_on=TEXT, budget=120
    )
    made, choice = search(recipe, judge)
    assert distance(made) < 1e-3
    assert len(judge.asked) == 120
    assert judge.asked[0] == PAIR  # the recipe as it stands comes first
    assert [row.name for row in choice.taken] == [f"scale {made.scale:g}, models[1].weight {made.models[1].weight:g}"]
    assert all(0 <= one.scale <= 1 and 0 <= one.models[1].weight <= 1 for one in judge.asked)
    assert made.models[0] == "a"


def test_the_same_seed_asks_for_the_same_candidates():
    fields = {"recipe": PAIR, "select_on": TEXT, "budget": 30}
    parameters = {"scale": (0.0, 1.0), "models[1].weight": (0.0, 1.0)}
    asked = []
    for seed in (0, 0, 1):
        judge = Bowl(distance)
        search(Search(**fields, parameters=parameters, seed=seed), judge)
        asked.append(judge.asked)
    assert asked[0] == asked[1] != asked[2]


def test_one_number_is_searched_on_an_even_grid():
    judge = Bowl(lambda candidate: -abs(candidate.alpha - 0.7), "accuracy")
    recipe = Search(
        recipe=WiseFt(base="base", fine_tuned="a", alpha=0.5),
        parameters={"alpha": (0.0, 1.0)},
        select_on=Classification(data=["rows.jsonl"]),
        budget=12,
    )
    made, _ = search(recipe, judge)
    assert made.alpha == 0.7
    assert [one.alpha for one in judge.asked] == [0.5, *(round(0.1 * i, 6) for i in range(11))]


def test_what_is_not_better_leaves_the_recipe_as_it_stands():
    made, choice = search(
        Search(recipe=PAIR, parameters={"scale": (0.0, 1.0)}, select_on=TEXT, budget=5), Bowl(lambda _: 1.0)
    )
    assert made == PAIR
    assert choice.taken == choice.alone


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"parameters": {"sale": [0, 1]}}, "'sale' does not lead to a number of the recipe"),
        ({"parameters": {"models[0].weight": [0, 1]}}, r"'models\[0\]\.weight' does not lead to a number"),
        ({"parameters": {"scale": [1, 1]}}, "between 1 and 1: the first must be the smaller"),
        ({"parameters": {}}, "at least 1"),
        ({"budget": 1}, "greater than or equal to 2"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused(change, complaint):
    recipe = {"method": "task_arithmetic", "base": "base", "models": ["a"], "scale": 1.0}
    content = {"method": "search", "recipe": recipe, "parameters": {"scale": [0, 1]}}
    with pytest.raises(RecipeError, match=complaint):
        make_document({**content, "select_on": {"task": "text", "data": "x"}, **change})


def test_a_search_over_a_recipe_with_choices_is_refused():
    inner = {"method": "soup", "models": ["a", "b"], "selection": "greedy", "select_on": {"task": "text", "data": "x"}}
    content = {"method": "search", "recipe": inner, "parameters": {"k": [0, 1]}}
    with pytest.raises(RecipeError, match="has choices of its own to make"):
        make_document({**content, "select_on": {"task": "text", "data": "x"}})

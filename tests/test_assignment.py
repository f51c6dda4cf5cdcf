"""The assignment problem, against every permutation and against scipy."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

from merger.assignment import assignment, within_groups


def cost(costs, order):
    return sum(costs[place, thing] for place, thing in enumerate(order))


@given(st.integers(1, 5).flatmap(lambda n: arrays(np.float64, (n, n), elements=st.integers(-9, 9))))
def test_no_permutation_costs_less(costs):
    order = assignment(costs)
    assert sorted(order) == list(range(len(costs)))
    assert cost(costs, order) == min(cost(costs, other) for other in permutations(range(len(costs))))


@pytest.mark.parametrize("count", [1, 2, 17, 128])
def test_scipy_finds_the_same(count):
    costs = np.random.default_rng(count).normal(size=(count, count))
    assert assignment(costs) == linear_sum_assignment(costs)[1].tolist()  # the only one, as no costs are equal


@given(st.integers(1, 8))
def test_where_all_costs_are_equal_everything_stays(count):
    assert assignment(np.full((count, count), 3.0)) == list(range(count))


def test_costs_that_are_no_numbers_or_no_square():
    for costs in (np.array([[1.0, np.nan], [0.0, 1.0]]), np.ones((2, 3))):
        with pytest.raises(ValueError, match="not finite numbers in a square"):
            assignment(costs)


@pytest.mark.parametrize(("count", "groups"), [(6, 1), (6, 2), (6, 3), (6, 6), (4, 2)])
def test_groups_stay_together(count, groups):
    costs = np.random.default_rng(groups).normal(size=(count, count))
    order, size = within_groups(costs, groups), count // groups
    allowed = [
        other
        for other in permutations(range(count))
        if all(len({thing // size for thing in other[i : i + size]}) == 1 for i in range(0, count, size))
    ]
    assert cost(costs, order) == pytest.approx(min(cost(costs, other) for other in allowed))
    assert tuple(order) in allowed
    with pytest.raises(ValueError, match="are no 4 groups"):
        within_groups(np.ones((6, 6)), 4)

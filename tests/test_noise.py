"""Random numbers against numpy's Philox and the standard library's inverse normal distribution."""

import math
import statistics
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger.noise import choose, key_of, normal, uniform

KEY = key_of(7, "model.layers.0.mlp.gate.weight")
NUMBERS = normal(KEY, 0, 1 << 20).view(np.float64)


NORMAL = statistics.NormalDist().inv_cdf


def expected(key: tuple[int, int], start: int, count: int, inverse: Callable[[float], float] = NORMAL) -> list[float]:
    """The same from numpy's generator and the standard library's distribution."""
    first = start // 4
    words = (first - 1) % (1 << 256)  # numpy counts up before it draws
    counter = np.array([(words >> (64 * i)) & (2**64 - 1) for i in range(4)], np.uint64)
    generator = np.random.Philox(key=np.array(key, np.uint64), counter=counter)
    bits = generator.random_raw(4 * (count // 4 + 2))[start % 4 :][:count]
    return [inverse((float(word >> np.uint64(11)) + 0.5) * 2.0**-53) for word in bits]


@pytest.mark.parametrize("start", [0, 1, 3, 4, 1001, (1 << 40) + 2])
def test_numbers_are_those_of_philox_through_the_inverse_distribution(start: int) -> None:
    made = normal(KEY, start, 500).view(np.float64)
    np.testing.assert_allclose(made, expected(KEY, start, 500), rtol=2e-14, atol=1e-15)


@pytest.mark.parametrize("start", [0, 3, 1001])
def test_uniform_numbers_lie_between_minus_one_and_one(start: int) -> None:
    made = uniform(KEY, start, 500).view(np.float64)
    assert np.array_equal(made, expected(KEY, start, 500, lambda share: 2 * share - 1))
    assert -1 < made.min() < -0.95 < 0.95 < made.max() < 1


@given(st.integers(0, 5000), st.integers(0, 5000))
def test_any_part_is_a_part_of_the_whole(a: int, b: int) -> None:
    first, last = sorted((a, b))
    assert np.array_equal(normal(KEY, first, last - first).view(np.float64), NUMBERS[first:last])


def test_they_are_normal() -> None:
    count = NUMBERS.size
    assert abs(NUMBERS.mean()) < 5 / math.sqrt(count)
    assert abs(NUMBERS.std() - 1) < 5 / math.sqrt(2 * count)
    assert abs((NUMBERS**4).mean() - 3) < 5 * math.sqrt(96 / count)
    assert abs(np.mean(np.abs(NUMBERS) < 1) - math.erf(1 / math.sqrt(2))) < 5 * math.sqrt(0.25 / count)
    assert abs(NUMBERS).max() > 4.5


def test_far_tails_are_reached_and_finite() -> None:
    many = normal(KEY, 1 << 30, 1 << 23).view(np.float64)
    assert abs(many).max() > 5
    assert np.isfinite(many).all()


def test_keys_differ_by_seed_and_by_name() -> None:
    keys = {key_of(seed, name) for seed in range(20) for name in ("a", "b", "model.layers.0", "model.layers.1")}
    assert len(keys) == 80
    assert key_of(1, "2") != key_of(12, "")
    assert np.corrcoef(NUMBERS[:100_000], normal(key_of(8, "x"), 0, 100_000).view(np.float64))[0, 1] < 0.02


@pytest.mark.parametrize(("share", "count", "chosen"), [(0.0, 10, 0), (1.0, 10, 10), (0.5, 11, 5), (0.3, 1000, 300)])
def test_a_choice_is_exact(share: float, count: int, chosen: int) -> None:
    mask = choose(KEY, share, count)
    assert mask.sum() == chosen
    assert np.array_equal(mask, choose(KEY, share, count))
    assert not 0 < share < 1 or not np.array_equal(mask, choose(key_of(7, "other"), share, count))

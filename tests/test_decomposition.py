"""Triangular factors, singular values and products, against numpy in float64."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger.decomposition import absorb, multiply, svd, triangular


def matrix(seed, rows, columns, spread=0.0):
    return np.random.default_rng(seed).normal(size=(rows, columns)) * np.logspace(0, -spread, columns)


@pytest.mark.parametrize("spread", [0, 12])
@pytest.mark.parametrize("step", [1, 7, 100])
def test_a_triangular_factor_does_not_depend_on_how_rows_are_dealt_out_but_for_rounding(spread, step):
    tall = matrix(0, 100, 9, spread)
    tall[:, 4] = tall[:, 3]
    factor = triangular(9)
    for start in range(0, 100, step):
        factor = absorb(factor, tall[start : start + step].T)
    assert np.array_equal(factor, np.triu(factor))
    assert np.abs(factor.T @ factor - tall.T @ tall).max() < 1e-13 * np.abs(tall.T @ tall).max()
    wanted = np.linalg.qr(tall)[1]
    assert np.abs(np.abs(factor[:3]) - np.abs(wanted[:3])).max() < 1e-12


@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([0, 6, 14]), st.integers(0, 3))
def test_singular_values_and_vectors(seed, size, spread, lost):
    square = matrix(seed, size, size, spread)
    square[:, : min(lost, size - 1)] = square[:, -1:]  # of lower rank
    up, values, down = svd(square)
    scale = np.abs(square).max()
    assert np.abs(up.T * values @ down - square).max() <= 1e-13 * scale * size
    assert np.abs(values - np.linalg.svd(square, compute_uv=False)).max() <= 1e-13 * scale * size
    assert list(values) == sorted(values, reverse=True)
    kept = up[values > 0]
    assert np.abs(kept @ kept.T - np.eye(len(kept))).max() < 1e-10
    assert np.abs(down @ down.T - np.eye(size)).max() < 1e-12


@pytest.mark.parametrize("scale", [0.0, 1e-200, 1e200])
def test_no_square_leaves_the_range(scale):
    square = matrix(1, 5, 5) * scale
    _, values, _ = svd(square)
    assert np.allclose(values, np.linalg.svd(square, compute_uv=False), rtol=1e-12, atol=0)
    factor = absorb(triangular(5), square.T)
    assert np.allclose(np.abs(factor), np.abs(np.linalg.qr(square)[1]), rtol=1e-12, atol=0)


@given(st.integers(1, 6), st.integers(1, 9), st.sampled_from([1, 5, 2049]), st.data())
def test_any_range_of_a_product(height, rank, width, data):
    left, right = matrix(2, height, rank), matrix(3, rank, width)
    whole = multiply(left, right)
    assert np.abs(whole.reshape(height, width) - left @ right).max() < 1e-13 * rank * 10
    first = data.draw(st.integers(0, width - 1))
    count = data.draw(st.integers(1, height * width - first))
    assert np.array_equal(multiply(left, right, first, count), whole[first : first + count])

"""The regression mean, against least squares on the inputs themselves."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merger.regression import regression_mean, solution


def gram(inputs):
    return inputs.T @ inputs


def problem(seed, count=3, m=4, n=6, tokens=30):
    random = np.random.default_rng(seed)
    return [random.normal(size=(m, n)) for _ in range(count)], [
        random.normal(size=(tokens + i, n)) for i in range(count)
    ]


def merged(weights, grams, factors=None, alpha=1.0):
    count = len(weights)
    given = [*map(torch.tensor, weights), *(torch.tensor(g) for g in grams)]
    return regression_mean(lambda i: given[i].clone(), [1 / count] * count, factors or [1.0] * count, alpha).numpy()


@given(st.integers(0, 2**32), st.integers(1, 4))
def test_it_is_least_squares_on_all_inputs(seed, count):
    weights, inputs = problem(seed, count)
    wanted = np.linalg.lstsq(
        np.concatenate(inputs), np.concatenate([x @ w.T for x, w in zip(inputs, weights, strict=True)])
    )
    np.testing.assert_allclose(merged(weights, map(gram, inputs)), wanted[0].T, rtol=1e-7, atol=1e-9)


def test_two_regressions_come_to_that_on_the_data_of_both():
    random = np.random.default_rng(0)
    inputs, targets = [random.normal(size=(k, 3)) for k in (20, 50)], [random.normal(size=(k, 1)) for k in (20, 50)]
    fits = [np.linalg.lstsq(x, y)[0].T for x, y in zip(inputs, targets, strict=True)]
    pooled = np.linalg.lstsq(np.concatenate(inputs), np.concatenate(targets))[0].T
    np.testing.assert_allclose(merged(fits, map(gram, inputs)), pooled, rtol=1e-10)
    means = [gram(x) / len(x) for x in inputs]
    np.testing.assert_allclose(merged(fits, means, [20.0, 50.0]), pooled, rtol=1e-10)
    assert np.abs(merged(fits, means) - pooled).max() > 1e-3


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
def test_it_minimises_what_the_paper_minimises(alpha):
    weights, inputs = problem(1)
    scaled = [alpha * g + (1 - alpha) * np.diag(np.diag(g)) for g in map(gram, inputs)]
    found = merged(weights, map(gram, inputs), [1.0, 2.0, 0.5], alpha)
    slope = sum(f * (found - w) @ g for f, w, g in zip([1.0, 2.0, 0.5], weights, scaled, strict=True))
    assert np.abs(slope).max() < 1e-10


def test_without_what_is_off_the_diagonal_each_input_counts_for_itself():
    weights, inputs = problem(2)
    energies = [np.diag(gram(x)) for x in inputs]
    wanted = sum(w * e for w, e in zip(weights, energies, strict=True)) / sum(energies)
    np.testing.assert_allclose(merged(weights, map(gram, inputs), alpha=0.0), wanted, rtol=1e-12)


def test_equal_gram_matrices_make_the_mean_and_one_model_stays_itself():
    weights, inputs = problem(3)
    np.testing.assert_allclose(merged(weights, [gram(inputs[0])] * 3, alpha=0.9), np.mean(weights, axis=0), rtol=1e-12)
    assert np.array_equal(merged(weights[:1], [gram(inputs[0])]), weights[0])
    assert np.array_equal(merged([weights[0]] * 2, map(gram, inputs[:2]), alpha=0.9), weights[0])


@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_inputs_that_are_always_zero_keep_the_mean(alpha):
    weights, inputs = problem(4)
    for x in inputs:
        x[:, 2] = 0.0
    found = merged(weights, map(gram, inputs), alpha=alpha)
    np.testing.assert_allclose(found[:, 2], np.mean(weights, axis=0)[:, 2], rtol=1e-14)
    others = [0, 1, 3, 4, 5]
    alone = merged([w[:, others] for w in weights], [gram(x[:, others]) for x in inputs], alpha=alpha)
    np.testing.assert_allclose(found[:, others], alone, rtol=1e-9)


def test_fewer_tokens_than_inputs_have_an_answer_too():
    weights, inputs = problem(5, tokens=1)
    found = merged(weights, map(gram, inputs))
    outputs = [x @ w.T for x, w in zip(inputs, weights, strict=True)]
    least = np.linalg.lstsq(np.concatenate(inputs), np.concatenate(outputs))[0].T

    def error(w):
        return sum(np.square(x @ w.T - y).sum() for x, y in zip(inputs, outputs, strict=True))

    assert error(found) == pytest.approx(error(least), abs=1e-9)


def test_what_lies_below_the_rounding_of_float32_counts_as_nothing():
    """Two inputs that are one but for rounding: their sum is what matters, and no change is large."""
    one = np.random.default_rng(6).normal(size=(40, 1))
    inputs = np.concatenate([one, one * (1 + 1e-9)], 1)
    found = solution(torch.tensor(gram(inputs)), torch.tensor(gram(inputs) @ np.array([[1.0], [0.0]])))
    np.testing.assert_allclose(found.numpy(), [[0.5], [0.5]], rtol=1e-6)


def test_no_inputs_at_all_make_the_mean():
    weights, _ = problem(7)
    assert np.allclose(merged(weights, [np.zeros((6, 6))] * 3), np.mean(weights, axis=0), rtol=1e-15)

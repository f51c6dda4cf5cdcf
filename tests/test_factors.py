"""Products of thin matrices as expressions: any range, any nesting, within the memory that they state."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger.expression import File, Filled, Stored, cast, join
from merger.factors import Beside, Numbers, numbers, product, stacked, truncated

VALUES = np.random.default_rng(0).normal(size=5000).astype(np.float32)


def stored(first, *shape):
    return Stored("F32", shape, FILE, 4 * first)


def values_of(tensor):
    first = tensor.offset // 4
    return VALUES[first : first + tensor.size].astype(np.float64).reshape(tensor.shape)


FILE = File(None, VALUES.nbytes, 0, "")


def evaluate(expression, start=0, stop=None):
    stop = expression.size if stop is None else stop
    asked = set(expression.reads(start, stop))

    def fetch(part):
        assert part in asked
        return VALUES.view(np.uint8)[part.start : part.stop]

    found = expression.values(start, stop, fetch)
    assert sum(part.stop - part.start for part in asked) <= expression.memory(stop - start)
    return found.view({"F64": np.float64, "F32": np.float32}[expression.dtype])


B, A, OTHER_B, OTHER_A = stored(0, 7, 3), stored(100, 3, 5), stored(200, 7, 2), stored(300, 2, 5)
b, a, other_b, other_a = map(values_of, (B, A, OTHER_B, OTHER_A))
SUM = 0.5 * b @ a - 2.0 * other_b @ other_a
TERMS = [(0.5, B, A), (-2.0, OTHER_B, OTHER_A)]
LEFT, RIGHT = stacked(TERMS, 6)
EXPRESSIONS = {
    "product": (product(B, A), b @ a),
    "turned": (product(B, A, turned=True), (b @ a).T),
    "left": (LEFT, np.concatenate([0.5 * b, -2.0 * other_b, np.zeros((7, 1))], axis=1)),
    "right": (RIGHT, np.concatenate([a, other_a, np.zeros((1, 5))])),
    "of sums": (product(LEFT, RIGHT), SUM),
    "of sums, turned": (product(LEFT, RIGHT, turned=True), SUM.T),
    "known": (product(numbers(np.eye(7)[::-1].copy()), B), b[::-1]),
    "narrow": (cast(product(B, A), "F32"), (b @ a).astype(np.float32)),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
@given(data=st.data())
def test_any_range_is_what_the_whole_holds(name, data):
    expression, wanted = EXPRESSIONS[name]
    assert expression.shape == wanted.shape
    start = data.draw(st.integers(0, wanted.size - 1))
    stop = data.draw(st.integers(start + 1, wanted.size))
    assert np.allclose(evaluate(expression, start, stop), wanted.reshape(-1)[start:stop], rtol=1e-6, atol=1e-12)
    assert np.array_equal(evaluate(expression, start, stop), evaluate(expression)[start:stop])


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_truncated_product_is_the_nearest(rank):
    left, right = truncated(*stacked(TERMS), rank)
    with pytest.raises(ValueError, match="was not measured"):
        evaluate(left)
    [measure] = {*left.measures(), *right.measures()}
    found = {measure: measure.compute(lambda a, b: [evaluate(of, a, b).view(np.uint8) for of in measure.inputs])}
    lower = [evaluate(side.measured(found)).reshape(side.shape) for side in (left, right)]
    values = np.linalg.svd(SUM, compute_uv=False)
    assert np.isclose(np.linalg.norm(SUM - lower[0] @ lower[1]), np.linalg.norm(values[rank:]), rtol=1e-10, atol=1e-12)
    assert np.allclose(found[measure][-2:], [(values[:rank] ** 2).sum(), (values**2).sum()], rtol=1e-12)
    assert left.shape == (7, rank)
    assert left.memory(10) >= left.measured(found).memory(10)
    assert {leaf.offset for leaf in left.leaves()} == {0, 800}
    assert [*left.reads(0, 5)] == [*left.measured(found).reads(0, 5)]


def test_tall_factors_are_absorbed_in_blocks():
    tall = [stored(i, 2100, 2) for i in (0, 300)]
    flat = stored(0, 2, 4), stored(40, 2, 4)
    left, right = truncated(*stacked([(1.0, tall[0], flat[0]), (1.0, tall[1], flat[1])]), 2)
    measure = next(left.measures())
    found = {measure: measure.compute(lambda a, b: [evaluate(of, a, b).view(np.uint8) for of in measure.inputs])}
    wanted = sum(values_of(t) @ values_of(f) for t, f in zip(tall, flat, strict=True))
    lower = [evaluate(side.measured(found)).reshape(side.shape) for side in (left, right)]
    error = np.linalg.norm(np.linalg.svd(wanted, compute_uv=False)[2:])
    assert np.isclose(np.linalg.norm(wanted - lower[0] @ lower[1]), error, rtol=1e-9)


def test_both_sides_share_one_measure_on_other_machines_too():
    left, right = pickle.loads(pickle.dumps(truncated(*stacked(TERMS), 2)))
    assert len({*left.measures(), *right.measures()}) == 1


def test_a_single_term_needs_no_stack():
    left, right = stacked([(1.0, cast(B, "F64"), cast(A, "F64"))])
    assert not isinstance(left, Beside)
    assert right.shape == A.shape


def test_numbers_read_nothing():
    known = numbers(np.arange(6.0).reshape(2, 3))
    assert isinstance(known, Numbers)
    assert not [*known.reads(0, 6), *known.leaves()]
    assert join([known, Filled("F64", (1, 3))], (3, 3)).size == 9

"""Parts, stacks, turned and drawn tensors against numpy."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger.drawn import Redrawn, noise, redrawn
from merger.errors import UnsupportedModel
from merger.expression import Expression, File, Filled, Identical, Stored, cast, combine, join, scaled
from merger.given import given as given_values
from merger.noise import key_of, normal, uniform
from merger.shaping import columns, rows, stretch, transposed

ROWS, WIDTH, OFFSET = 12, 10, 24
A, B = (np.random.default_rng(seed).standard_normal((ROWS, WIDTH)).astype("f4") for seed in (1, 2))
FILES = {
    "a": (File(Path("a"), 0, 0, ""), b"\0" * OFFSET + A.tobytes()),
    "b": (File(Path("b"), 0, 0, ""), b"\0" * OFFSET + B.tobytes()),
}
CONTENT = dict(FILES.values())
a, b = (Stored("F32", (ROWS, WIDTH), FILES[name][0], OFFSET) for name in "ab")
KEY = key_of(0, "x")


def evaluate(tensor: Expression, start: int, stop: int) -> np.ndarray:
    """The elements from one to another, made only from the bytes that the expression asked for."""
    asked = set(tensor.reads(start, stop))
    values = {part: np.frombuffer(CONTENT[part.file][part.start : part.stop], np.uint8) for part in asked}
    out = np.zeros((stop - start) * tensor.itemsize, np.uint8)
    assert tensor.write(start, stop, values.__getitem__, out) == 0
    again = tensor.values(start, stop, values.__getitem__)
    assert np.array_equal(again, out)
    return out.view({"F32": "f4", "F64": "f8"}[tensor.dtype])


mean = combine([(0.5, a), (0.5, b)], "F32")
MEAN = ((A.astype("f8") + B) / 2).astype("f4")
drawn = noise((ROWS, WIDTH), KEY)
NORMAL = normal(KEY, 0, ROWS * WIDTH).view("f8").reshape(ROWS, WIDTH)
UNIFORM = uniform(KEY, 0, ROWS * WIDTH).view("f8").reshape(ROWS, WIDTH)

CASES: dict[str, tuple[Expression, np.ndarray]] = {
    "rows": (rows(a, 3, 7), A[3:7]),
    "rows of rows": (rows(rows(a, 3, 9), 2, 4), A[5:7]),
    "columns": (columns(a, 2, 5), A[:, 2:5]),
    "one column": (columns(a, 9, 10), A[:, 9:]),
    "columns of columns": (columns(columns(a, 2, 8), 1, 3), A[:, 3:5]),
    "columns of rows": (columns(rows(a, 3, 7), 2, 5), A[3:7, 2:5]),
    "rows of columns": (rows(columns(a, 2, 5), 3, 7), A[3:7, 2:5]),
    "transposed": (transposed(a), A.T),
    "transposed rows": (transposed(rows(a, 3, 7)), A[3:7].T),
    "joined": (join([a, b], (2, ROWS, WIDTH)), np.stack([A, B])),
    "joined rows": (join([rows(a, 0, 1), b, rows(a, 5, 7)], (ROWS + 3, WIDTH)), np.concatenate([A[:1], B, A[5:7]])),
    "rows of joined": (rows(join([a, b], (2 * ROWS, WIDTH)), 10, 15), np.concatenate([A, B])[10:15]),
    "rows of transposed": (rows(transposed(a), 2, 7), A.T[2:7]),
    "rows of what is joined of other rows": (
        rows(join([rows(a, 0, 1), columns(a, 0, 2)], (34,)), 8, 20),
        np.concatenate([A[0], A[:, :2].reshape(-1)])[8:20],
    ),
    "a part of joined": (stretch(join([a, b], (2 * ROWS, WIDTH)), ROWS * WIDTH, (ROWS, WIDTH)), B),
    "elements of joined": (
        stretch(join([a, b], (2 * ROWS, WIDTH)), 13, (3, 5)),
        np.concatenate([A, B]).reshape(-1)[13:28].reshape(3, 5),
    ),
    "one part of joined": (rows(join([a, b], (2 * ROWS, WIDTH)), 12, 24), B),
    "columns of joined": (columns(join([a, b], (2 * ROWS, WIDTH)), 1, 3), np.concatenate([A, B])[:, 1:3]),
    "transposed joined": (transposed(join([a, b], (2 * ROWS, WIDTH))), np.concatenate([A, B]).T),
    "sum": (mean, MEAN),
    "rows of what is given": (rows(given_values(A), 3, 7), A[3:7]),
    "rows of uniform noise": (rows(noise((ROWS, WIDTH), KEY, "uniform"), 3, 7), UNIFORM[3:7]),
    "rows of a sum": (rows(mean, 3, 7), MEAN[3:7]),
    "columns of a sum": (columns(mean, 2, 5), MEAN[:, 2:5]),
    "transposed sum": (transposed(mean), MEAN.T),
    "transposed joined sums": (
        transposed(join([rows(mean, 0, 2), rows(mean, 6, 8)], (4, WIDTH))),
        np.concatenate([MEAN[:2], MEAN[6:8]]).T,
    ),
    "sum of joined": (
        combine([(0.5, join([a, b], (2, ROWS, WIDTH))), (0.5, join([b, b], (2, ROWS, WIDTH)))], "F32"),
        np.stack([MEAN, B]),
    ),
    "sum of joined and plain": (
        combine([(0.5, join([rows(a, 0, 6), rows(a, 6, 12)], (ROWS, WIDTH))), (0.5, b)], "F32"),
        MEAN,
    ),
    "scaled columns": (scaled(columns(a, 2, 5), 4.0), 4 * A[:, 2:5]),
    "zeros": (Filled("F32", (3, 4)), np.zeros((3, 4))),
    "ones": (rows(columns(Filled("F32", (3, 4), 1.0), 0, 2), 1, 3), np.ones((2, 2))),
    "turned ones": (transposed(Filled("F32", (3, 4), 1.0)), np.ones((4, 3))),
    "noise": (drawn, NORMAL),
    "rows of noise": (rows(drawn, 3, 7), NORMAL[3:7]),
    "noisy": (combine([(1.0, a), (0.25, drawn)], "F32"), (A + 0.25 * NORMAL).astype("f4")),
    "rows of noise in a sum": (rows(combine([(0.25, drawn)], "F32"), 3, 7), (0.25 * NORMAL[3:7]).astype("f4")),
}


@pytest.mark.parametrize("case", CASES)
def test_the_whole(case: str) -> None:
    tensor, expected = CASES[case]
    assert tensor.shape == expected.shape
    assert np.array_equal(evaluate(tensor, 0, tensor.size).reshape(expected.shape), expected)


@given(st.sampled_from(sorted(CASES)), st.data())
def test_any_range(case: str, data: st.DataObject) -> None:
    tensor, expected = CASES[case]
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, tensor.size)] * 2)))
    if start < stop:
        assert np.array_equal(evaluate(tensor, start, stop), expected.reshape(-1)[start:stop])


@given(st.sampled_from(sorted(CASES)), st.data())
def test_no_more_memory_is_taken_than_was_told(case: str, data: st.DataObject) -> None:
    """What the reader takes for the ranges of an expression: each widened to whole pages at both ends."""
    tensor, _ = CASES[case]
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, tensor.size)] * 2)))
    pages = sum(-(-part.stop // 4096) * 4096 - part.start // 4096 * 4096 for part in tensor.reads(start, stop))
    assert pages <= tensor.memory(stop - start)
    assert tensor.memory(stop - start) == tensor.memory(0) + (stop - start) * (tensor.memory(1) - tensor.memory(0))


def test_what_is_read_is_counted() -> None:
    assert a.read_size == A.nbytes
    assert Filled("F32", (3, 4)).read_size == drawn.read_size == 0
    assert columns(a, 2, 5).read_size == ((ROWS - 1) * WIDTH + 3) * 4, "from the first row's to the last row's"
    assert mean.read_size == 2 * A.nbytes


def test_what_cannot_be_divided_says_so() -> None:
    narrow = Stored("F4", (2, 2), FILES["a"][0], 0)
    integers = Identical("I64", (2, 2), Stored("I64", (2, 2), FILES["a"][0], 0), ())
    for attempt in (
        lambda: columns(integers, 0, 1),
        lambda: rows(narrow, 0, 1),
        lambda: transposed(transposed(a)),
        lambda: transposed(join([a, mean], (2 * ROWS, WIDTH))),
    ):
        with pytest.raises(UnsupportedModel, match="Run the inner recipe into a folder"):
            attempt()


def test_parts_that_do_not_fit_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="several dtypes"):
        join([a, cast(b, "BF16")], (2, ROWS, WIDTH))
    with pytest.raises(ValueError, match="do not make"):
        join([a, b], (3, ROWS, WIDTH))


# ---- drawn anew ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
def test_what_is_chosen_is_drawn_with_the_moments_of_what_was_there(axis: int) -> None:
    chosen = np.zeros((ROWS, WIDTH)[axis], np.bool_)
    chosen[[1, 4, 5]] = True
    tensor = redrawn(a, chosen, axis, KEY)
    [moments] = tensor.measures()
    where = np.broadcast_to(chosen[:, None] if axis == 0 else chosen, A.shape)
    replaced = A[where].astype("f8")
    found = moments.compute(lambda start, stop: [evaluate(a, start, stop).view(np.uint8)])
    assert found == pytest.approx((replaced.mean(), replaced.std()), rel=1e-12)
    with pytest.raises(ValueError, match="was not measured"):
        tensor.values(0, 1, lambda part: np.frombuffer(CONTENT[part.file][part.start : part.stop], np.uint8))
    ready = tensor.measured({moments: found})
    assert not list(ready.measures())
    expected = np.where(where, (found[1] * NORMAL + found[0]).astype("f4"), A)
    assert np.array_equal(evaluate(ready, 0, ready.size).reshape(A.shape), expected)
    assert np.array_equal(evaluate(ready, 13, 57), expected.reshape(-1)[13:57])
    within = combine([(2.0, tensor)], "F32").measured({moments: found})
    assert np.array_equal(evaluate(within, 0, within.size).reshape(A.shape), 2 * expected)
    stacked = join([tensor, a], (2, ROWS, WIDTH))
    assert list(stacked.measures()) == [moments]
    assert np.array_equal(evaluate(stacked.measured({moments: found}), 0, A.size).reshape(A.shape), expected)


def test_where_nothing_is_chosen_nothing_is_drawn() -> None:
    assert redrawn(a, np.zeros(ROWS, np.bool_), 0, KEY) is a
    assert isinstance(redrawn(a, np.ones(ROWS, np.bool_), 0, KEY), Redrawn)

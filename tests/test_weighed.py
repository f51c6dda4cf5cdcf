"""Means weighed element by element, against float64 in numpy; what must hold of any of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger.expression import ByteRange, File, Filled, Stored, combine
from merger.weighed import Weighed, Weight
from merger.weighing_kernels import weighed_mean
from tests.checkpoints import NUMPY, as_float64, bfloat16

FLOATS = ("BF16", "F16", "F32", "F64")
PRECISION = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24, "F64": 2.0**-50}


def stored(values, dtype):
    """Values as bytes of a dtype, and what these are."""
    content = bfloat16(values)[2] if dtype == "BF16" else np.asarray(values).astype(NUMPY[dtype]).tobytes()
    return np.frombuffer(content, np.uint8), as_float64(content, dtype)


def computed(pairs, weights, dtype, size):
    """The kernel's result and how many of it are not finite; `pairs` of (content, dtype) of values and importances."""
    out = np.empty(size * (2 if dtype in ("BF16", "F16") else NUMPY[dtype]().itemsize), np.uint8)
    columns = [np.array(column, np.float64) for column in zip(*weights, strict=True)]
    numbers = (columns[1], columns[2], columns[0])
    bad = weighed_mean([value for value, _ in pairs], [own for _, own in pairs], numbers, out, dtype)
    return as_float64(out.tobytes(), dtype), bad


def expected(values, importances, weights):
    counts = [w.weight * np.maximum(w.floor, w.factor * i) for w, i in zip(weights, importances, strict=True)]
    return sum(c * v for c, v in zip(counts, values, strict=True)) / sum(counts)


@given(
    st.lists(st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)), min_size=1, max_size=5),
    st.sampled_from(FLOATS),
    st.integers(1, 1300),
    st.integers(0, 2**32),
)
def test_it_is_the_weighed_mean(dtypes, out_dtype, size, seed):
    random = np.random.default_rng(seed)
    raw = [stored(random.normal(size=size), dtype) for dtype, _ in dtypes]
    own = [stored(random.exponential(size=size) * (random.random(size) > 0.3), dtype) for _, dtype in dtypes]
    weights = [Weight(*random.uniform(0.1, 2.0, 2), 10.0 ** random.uniform(-6, 0)) for _ in dtypes]
    pairs = [((a, x), (b, y)) for (a, _), (b, _), (x, y) in zip(raw, own, dtypes, strict=True)]
    found, bad = computed(pairs, weights, out_dtype, size)
    wanted = expected([v for _, v in raw], [i for _, i in own], weights)
    assert bad == 0
    np.testing.assert_allclose(found, wanted, rtol=PRECISION[out_dtype], atol=2.0**-24 if out_dtype == "F16" else 1e-15)


@given(st.sampled_from(("BF16", "F16", "F32")), st.integers(1, 4), st.integers(0, 2**32))
def test_models_that_are_one_stay_it(dtype, count, seed):
    random = np.random.default_rng(seed)
    content, exact = stored(random.normal(size=700), dtype)
    own = [stored(random.exponential(size=700), "F32")[0] for _ in range(count)]
    weights = [Weight(w, 1.0, 1e-6) for w in random.uniform(0.1, 3.0, count)]
    found, _ = computed([((content, dtype), (i, "F32")) for i in own], weights, dtype, 700)
    assert np.array_equal(found, exact)


def test_what_counts_nothing_anywhere_is_the_plain_mean():
    values = [stored(np.array([1.0, 5.0]), "F32")[0], stored(np.array([4.0, -1.0]), "F32")[0]]
    nothing = stored(np.zeros(2), "F32")[0]
    found, _ = computed(
        [((v, "F32"), (nothing, "F32")) for v in values], [Weight(2, 1, 1e-6), Weight(1, 1, 1e-6)], "F32", 2
    )
    assert np.array_equal(found, [2.0, 3.0])


def test_a_number_that_matters_to_one_alone_is_that_ones():
    a, b = stored(np.array([1.0]), "F32")[0], stored(np.array([9.0]), "F32")[0]
    pairs = [((a, "F32"), stored_pair(1.0)), ((b, "F32"), stored_pair(0.0))]
    found, _ = computed(pairs, [Weight(1, 1, 1e-6)] * 2, "F64", 1)
    assert found == pytest.approx((1 + 9e-6) / (1 + 1e-6), rel=1e-15)


def stored_pair(value):
    return stored(np.array([value]), "F32")[0], "F32"


@pytest.mark.parametrize("odd", [np.nan, np.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_what_is_not_finite_is_counted_and_not_hidden_by_the_floor(odd, where):
    value, own = np.ones(3), np.ones(3)
    (value, own)[where][1] = odd
    found, bad = computed(
        [((stored(value, "F32")[0], "F32"), (stored(own, "F32")[0], "F32"))], [Weight(1, 1, 1)], "F32", 3
    )
    assert bad == 1
    assert not np.isfinite(found[1])


def test_arrays_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="not 3 elements"):
        computed(
            [((stored(np.ones(3), "F32")[0], "F32"), (stored(np.ones(2), "F32")[0], "F32"))],
            [Weight(1, 1, 1)],
            "F32",
            3,
        )


# ---- the expression -----------------------------------------------------------------------------------


def expression(tmp_path, size=500):
    """Two tensors, one of them a sum, with their importances, and all that they are made from by their place."""
    random = np.random.default_rng(0)
    content = random.exponential(size=(4, size)).astype("f4")
    (tmp_path / "data").write_bytes(content.tobytes())
    file = File(tmp_path / "data", content.nbytes, 0, "")
    parts = [Stored("F32", (size,), file, i * size * 4) for i in range(4)]
    second = combine([(0.5, parts[1]), (1.0, Filled("F32", (size,), 1.0))], "F32")
    made = Weighed("F32", (size,), (parts[0], second), tuple(parts[2:]), (Weight(1, 1, 1e-6), Weight(2, 3, 1e-6)))
    wanted = expected([content[0], content[1] * 0.5 + 1], content[2:], made.weights)

    def fetch(part: ByteRange):
        return np.frombuffer((tmp_path / "data").read_bytes()[part.start : part.stop], np.uint8)

    return made, wanted, fetch


@pytest.mark.parametrize(("start", "stop"), [(0, 500), (3, 4), (17, 499), (250, 250)])
def test_any_range_is_that_of_the_whole(tmp_path, start, stop):
    made, wanted, fetch = expression(tmp_path)
    found = made.values(start, stop, fetch).view("f4")
    np.testing.assert_allclose(found, wanted[start:stop], rtol=2.0**-22)
    assert {part.dtype for part in made.reads(start, stop)} == {"F32"}
    assert sum(part.stop - part.start for part in made.reads(start, stop)) == 4 * 4 * (stop - start)


def test_its_memory_is_that_of_what_it_is_made_from(tmp_path):
    made, _, _ = expression(tmp_path)
    assert len(list(made.leaves())) == 4
    assert made.memory(10) - made.memory(0) >= 4 * 4 * 10
    assert made.measured({}) == made

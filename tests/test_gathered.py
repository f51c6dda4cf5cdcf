from itertools import count

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merger.dtypes import TORCH_NAMES
from merger.errors import UnsupportedModel
from merger.expression import File, Stored, combine
from merger.gathered import Gathered, Mean, Rows, gathered, padded
from tests.checkpoints import as_float64, bfloat16
from tests.test_expression import evaluate, stored

__all__ = ["stored"]

WIDTH = 6


def rows_of(*terms):
    """Rows from lists of (source, row)."""
    flat = [term for row in terms for term in row]
    ends = np.cumsum([0, *(len(row) for row in terms)])
    pairs = np.array(flat, np.int64).reshape(-1, 2)
    return Rows(ends, pairs[:, 0], pairs[:, 1])


def computed(sources, terms):
    """The same in float64."""
    return np.array(
        [
            np.sum([sources[s][r].astype(np.float64) for s, r in row], axis=0) / len(row) if row else np.zeros(WIDTH)
            for row in terms
        ]
    )


def numbers(seed, rows=20, width=WIDTH):
    return np.random.default_rng(seed).normal(size=(rows, width))


TERMS = [[(0, 3)], [(1, 0)], [], [(0, 4)], [(0, 5)], [(0, 1), (1, 19)], [(1, 2)], [(1, 7), (0, 0), (1, 8)], [(0, 3)]]


@pytest.fixture
def pair(stored):
    """Two sources of two dtypes and their values."""
    a, b = stored(numbers(1).astype(np.float32)), stored(bfloat16(numbers(2)))
    return [a, b], [as_float64(evaluate(x)[0], x.dtype).reshape(-1, WIDTH) for x in (a, b)]


# ---- values -------------------------------------------------------------------------------------------


def test_rows_are_copies_means_and_zeros(pair):
    sources, values = pair
    made = gathered(sources, rows_of(*TERMS), "F64")
    assert made.shape == (len(TERMS), WIDTH)
    found = as_float64(evaluate(made)[0], "F64").reshape(-1, WIDTH)
    np.testing.assert_array_equal(found[[0, 1, 2, 3, 4, 6, 8]], computed(values, TERMS)[[0, 1, 2, 3, 4, 6, 8]])
    np.testing.assert_allclose(found, computed(values, TERMS), rtol=1e-15)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_means_are_rounded_once(pair, dtype):
    sources, values = pair
    found = as_float64(evaluate(gathered(sources, rows_of(*TERMS), dtype))[0], dtype).reshape(-1, WIDTH)
    wanted = computed(values, TERMS)
    rounded = torch.from_numpy(wanted).to(getattr(torch, TORCH_NAMES[dtype])).double().numpy()
    np.testing.assert_array_equal(found, rounded)


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16"])
def test_any_range_is_that_range_of_the_whole(pair, dtype):
    made = gathered(pair[0], rows_of(*TERMS), dtype)
    whole, size = evaluate(made)[0], made.itemsize
    for start in range(made.size):
        for stop in range(start, made.size + 1, 5):
            assert evaluate(made, start, stop)[0] == whole[start * size : stop * size]


@given(st.data())
def test_any_rows_are_those_of_float64(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "rows"
    values = [numbers(seed).astype(np.float32) for seed in range(3)]
    path.write_bytes(b"".join(value.tobytes() for value in values))
    file = File(path, path.stat().st_size, 0, "")
    sources = [Stored("F32", (20, WIDTH), file, i * values[0].nbytes) for i in range(3)]
    term = st.tuples(st.integers(0, 2), st.integers(0, 19))
    terms = data.draw(st.lists(st.lists(term, max_size=4), min_size=1, max_size=30))
    made = gathered(sources, rows_of(*terms), "F64")
    start = data.draw(st.integers(0, made.size))
    stop = data.draw(st.integers(start, made.size))
    found = as_float64(evaluate(made, start, stop)[0], "F64")
    np.testing.assert_allclose(found, computed(values, terms).reshape(-1)[start:stop], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_copies_keep_their_bits(stored, dtype):
    itemsize = {"F32": 4, "F64": 8}.get(dtype, 2)
    content = np.random.default_rng(4).integers(0, 256, 20 * WIDTH * itemsize, dtype=np.uint8)
    made = gathered([stored((dtype, (20, WIDTH), content.tobytes()))], rows_of([(0, 7)], [(0, 2)], [(0, 3)]), dtype)
    assert evaluate(made)[0] == content.reshape(20, -1)[[7, 2, 3]].tobytes()


def test_values_that_are_not_finite_are_counted(stored):
    values = numbers(1).astype(np.float32)
    values[3, 2] = np.inf
    source = stored(values)
    assert evaluate(gathered([source], rows_of([(0, 3)], [(0, 1)]), "F32"))[1] == 1
    assert evaluate(gathered([source], rows_of([(0, 2)], [(0, 4)]), "F32"))[1] == 0


def test_biases_have_rows_of_one_element(stored):
    values = np.arange(20, dtype=np.float32)
    made = gathered([stored(values)], rows_of([(0, 5)], [(0, 3), (0, 4)], []), "F32")
    assert made.shape == (3,)
    assert as_float64(evaluate(made)[0], "F32").tolist() == [5.0, 3.5, 0.0]


def test_rows_of_sums_are_sums_of_rows(pair):
    sources, (a, b) = pair
    total = combine([(0.25, sources[0]), (0.75, sources[1])], "F64")
    made = gathered([total], rows_of([(0, 9)], [(0, 1), (0, 2)]), "F64")
    wanted = computed([0.25 * a + 0.75 * b], [[(0, 9)], [(0, 1), (0, 2)]])
    np.testing.assert_allclose(as_float64(evaluate(made)[0], "F64").reshape(-1, WIDTH), wanted, rtol=1e-14)
    assert list(made.leaves()) == sources


def test_sums_of_gathered_rows_are_those_of_float64(pair):
    sources, values = pair
    a, b = rows_of([(0, 1)], [(1, 4)]), rows_of([(1, 2)], [(0, 0)])
    total = combine([(0.5, gathered(sources, a, "F32")), (0.5, gathered(sources, b, "F32"))], "F32")
    wanted = (computed(values, [[(0, 1)], [(1, 4)]]) + computed(values, [[(1, 2)], [(0, 0)]])) / 2
    np.testing.assert_allclose(as_float64(evaluate(total)[0], "F32").reshape(-1, WIDTH), wanted, rtol=2e-7, atol=1e-9)


# ---- what is read -------------------------------------------------------------------------------------


@pytest.fixture
def large(stored):
    """A source of which not all is read: 2048 rows of 4 KiB."""
    return stored(numbers(5, 2048, 1024).astype(np.float32))


def test_rows_that_follow_each_other_are_read_at_once(large):
    made = gathered([large], rows_of(*([(0, row)] for row in range(100, 200)), [(0, 900)]), "F32")
    assert list(made.reads(0, 100 * 1024)) == [large.range(100 * 1024, 200 * 1024)]
    assert list(made.reads(0, made.size))[1] == large.range(900 * 1024, 901 * 1024)
    assert len(list(made.reads(0, made.size))) == 2


def test_rows_that_are_close_are_read_with_what_lies_between(large):
    made = gathered([large], rows_of([(0, 12)], [(0, 10)], [(0, 600)], [(0, 14)]), "F32")
    assert list(made.reads(0, made.size)) == [large.range(10240, 15 * 1024), large.range(614400, 601 * 1024)]
    whole = as_float64(evaluate(made)[0], "F32").reshape(-1, 1024)
    np.testing.assert_array_equal(whole, numbers(5, 2048, 1024).astype(np.float32)[[12, 10, 600, 14]])


def test_small_sources_are_read_as_a_whole(pair):
    made = gathered(pair[0], rows_of(*TERMS), "F32")
    assert list(made.reads(0, 1)) == [pair[0][0].range(0, 120)]
    assert made.read_size == 120 * (4 + 2)


def test_nothing_is_read_for_nothing(pair):
    made = gathered(pair[0], rows_of(*TERMS), "F32")
    assert list(made.reads(5, 5)) == []
    assert evaluate(made, 5, 5) == (b"", 0)


SCATTERED = np.random.default_rng(7).permutation(2048)[:300].tolist()
LAYOUTS = {
    "scattered": [[(row % 2, row)] for row in SCATTERED],
    "means": [[(0, row), (1, row)] for row in SCATTERED],
    "in order": [[(0, row)] for row in range(2047)],
    "alternating": [[(row % 2, row)] for row in range(300)],
    "mostly in order": [[(0, row)] for row in range(1000)] + [[(1, row)] for row in SCATTERED],
    "with gaps": [[(row % 2, 3 * row)] for row in range(600)],
    "empty": [[]] * 40 + [[(0, row)] for row in SCATTERED],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_covers_what_is_read_of_any_range(stored, large, layout):
    made = gathered([large, stored(numbers(6, 2048, 1024))], rows_of(*LAYOUTS[layout]), "F32")
    draw = np.random.default_rng(8)
    ranges = [sorted(draw.integers(0, made.size + 1, 2).tolist()) for _ in range(30)]
    short = [(start, min(start + 5000, made.size)) for start in draw.integers(0, made.size, 30).tolist()]
    for start, stop in [(0, 1), (1023, 1025), (0, made.size), *ranges, *short]:
        wanted = set(made.reads(start, stop))
        pages = sum(-(-part.stop // 4096) * 4096 - part.start // 4096 * 4096 for part in wanted)
        copied = sum(part.stop - part.start for part in wanted)
        assert pages + copied <= made.memory(stop - start)
        assert made.memory(stop - start) == made.memory(0) + (stop - start) * (made.memory(1) - made.memory(0))


def test_rows_in_order_take_little_memory(large):
    """Not what rows would take that all are far from each other."""
    made = gathered([large], rows_of(*([(0, row)] for row in range(2000))), "F32")
    assert made.memory(1 << 20) < 14 * (4 << 20)


# ---- what is made of it -------------------------------------------------------------------------------


def test_all_rows_of_one_source_are_that_source(pair):
    a, b = pair[0]
    own = rows_of(*([(1, row)] for row in range(20)))
    assert gathered([a, b], own, "BF16") is b
    assert isinstance(gathered([a, b], own, "F32"), Gathered)
    assert isinstance(gathered([a, b], rows_of(*([(1, row)] for row in range(19))), "BF16"), Gathered)


def test_sources_that_give_no_row_are_left_out(pair):
    a, b = pair[0]
    made = gathered([a, b], rows_of([(1, 4)], []), "BF16")
    assert list(made.leaves()) == [b]
    assert evaluate(made)[0] == evaluate(b)[0][4 * WIDTH * 2 : 5 * WIDTH * 2] + bytes(WIDTH * 2)


def test_rows_of_other_widths_are_refused(stored):
    with pytest.raises(ValueError, match="several shapes"):
        gathered([stored(numbers(1)), stored(numbers(1, width=4))], rows_of([(0, 1)], [(1, 1)]), "F64")


def test_dtypes_in_which_nothing_is_calculated_are_refused(stored):
    with pytest.raises(UnsupportedModel, match="F8_E4M3"):
        gathered([stored(("F8_E4M3", (2, 4), bytes(8)))], rows_of([(0, 1)]), "F32")


# ---- rows beyond the last -----------------------------------------------------------------------------


def measured(expression):
    """The expression with its measures taken."""

    def evaluator(inputs):
        return lambda start, stop: [np.frombuffer(evaluate(of, start, stop)[0], np.uint8) for of in inputs]

    return expression.measured({m: m.compute(evaluator(m.inputs)) for m in expression.measures()})


@pytest.mark.parametrize("dtype", ["F64", "F32"])
def test_rows_beyond_the_last_are_the_mean(pair, dtype):
    sources, values = pair
    inner = gathered(sources, rows_of(*TERMS), dtype)
    made = measured(padded(inner, 3))
    assert made.shape == (len(TERMS) + 3, WIDTH)
    found = as_float64(evaluate(made)[0], dtype).reshape(-1, WIDTH)
    wanted = computed(values, TERMS)
    np.testing.assert_array_equal(found[: len(TERMS)], as_float64(evaluate(inner)[0], dtype).reshape(-1, WIDTH))
    np.testing.assert_allclose(found[len(TERMS) :], np.tile(wanted.mean(0), (3, 1)), rtol=1e-6)
    whole, size = evaluate(made)[0], made.itemsize
    for start, stop in [(0, 1), (50, 60), (55, 72), (71, 72), (53, 55)]:
        assert evaluate(made, start, stop)[0] == whole[start * size : stop * size]


def test_the_mean_of_many_rows_goes_block_by_block(stored):
    values = numbers(8, 5000, 128).astype(np.float32)
    source = stored(values)
    asked = count()

    def evaluator(start, stop):
        next(asked)
        return [np.frombuffer(values.tobytes()[4 * start : 4 * stop], np.uint8)]

    mean = Mean((source,)).compute(evaluator)
    np.testing.assert_allclose(mean, values.astype(np.float64).mean(0), rtol=1e-10, atol=1e-12)
    assert next(asked) == 3


def test_no_rows_more_change_nothing(pair):
    assert padded(pair[0][0], 0) is pair[0][0]


def test_what_is_measured_already_is_refused(pair):
    with pytest.raises(UnsupportedModel, match="measured again"):
        padded(padded(pair[0][0], 2), 2)

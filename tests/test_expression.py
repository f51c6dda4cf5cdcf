from itertools import count

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger.dtypes import DTYPES
from merger.expression import ByteRange, File, Identical, Stored, WeightedSum, cast, combine
from tests.checkpoints import NUMPY, as_float64, bfloat16

OFFSET = 13  # tensors may begin anywhere in a file


@pytest.fixture
def stored(tmp_path):
    """Puts values into a file of their own, as an array or as (dtype name, shape, bytes)."""
    numbers = count()

    def put(values):
        path = tmp_path / str(next(numbers))
        if isinstance(values, tuple):
            dtype, shape, content = values
        else:
            dtype = next(name for name, kind in NUMPY.items() if kind == values.dtype.type)
            shape, content = values.shape, values.tobytes()
        path.write_bytes(bytes(OFFSET) + content + b"after")
        return Stored(dtype, shape, File(path, path.stat().st_size, 0, ""), OFFSET)

    return put


def fetch(wanted: ByteRange):
    return np.frombuffer(wanted.file.path.read_bytes()[wanted.start : wanted.stop], np.uint8)


def evaluate(expression, start=0, stop=None):
    """The bytes of elements `start` to `stop`, made from nothing but what `reads` names."""
    stop = expression.nbytes // expression.itemsize if stop is None else stop
    values = {wanted: fetch(wanted) for wanted in expression.reads(start, stop)}
    out = np.full((stop - start) * expression.itemsize, 0xA5, np.uint8)
    bad = expression.write(start, stop, values.__getitem__, out)
    return out.tobytes(), bad


def random_bytes(dtype, elements):
    return np.random.default_rng(1).integers(0, 256, elements * DTYPES[dtype].bits // 8, dtype=np.uint8).tobytes()


# ---- stored tensors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stored_tensor_is_copied_bit_by_bit(stored, dtype):
    content = random_bytes(dtype, 48)
    tensor = stored((dtype, (6, 8), content))
    assert tensor.nbytes == len(content)
    assert evaluate(tensor)[0] == content
    size = tensor.itemsize
    assert evaluate(tensor, 3, 20)[0] == content[3 * size : 20 * size]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_range_of_elements_is_a_range_of_bytes(stored, dtype):
    tensor = stored((dtype, (6, 8), random_bytes(dtype, 48)))
    # Below a byte there is no address: elements are counted in bytes.
    size = DTYPES[dtype].bits // 8 if DTYPES[dtype].bits >= 8 else 1
    assert list(tensor.reads(2, 5)) == [ByteRange(tensor.file, OFFSET + 2 * size, OFFSET + 5 * size, dtype)]


@pytest.mark.parametrize(("shape", "nbytes"), [((), 4), ((0,), 0), ((3, 0, 5), 0), ((2, 3), 24)])
def test_scalars_and_empty_tensors_have_a_size(stored, shape, nbytes):
    tensor = stored(("F32", shape, bytes(nbytes)))
    assert tensor.nbytes == nbytes
    assert evaluate(tensor) == (bytes(nbytes), 0)


@pytest.mark.parametrize(("kind", "bad"), [(np.float32, 2), (np.float16, 2), (np.float64, 2)])
def test_floating_values_that_are_not_finite_are_counted(stored, kind, bad):
    tensor = stored(np.array([1, np.nan, 2, -np.inf], kind))
    assert evaluate(tensor)[1] == bad
    assert evaluate(tensor, 2, 3)[1] == 0


@pytest.mark.parametrize("dtype", [name for name, dtype in DTYPES.items() if not dtype.is_float])
def test_other_values_are_never_counted(stored, dtype):
    assert evaluate(stored((dtype, (16,), b"\xff" * (16 * DTYPES[dtype].bits // 8))))[1] == 0


def test_tensors_are_the_same_where_file_place_and_type_are(stored):
    tensor = stored(np.zeros(4, np.float32))
    assert Stored("F32", (4,), tensor.file, OFFSET) == tensor
    assert Stored("F32", (4,), tensor.file, OFFSET + 16) != tensor
    assert stored(np.zeros(4, np.float32)) != tensor


# ---- sums ---------------------------------------------------------------------------------------------


@pytest.fixture
def tensors(stored):
    """Three tensors of three types and one shape."""
    values = np.random.default_rng(2).normal(size=(3, 5, 7))
    return [stored(values[0].astype(np.float32)), stored(bfloat16(values[1])), stored(values[2].astype(np.float16))]


def values_of(expression):
    return as_float64(evaluate(expression)[0], expression.dtype)


def test_a_sum_is_that_of_float64(tensors):
    result = combine(list(zip([0.5, 0.3, 0.2], tensors, strict=True)), "F64")
    wanted = sum(weight * values_of(tensor) for weight, tensor in zip([0.5, 0.3, 0.2], tensors, strict=True))
    assert result.shape == (5, 7)
    np.testing.assert_allclose(values_of(result), wanted, rtol=1e-15)


@pytest.mark.parametrize("dtype", ["F32", "F64", "F16", "BF16"])
def test_a_range_of_a_sum_is_that_range_of_the_whole(tensors, dtype):
    result = combine(list(zip([0.5, 0.3, 0.2], tensors, strict=True)), dtype)
    whole, _ = evaluate(result)
    size = result.itemsize
    for start, stop in [(0, 1), (3, 20), (34, 35), (7, 7)]:
        assert evaluate(result, start, stop)[0] == whole[start * size : stop * size]


def test_a_sum_reads_the_same_elements_of_every_term_in_order(tensors):
    result = combine([(0.5, tensor) for tensor in tensors], "F32")
    assert list(result.leaves()) == tensors
    assert list(result.reads(4, 6)) == [
        ByteRange(tensors[0].file, OFFSET + 16, OFFSET + 24, "F32"),
        ByteRange(tensors[1].file, OFFSET + 8, OFFSET + 12, "BF16"),
        ByteRange(tensors[2].file, OFFSET + 8, OFFSET + 12, "F16"),
    ]


def test_values_of_a_sum_that_are_not_finite_are_counted(stored):
    tensor = stored(np.array([6e4, 1, -6e4], np.float32))
    assert evaluate(combine([(2.0, tensor)], "F16"))[1] == 2
    assert evaluate(combine([(2.0, tensor)], "F32"))[1] == 0


# ---- combine ------------------------------------------------------------------------------------------


def test_sums_of_sums_become_one_sum(tensors):
    a, b, c = tensors
    inner = combine([(0.25, a), (0.75, b)], "F32")
    assert combine([(0.5, inner), (0.5, c)], "F32") == WeightedSum("F32", (5, 7), ((0.125, a), (0.375, b), (0.5, c)))


def test_a_tensor_that_comes_twice_is_read_once(tensors):
    a, b, _ = tensors
    assert combine([(0.25, a), (0.5, b), (0.25, a)], "F32") == WeightedSum("F32", (5, 7), ((0.5, a), (0.5, b)))


def test_a_tensor_of_weight_zero_is_not_read(tensors):
    a, b, c = tensors
    assert list(combine([(0.0, a), (0.5, b), (1.0, c), (-1.0, c)], "F32").leaves()) == [b]


def test_nothing_but_zeros_is_refused(tensors):
    with pytest.raises(ValueError, match="zero"):
        combine([(0.0, tensors[0]), (1.0, tensors[1]), (-1.0, tensors[1])], "F32")


def test_one_tensor_of_weight_one_is_itself(tensors):
    a, b, _ = tensors
    assert combine([(1.0, a)], "F32") is a
    assert combine([(0.5, a), (0.0, b), (0.5, a)], "F32") is a


def test_one_tensor_of_another_weight_or_type_is_a_sum(tensors):
    a = tensors[0]
    assert combine([(0.5, a)], "F32") == WeightedSum("F32", (5, 7), ((0.5, a),))
    assert combine([(1.0, a)], "BF16") == WeightedSum("BF16", (5, 7), ((1.0, a),))


def test_what_is_no_sum_cannot_take_part(stored):
    tensor = stored(np.zeros(3, np.int64))
    with pytest.raises(TypeError):
        combine([(1.0, Identical("I64", (3,), tensor, ()))], "F32")


def test_a_nested_average_is_rounded_once(stored):
    # 1 + 2^-8 lies between two neighbours of BF16: rounding the inner mean would lose the half.
    a, b = stored(bfloat16(np.array([1.0]))), stored(bfloat16(np.array([1 + 2.0**-7])))
    inner = combine([(0.5, a), (0.5, b)], "BF16")
    assert values_of(inner) == 1.0
    assert values_of(combine([(0.5, inner), (0.5, b)], "F32")) == 1 + 2.0**-8 + 2.0**-9


trees = st.recursive(
    st.integers(0, 3),
    lambda inner: st.lists(st.tuples(st.integers(1, 16).map(lambda n: n / 8), inner), min_size=1, max_size=3),
    max_leaves=12,
)


@given(trees)
def test_any_nest_of_sums_is_that_of_float64(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "nest"
    values = np.random.default_rng(3).normal(size=(4, 6)).astype(np.float32)
    path.write_bytes(values.tobytes())
    file = File(path, values.nbytes, 0, "")

    def built(node):
        if isinstance(node, int):
            return Stored("F32", (6,), file, node * 24)
        return combine([(weight, built(inner)) for weight, inner in node], "F32")

    def computed(node):
        if isinstance(node, int):
            return values[node].astype(np.float64)
        return sum(weight * computed(inner) for weight, inner in node)

    result = built(tree)
    leaves = list(result.leaves())
    assert len(leaves) == len(set(leaves))
    np.testing.assert_allclose(values_of(result), computed(tree), rtol=2.0**-23, atol=1e-6)


# ---- cast and identical -------------------------------------------------------------------------------


def test_a_cast_to_its_own_type_changes_nothing(tensors):
    result = combine([(0.5, tensor) for tensor in tensors], "F32")
    assert cast(tensors[1], "BF16") is tensors[1]
    assert cast(result, "F32") is result


@pytest.mark.parametrize(("dtype", "kind"), [("F16", np.float16), ("F64", np.float64)])
def test_a_cast_rounds_as_numpy_does(tensors, dtype, kind):
    assert evaluate(cast(tensors[0], dtype))[0] == values_of(tensors[0]).astype(kind).tobytes()


def test_a_sum_is_cast_from_its_exact_value(tensors):
    result = combine([(1 / 3, tensor) for tensor in tensors], "F64")
    assert cast(cast(result, "BF16"), "F64") == result


def test_identical_tensors_are_read_from_the_first(stored):
    first, other = stored(np.arange(5)), stored(np.arange(5))
    tensor = Identical("I64", (5,), first, (other,))
    assert list(tensor.leaves()) == [first]
    assert evaluate(tensor, 1, 4) == (np.arange(1, 4).tobytes(), 0)

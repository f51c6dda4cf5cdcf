from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from merger.kernels import CODES, count_non_finite, weighted_sum
from tests.checkpoints import as_float64

DTYPES = list(CODES)
SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
# Bits of precision and the exponent of the smallest normal number, from IEEE 754 and the definition of bfloat16.
PRECISION = {"BF16": (8, -126), "F16": (11, -14), "F32": (24, -126), "F64": (53, -1022)}
LARGEST = {"BF16": 2.0**127 * (2 - 2**-7), "F16": 65504.0, "F32": float(np.finfo(np.float32).max), "F64": 1e308}


def stored(values, dtype):
    """Values as bytes of `dtype`, rounded by numpy or torch."""
    if dtype == "BF16":
        return (
            torch.from_numpy(np.asarray(values, np.float32).copy()).bfloat16().view(torch.int16).numpy().view(np.uint8)
        )
    numpy = {"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(numpy).view(np.uint8)


def total(terms, dtype):
    """The kernel's sum of (weight, bytes, dtype name): its bytes, and how many values are not finite."""
    _, values, name = terms[0]
    out = np.full(values.size // SIZES[name] * SIZES[dtype], 0xA5, np.uint8)
    return out, weighted_sum(terms, out, dtype)


def exact(terms):
    """The sum and the sum of magnitudes in the widest floating type there is."""
    parts = [np.longdouble(weight) * as_float64(values.tobytes(), name) for weight, values, name in terms]
    return np.sum(parts, axis=0), np.sum(np.abs(parts), axis=0)


def half_ulp(values, dtype):
    """Half the distance between neighbours of `dtype` at each value."""
    bits, smallest = PRECISION[dtype]
    exponents = np.frexp(np.asarray(values, np.float64))[1] - 1
    return np.ldexp(0.5, np.maximum(exponents, smallest) - bits + 1)


def assert_accurate(terms, dtype):
    """Promise 4 of the design: half an ulp of the output plus n * 2^-24 * sum |w x|."""
    wanted, magnitude = exact(terms)
    got = as_float64(total(terms, dtype)[0].tobytes(), dtype)
    assert np.all(np.abs(got - wanted) <= half_ulp(wanted, dtype) + len(terms) * 2.0**-24 * magnitude)


def assert_same(got, wanted):
    """The same values to the sign of zero, NaN for NaN."""
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(np.signbit(got[~np.isnan(got)]), np.signbit(wanted[~np.isnan(wanted)]))


def float32_patterns():
    """Bit patterns of float32 of every kind, ties of both 16-bit types among them."""
    random = np.random.default_rng(7)
    anything = random.integers(0, 1 << 32, 1 << 20, dtype=np.uint64).astype(np.uint32)
    all_halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    half_steps = np.concatenate([all_halves + np.uint32(step) for step in (0, 0xFFF, 0x1000, 0x1001, 0x1FFF)])
    bfloats = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    bfloat_steps = np.concatenate([bfloats + np.uint32(step) for step in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    small = random.uniform(-(2.0**-13), 2.0**-13, 1 << 18).astype(np.float32)
    half_subnormal_ties = (np.arange(-4097, 4098) * 2.0**-25).astype(np.float32)
    edges = np.array([65504, 65519.996, 65520, 65536, 3.3895314e38, 3.4028235e38, np.inf, np.nan, 0, 1e-45], np.float32)
    edges = np.concatenate([edges, -edges])
    floats = np.concatenate([small, half_subnormal_ties, edges]).view(np.uint32)
    return np.concatenate([anything, half_steps, bfloat_steps, floats])


# ---- one value ----------------------------------------------------------------------------------------


def test_every_float16_is_read_as_numpy_reads_it():
    halves = np.arange(1 << 16, dtype=np.uint16)
    got, _ = total([(1.0, halves.view(np.uint8), "F16")], "F64")
    assert_same(got.view(np.float64), halves.view(np.float16).astype(np.float64))


def test_every_bfloat16_is_read_as_torch_reads_it():
    bfloats = np.arange(1 << 16, dtype=np.uint16)
    got, _ = total([(1.0, bfloats.view(np.uint8), "BF16")], "F64")
    assert_same(got.view(np.float64), torch.from_numpy(bfloats).view(torch.bfloat16).double().numpy())


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_value_survives_the_way_there_and_back(dtype):
    patterns = np.arange(1 << 16, dtype=np.uint16)
    exponent = {"BF16": 0x7F80, "F16": 0x7C00}[dtype]
    numbers = patterns[(patterns & exponent) != exponent]
    got, bad = total([(1.0, numbers.view(np.uint8), dtype)], dtype)
    np.testing.assert_array_equal(got.view(np.uint16), numbers)
    assert bad == 0


def test_float32_is_rounded_to_float16_as_numpy_rounds():
    floats = float32_patterns().view(np.float32)
    got, bad = total([(1.0, floats.view(np.uint8), "F32")], "F16")
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = floats.astype(np.float16)
    assert_same(got.view(np.float16), wanted)
    assert bad == np.sum(~np.isfinite(wanted))


def test_float32_is_rounded_to_bfloat16_as_torch_rounds():
    floats = float32_patterns().view(np.float32)
    got, bad = total([(1.0, floats.view(np.uint8), "F32")], "BF16")
    wanted = torch.from_numpy(floats).bfloat16().float().numpy()
    assert_same(as_float64(got.tobytes(), "BF16").astype(np.float32), wanted)
    assert bad == np.sum(~np.isfinite(wanted))


def test_float64_is_rounded_to_float32_as_numpy_rounds():
    random = np.random.default_rng(3)
    neighbours = random.standard_normal(1 << 16).astype(np.float32).astype(np.float64)
    ties = neighbours * (1 + 2.0**-24)
    doubles = np.concatenate([ties, -ties, random.standard_normal(1 << 16) * 1e-40, [1e39, -1e39, -1e-60, 1e-60]])
    got, bad = total([(1.0, doubles.view(np.uint8), "F64")], "F32")
    with np.errstate(over="ignore"):
        assert_same(got.view(np.float32), doubles.astype(np.float32))
    assert bad == 2


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_wide_values_of_weight_one_are_copied_bit_by_bit(dtype):
    patterns = np.random.default_rng(5).integers(0, 256, 1 << 19, dtype=np.uint8)
    finite = patterns.view({"F32": np.float32, "F64": np.float64}[dtype])
    finite = finite[np.isfinite(finite)]
    got, bad = total([(1.0, finite.view(np.uint8), dtype)], dtype)
    np.testing.assert_array_equal(got, finite.view(np.uint8))
    assert bad == 0


# ---- sums ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "result"), list(product(DTYPES, DTYPES)))
def test_sums_of_one_type_are_accurate_in_every_other(source, result):
    random = np.random.default_rng(11)
    assert_accurate([(random.normal(), stored(random.normal(size=5000), source), source) for _ in range(5)], result)


@pytest.mark.parametrize("result", DTYPES)
def test_sums_of_mixed_types_are_accurate(result):
    random = np.random.default_rng(13)
    assert_accurate([(random.uniform(), stored(random.normal(size=5000), name), name) for name in DTYPES * 2], result)


@pytest.mark.parametrize("count", range(1, 41))
def test_sums_of_many_terms_are_accurate(count):
    random = np.random.default_rng(count)
    weights = random.dirichlet(np.ones(count))
    for source, result in [("BF16", "BF16"), ("F32", "F32"), ("F16", "BF16")]:
        values = [stored(random.normal(size=257) * 10.0 ** random.integers(-3, 3), source) for _ in weights]
        assert_accurate([(w, x, source) for w, x in zip(weights, values, strict=True)], result)


@pytest.mark.parametrize("source", DTYPES)
def test_large_terms_that_cancel_leave_the_small_one(source):
    large, small = stored([3e4] * 9, source), stored([2.0**-9 * i for i in range(9)], source)
    got, _ = total([(1.0, large, source), (1.0, small, source), (-1.0, large, source)], source)
    np.testing.assert_array_equal(got, small)


def test_random_cancellation_is_accurate():
    random = np.random.default_rng(17)
    for result in DTYPES:
        large = stored(random.normal(size=1000) * 1e4, "F32")
        near = stored(large.view(np.float32) * (1 + 1e-6 * random.normal(size=1000)), "F32")
        assert_accurate([(7.0, large, "F32"), (-7.0, near, "F32"), (0.3, near, "F32")], result)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 12289])
@pytest.mark.parametrize("result", DTYPES)
def test_every_size_is_summed_to_its_end(size, result):
    random = np.random.default_rng(size)
    terms = [(0.25, stored(random.normal(size=size), name), name) for name in DTYPES]
    assert total(terms, result)[0].size == size * SIZES[result]
    assert_accurate(terms, result)


@pytest.mark.parametrize("source", DTYPES)
def test_sums_are_those_of_plain_float64_in_the_order_of_the_terms(source):
    random = np.random.default_rng(19)
    terms = [(random.normal(), stored(random.normal(size=5000), source), source) for _ in range(7)]
    wanted = np.zeros(5000)
    for weight, values, _ in terms:
        wanted += weight * as_float64(values.tobytes(), source)
    np.testing.assert_array_equal(total(terms, "F64")[0].view(np.float64), wanted)


finite_terms = st.lists(
    st.tuples(
        st.floats(-4, 4, width=32),
        hnp.arrays(np.float32, 8, elements=st.floats(-1e4, 1e4, width=32)),
        st.sampled_from(DTYPES),
    ),
    min_size=1,
    max_size=6,
)


@given(finite_terms, st.sampled_from(["BF16", "F32", "F64"]))
def test_any_sum_is_accurate(terms, result):
    assert_accurate([(weight, stored(values, name), name) for weight, values, name in terms], result)


@given(st.integers(0, 9000), st.integers(0, 9000))
def test_a_sum_does_not_depend_on_how_it_is_divided(a, b):
    random = np.random.default_rng(23)
    terms = [(random.normal(), stored(random.normal(size=9000), name), name) for name in ("BF16", "F32", "F16")]
    whole, _ = total(terms, "BF16")
    first, last = sorted((a, b))
    parts = [(w, x[first * SIZES[name] : last * SIZES[name]], name) for w, x, name in terms]
    np.testing.assert_array_equal(total(parts, "BF16")[0], whole[2 * first : 2 * last])


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_may_lie_at_any_address(dtype):
    # A header of another length than a multiple of eight leaves the tensors of a file unaligned.
    values = stored(np.random.default_rng(29).normal(size=5000), dtype)
    shifted = np.empty(values.size + 1, np.uint8)[1:]
    shifted[:] = values
    np.testing.assert_array_equal(total([(0.5, shifted, dtype)], dtype)[0], total([(0.5, values, dtype)], dtype)[0])
    assert count_non_finite(shifted, dtype) == 0


def test_inputs_are_left_as_they_are():
    values = stored(np.arange(100.0), "F32")
    values.setflags(write=False)
    total([(0.5, values, "F32"), (0.5, values, "F32")], "BF16")
    np.testing.assert_array_equal(values.view(np.float32), np.arange(100.0))


# ---- zeros and what is not finite ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("terms", "negative"),
    [
        ([(1.0, -0.0)], True),
        ([(0.5, -0.0), (0.5, -0.0)], True),
        ([(-0.5, 0.0)], True),
        ([(1.0, 0.0)], False),
        ([(0.5, -0.0), (0.5, 0.0)], False),
        ([(1.0, 1.0), (-1.0, 1.0)], False),
    ],
)
def test_zeros_have_the_sign_of_ieee_754(dtype, terms, negative):
    got, _ = total([(weight, stored([value], dtype), dtype) for weight, value in terms], dtype)
    zero = as_float64(got.tobytes(), dtype)[0]
    assert zero == 0
    assert np.signbit(zero) == negative


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_what_is_too_small_becomes_a_zero_of_its_sign(dtype):
    got, bad = total([(1.0, stored([1e-60, -1e-60], "F64"), "F64")], dtype)
    assert_same(as_float64(got.tobytes(), dtype), np.array([0.0, -0.0]))
    assert bad == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_too_large_becomes_infinite_and_is_counted(dtype):
    largest = stored([LARGEST[dtype], -LARGEST[dtype], 1.0], dtype)
    got, bad = total([(1.0, largest, dtype)], dtype)
    np.testing.assert_array_equal(got, largest)
    assert bad == 0
    got, bad = total([(2.0, largest, dtype)], dtype)
    np.testing.assert_array_equal(as_float64(got.tobytes(), dtype), [np.inf, -np.inf, 2.0])
    assert bad == 2


@pytest.mark.parametrize(("source", "result"), list(product(DTYPES, DTYPES)))
def test_nan_and_infinity_go_through_and_are_counted(source, result):
    values = np.tile([1.0, np.nan, np.inf, -np.inf, -0.0], 1000)
    got, bad = total([(0.5, stored(values, source), source), (0.5, stored(np.ones(5000), source), source)], result)
    np.testing.assert_array_equal(as_float64(got.tobytes(), result), np.tile([1, np.nan, np.inf, -np.inf, 0.5], 1000))
    assert bad == 3000


@pytest.mark.parametrize(("source", "result"), list(product(DTYPES, DTYPES)))
def test_every_nan_is_written_as_one_pattern(source, result):
    patterns = {
        "BF16": np.array([0x7FC0, 0xFFC0, 0x7F81, 0xFFFF], np.uint16),
        "F16": np.array([0x7E00, 0xFE00, 0x7C01, 0xFFFF], np.uint16),
        "F32": np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], np.uint32),
        "F64": np.array([0x7FF8 << 48, 0xFFF8 << 48, (0x7FF0 << 48) + 1, (1 << 64) - 1], np.uint64),
    }
    quiet = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000, "F64": 0x7FF8 << 48}
    got, bad = total([(-1.0, patterns[source].view(np.uint8), source)], result)
    assert got.view(patterns[result].dtype).tolist() == [quiet[result]] * 4
    assert bad == 4


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_values_that_are_not_finite_are_counted(dtype, data):
    content = data.draw(st.binary(max_size=400).map(lambda raw: raw[: len(raw) // 8 * 8]))
    values = np.frombuffer(content, np.uint8)
    assert count_non_finite(values, dtype) == np.sum(~np.isfinite(as_float64(content, dtype)))


# ---- misuse -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given_bytes", "out_bytes"), [(8, 12), (12, 8), (7, 8), (0, 4), (4, 0)])
def test_sizes_that_do_not_fit_are_refused(given_bytes, out_bytes):
    with pytest.raises(ValueError, match="elements"):
        weighted_sum([(1.0, np.zeros(given_bytes, np.uint8), "F32")], np.zeros(out_bytes, np.uint8), "F32")


def test_a_short_term_among_others_is_refused():
    terms = [(1.0, np.zeros(8, np.uint8), "F32"), (1.0, np.zeros(4, np.uint8), "F32")]
    with pytest.raises(ValueError, match="4 bytes of F32 are not 2 elements"):
        weighted_sum(terms, np.zeros(8, np.uint8), "F32")


def test_an_output_of_half_an_element_is_refused():
    with pytest.raises(ValueError, match="elements"):
        weighted_sum([(1.0, np.zeros(4, np.uint8), "F32")], np.zeros(5, np.uint8), "F32")
    with pytest.raises(ValueError):
        count_non_finite(np.zeros(5, np.uint8), "F32")


@pytest.mark.parametrize("dtype", ["I64", "F8_E4M3"])
def test_types_without_arithmetic_are_refused(dtype):
    with pytest.raises(KeyError):
        weighted_sum([(1.0, np.zeros(8, np.uint8), dtype)], np.zeros(8, np.uint8), "F32")

"""Arithmetic on blocks of stored values. Knows bit patterns; knows nothing of tensors, names or files.

Values come as bytes (`uint8` arrays) with the name of their type; nothing here allocates more than a few
pages, and everything runs without the interpreter's lock, so threads compute in parallel.

Sums are accumulated in float64 in the order of the terms and rounded to nearest, ties to even: float32
accumulation, which the storage hides no better, would add up to n * 2^-24 of the terms' size.
There is no contraction to fused multiply-add (no `fastmath`) and every NaN is written as one pattern, so
the bytes do not depend on the CPU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

CODES = {"BF16": 0, "F16": 1, "F32": 2, "F64": 3}
ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
_CHUNK = 1024  # elements: what a chunk needs stays in the first-level cache


def compiled(function: Callable[..., Any]) -> Any:
    """Compile on first use; keep the machine code on disk where a folder for it is writable."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no writable place for a cache (a read-only image): compile in every process
        return njit(nogil=True)(function)


_INT32 = ir.IntType(32)

# ---- bit patterns -------------------------------------------------------------------------------------


@intrinsic
def float_of(_context: Any, bits: Any) -> Any:
    """The float32 with these 32 bits."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def bits_of(_context: Any, value: Any) -> Any:
    """The 32 bits of a float32."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def _pointer_to(element: Any) -> Any:
    @intrinsic
    def pointer(_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, _s: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(types.CPointer(element)))

        return types.CPointer(element)(types.uint64), generate

    return pointer


to_uint16, to_uint32 = _pointer_to(types.uint16), _pointer_to(types.uint32)
to_float32, to_float64 = _pointer_to(types.float32), _pointer_to(types.float64)


@compiled
def from_bfloat16(x: Any) -> Any:
    return float_of(np.uint32(x) << np.uint32(16))


@compiled
def from_float16(x: Any) -> Any:
    """Shift the exponent and mantissa into place and scale by 2^112, which also normalises subnormals."""
    magnitude = np.uint32(x & np.uint16(0x7FFF)) << np.uint32(13)
    sign = np.uint32(x & np.uint16(0x8000)) << np.uint32(16)
    scaled = bits_of(float_of(magnitude) * np.float32(5.192296858534828e33))
    if magnitude >= np.uint32(0x0F800000):  # infinity and NaN keep their mantissa
        scaled = magnitude | np.uint32(0x7F800000)
    return float_of(scaled | sign)


@compiled
def _to_odd(value: Any) -> Any:
    """A float64 as float32, an inexact one to the neighbour with an odd last bit: rounding that again is rounding once.

    Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008, theorem 3.
    """
    near = np.float32(value)
    back = np.float64(near)
    bits = bits_of(near)
    if back != value:
        if abs(back) > abs(value):
            bits -= np.uint32(1)  # towards zero
        bits |= np.uint32(1)
    return float_of(bits)


# These three are written in the compiler's own instructions: numba widens sums of 32-bit integers to 64 bits, and
# half as many fit into a register.


@intrinsic
def to_bfloat16(_context: Any, value: Any) -> Any:
    """The bits of a float32 rounded to BF16, to nearest, ties to even."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _INT32)
        odd = builder.and_(builder.lshr(bits, _INT32(16)), _INT32(1))
        rounded = builder.lshr(builder.add(builder.add(bits, _INT32(0x7FFF)), odd), _INT32(16))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(is_nan, _INT32(0x7FC0), rounded), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def _is_hard(_context: Any, value: Any) -> Any:
    """1 for a float32 in the middle between two BF16, one that BF16 holds only as infinity, or NaN; else 0."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _INT32)
        tie = builder.icmp_unsigned("==", builder.and_(bits, _INT32(0xFFFF)), _INT32(0x8000))
        endless = builder.icmp_unsigned(">=", builder.and_(bits, _INT32(0x7FFFFFFF)), _INT32(0x7F7F8000))
        return builder.zext(builder.or_(tie, endless), _INT32)

    return types.uint32(types.float32), generate


@intrinsic
def _either(_context: Any, a: Any, b: Any) -> Any:
    """The bits of both."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        return builder.or_(args[0], args[1])

    return types.uint32(types.uint32, types.uint32), generate


@compiled
def to_float16(value: Any) -> Any:
    bits = bits_of(value)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    # Normal numbers: move the exponent by 112 and round on the 13 bits that go.
    normal = (
        magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + ((magnitude >> np.uint32(13)) & np.uint32(1))
    ) >> np.uint32(13)
    # Subnormal numbers: adding 0.5 lets the float32 adder round at 2^-24, the last place of float16.
    subnormal = bits_of(float_of(magnitude) + np.float32(0.5)) - np.uint32(0x3F000000)
    half = normal if magnitude >= np.uint32(0x38800000) else subnormal
    if magnitude >= np.uint32(0x477FF000):  # rounds to 65536 or more
        half = np.uint32(0x7C00)
    if magnitude > np.uint32(0x7F800000):
        half = np.uint32(0x7E00)
        sign = np.uint32(0)
    return np.uint16(half | sign)


# ---- the weighted sum ---------------------------------------------------------------------------------


@compiled
def _accumulate(sums: Any, address: Any, code: Any, weight: Any, first: Any) -> None:
    """sums[i] = weight * x[i] for the `first` term, += for the others; x is the array of type `code` at `address`."""
    if code == 0:
        bfloats = carray(to_uint16(address), sums.size)
        for i in range(sums.size):
            term = weight * np.float64(from_bfloat16(bfloats[i]))
            sums[i] = term if first else sums[i] + term
    elif code == 1:
        halves = carray(to_uint16(address), sums.size)
        for i in range(sums.size):
            term = weight * np.float64(from_float16(halves[i]))
            sums[i] = term if first else sums[i] + term
    elif code == 2:
        floats = carray(to_float32(address), sums.size)
        for i in range(sums.size):
            term = weight * np.float64(floats[i])
            sums[i] = term if first else sums[i] + term
    else:
        doubles = carray(to_float64(address), sums.size)
        for i in range(sums.size):
            term = weight * doubles[i]
            sums[i] = term if first else sums[i] + term


@compiled
def _count_exponents(values: Any, mask: Any) -> Any:
    bad = np.int64(0)
    for i in range(values.size):
        bad += np.int64((values[i] & mask) == mask)
    return bad


@compiled
def _round_to_bfloat16(sums: Any, floats: Any, bfloats: Any) -> Any:
    """Write `sums` as BF16, by way of the nearest float32 where that is the same, else of the odd one."""
    for i in range(sums.size):
        floats[i] = np.float32(sums[i])
    hard = np.uint32(0)
    for i in range(sums.size):
        hard = _either(hard, _is_hard(floats[i]))
    if hard:
        for i in range(sums.size):
            floats[i] = _to_odd(sums[i])
    for i in range(sums.size):
        bfloats[i] = to_bfloat16(floats[i])
    return _count_exponents(bfloats, np.uint16(0x7F80)) if hard else 0


@compiled
def round_sums(sums: Any, floats: Any, address: Any, code: Any) -> Any:
    """Write `sums` as type `code` at `address`; return how many are not finite. `floats` is scratch of their size."""
    bad = np.int64(0)
    if code == 0:
        bad += _round_to_bfloat16(sums, floats, carray(to_uint16(address), sums.size))
    elif code == 1:
        halves = carray(to_uint16(address), sums.size)
        for i in range(sums.size):
            h = to_float16(_to_odd(sums[i]))
            halves[i] = h
            bad += np.int64((h & np.uint16(0x7C00)) == np.uint16(0x7C00))
    elif code == 2:
        floats = carray(to_float32(address), sums.size)
        for i in range(sums.size):
            f = np.float32(sums[i])
            floats[i] = f if f == f else np.float32(np.nan)
            bad += np.int64(not abs(f) < np.float32(np.inf))
    else:
        doubles = carray(to_float64(address), sums.size)
        for i in range(sums.size):
            d = sums[i]
            doubles[i] = d if d == d else np.nan
            bad += np.int64(not abs(d) < np.inf)
    return bad


@compiled
def _weighted_sum(
    addresses: Any, codes: Any, sizes: Any, weights: Any, out: Any, out_code: Any, out_size: Any, count: Any
) -> Any:
    bad = np.int64(0)
    buffer = np.empty(_CHUNK, np.float64)
    scratch = np.empty(_CHUNK, np.float32)
    for start in range(0, count, _CHUNK):
        sums = buffer[: min(_CHUNK, count - start)]
        for term in range(addresses.size):
            _accumulate(sums, addresses[term] + np.uint64(start * sizes[term]), codes[term], weights[term], term == 0)
        bad += round_sums(sums, scratch[: sums.size], out + np.uint64(start * out_size), out_code)
    return bad


def weighted_sum(terms: Sequence[tuple[float, Bytes, str]], out: Bytes, out_dtype: str) -> int:
    """`out = sum of weight * values`, element by element; returns how many results are not finite.

    `terms` are (weight, values, dtype name); `out` is filled with values of `out_dtype`. All arrays are
    contiguous and hold the same number of elements, of any of BF16, F16, F32, F64.
    """
    count, rest = divmod(out.size, ITEMSIZE[out_dtype])
    if rest:
        raise ValueError(f"{out.size} bytes are no whole number of {out_dtype} elements")
    for _, values, dtype in terms:
        if values.size != count * ITEMSIZE[dtype]:
            raise ValueError(f"{values.size} bytes of {dtype} are not {count} elements")
    return int(
        _weighted_sum(
            np.array([values.ctypes.data for _, values, _ in terms], np.uint64),
            np.array([CODES[dtype] for *_, dtype in terms], np.int64),
            np.array([ITEMSIZE[dtype] for *_, dtype in terms], np.int64),
            np.array([weight for weight, *_ in terms], np.float64),
            np.uint64(out.ctypes.data),
            CODES[out_dtype],
            ITEMSIZE[out_dtype],
            count,
        )
    )


_EXPONENTS: dict[str, np.unsignedinteger[Any]] = {
    "BF16": np.uint16(0x7F80),
    "F16": np.uint16(0x7C00),
    "F32": np.uint32(0x7F800000),
    "F64": np.uint64(0x7FF0000000000000),
}


def count_non_finite(values: Bytes, dtype: str) -> int:
    """How many of the values, bytes of a floating `dtype`, are NaN or infinite."""
    mask = _EXPONENTS[dtype]
    return int(_count_exponents(values.view(mask.dtype), mask))


def load() -> None:
    """Load the kernels from the cache on disk, or compile them: a quarter of a second, the first time a few seconds."""
    nothing = np.zeros(8, np.uint8)
    weighted_sum([(1.0, nothing, "F32")], nothing, "F32")
    count_non_finite(nothing, "BF16")


# ---- measures -----------------------------------------------------------------------------------------


@compiled
def widen(values: Any, address: Any, code: Any) -> None:
    """The array of type `code` at `address` as float64."""
    _accumulate(values, address, code, 1.0, True)


@compiled
def _compare(a: Any, a_code: Any, a_size: Any, b: Any, b_code: Any, b_size: Any, count: Any) -> Any:
    totals = np.zeros(5)
    left, right = np.empty(_CHUNK), np.empty(_CHUNK)
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        x, y = left[:size], right[:size]
        widen(x, a + np.uint64(start * a_size), a_code)
        widen(y, b + np.uint64(start * b_size), b_code)
        for i in range(size):
            d = x[i] - y[i]
            totals[0] += x[i] * x[i]
            totals[1] += y[i] * y[i]
            totals[2] += x[i] * y[i]
            totals[3] += d * d
            totals[4] = max(totals[4], abs(d))
    return totals


def compare(a: Bytes, a_dtype: str, b: Bytes, b_dtype: str) -> tuple[float, float, float, float, float]:
    """Sums over pairs of a^2, b^2, ab and (a - b)^2 in float64, and the largest |a - b|."""
    count = a.size // ITEMSIZE[a_dtype]
    if b.size != count * ITEMSIZE[b_dtype]:
        raise ValueError(f"{b.size} bytes of {b_dtype} are not {count} elements")
    totals = _compare(
        np.uint64(a.ctypes.data),
        CODES[a_dtype],
        ITEMSIZE[a_dtype],
        np.uint64(b.ctypes.data),
        CODES[b_dtype],
        ITEMSIZE[b_dtype],
        count,
    )
    aa, bb, ab, dd, largest = (float(total) for total in totals)
    return aa, bb, ab, dd, largest


@compiled
def _add_moments(address: Any, code: Any, size: Any, mask: Any, totals: Any) -> None:
    buffer = np.empty(_CHUNK)
    for start in range(0, mask.size, _CHUNK):
        values = buffer[: min(_CHUNK, mask.size - start)]
        widen(values, address + np.uint64(start * size), code)
        for i in range(values.size):
            if mask[start + i]:
                totals[0] += values[i]
                totals[1] += values[i] * values[i]


def add_moments(values: Bytes, dtype: str, mask: NDArray[np.bool_], totals: NDArray[np.float64]) -> None:
    """Add the sum and the sum of squares of the values where the mask is set to `totals`, one after the other."""
    _add_moments(np.uint64(values.ctypes.data), CODES[dtype], ITEMSIZE[dtype], mask, totals)

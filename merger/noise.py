"""Normal random numbers that depend on nothing but a key and an element's index.

Knows no tensors and no seeds. Philox-4x64-10 (Salmon et al., SC'11) gives 64 bits for each index, the inverse of the
normal distribution function (Wichura, AS 241, 1988) makes a number of them. Both use only operations that IEEE 754
rounds correctly (the logarithm is a series of ours), so the numbers are the same on every processor.
"""

import hashlib
import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types, uint64
from numba.extending import intrinsic

from merger.kernels import Bytes, compiled

Key = tuple[int, int]

_MULTIPLY_0, _MULTIPLY_1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)


def key_of(seed: int, name: str) -> Key:
    """The key of a tensor's numbers: 128 bits of the SHA-256 of the seed and the tensor's name."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def normal(key: Key, start: int, count: int) -> Bytes:
    """Standard normal numbers `start` to `start + count` of a key: float64, as bytes."""
    out = np.empty(count, np.float64)
    _fill_normal(np.uint64(key[0]), np.uint64(key[1]), np.uint64(start), out)
    return out.view(np.uint8)


def choose(key: Key, share: float, count: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """A random choice of exactly floor(share * count) of `count`, as a mask: those with the smallest numbers."""
    numbers = normal(key, 0, count).view(np.float64)
    mask = np.zeros(count, np.bool_)
    mask[np.argsort(numbers, kind="stable")[: math.floor(share * count)]] = True
    return mask


@compiled
def _fill_normal(key_0: Any, key_1: Any, start: Any, out: Any) -> None:
    block = start // uint64(4)
    lane: Any = np.int64(start % uint64(4))
    numbers = philox(block, key_0, key_1)
    for i in range(out.size):
        out[i] = _inverse_normal(numbers[lane])
        lane += 1
        if lane == 4:
            lane = 0
            block += uint64(1)
            numbers = philox(block, key_0, key_1)


@intrinsic
def _high(_context: Any, a: Any, b: Any) -> Any:
    """The upper 64 bits of the product of two 64-bit integers."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(builder.zext(args[0], wide), builder.zext(args[1], wide))
        return builder.trunc(builder.lshr(product, wide(64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


@compiled
def philox(block: Any, key_0: Any, key_1: Any) -> Any:
    """Four 64-bit numbers for a counter (whose upper 192 bits are zero)."""
    c0, c1, c2, c3 = block, uint64(0), uint64(0), uint64(0)
    for _ in range(10):
        high_0, low_0 = _high(_MULTIPLY_0, c0), _MULTIPLY_0 * c0
        high_1, low_1 = _high(_MULTIPLY_1, c2), _MULTIPLY_1 * c2
        c0, c1, c2, c3 = high_1 ^ c1 ^ key_0, low_1, high_0 ^ c3 ^ key_1, low_0
        key_0 += _WEYL_0
        key_1 += _WEYL_1
    return c0, c1, c2, c3


@compiled
def _inverse_normal(bits: Any) -> Any:
    """The normal number below which a share (bits + 1/2) / 2^53 of all lie, for the upper 53 of 64 bits."""
    share: Any = (np.float64(bits >> uint64(11)) + 0.5) * 2.0**-53
    q = share - 0.5
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        return q * _polynomial(_A, r) / _polynomial(_B, r)
    r = math.sqrt(-_logarithm(share if q < 0 else 1.0 - share))
    if r <= 5.0:
        x = _polynomial(_C, r - 1.6) / _polynomial(_D, r - 1.6)
    else:
        x = _polynomial(_E, r - 5.0) / _polynomial(_F, r - 5.0)
    return -x if q < 0 else x


@compiled
def _polynomial(coefficients: Any, x: Any) -> Any:
    value: Any = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


@compiled
def _logarithm(x: Any) -> Any:
    """The natural logarithm, to about an ulp: 2 artanh((m - 1) / (m + 1)) of the mantissa, plus the exponent's part."""
    mantissa, exponent = math.frexp(x)
    if mantissa < 0.7071067811865476:
        mantissa *= 2.0
        exponent -= 1
    s = (mantissa - 1.0) / (mantissa + 1.0)
    return 2.0 * s * _polynomial(_ARTANH, s * s) + exponent * 0.6931471805599453


# Coefficients, highest power first: 1 / (2 i + 1) for artanh, the others from AS 241 (PPND16).
_ARTANH = tuple(1.0 / (2 * i + 1) for i in range(12, -1, -1))
_A = (
    2.5090809287301226727e3,
    3.3430575583588128105e4,
    6.7265770927008700853e4,
    4.5921953931549871457e4,
    1.3731693765509461125e4,
    1.9715909503065514427e3,
    1.3314166789178437745e2,
    3.3871328727963666080e0,
)
_B = (
    5.2264952788528545610e3,
    2.8729085735721942674e4,
    3.9307895800092710610e4,
    2.1213794301586595867e4,
    5.3941960214247511077e3,
    6.8718700749205790830e2,
    4.2313330701600911252e1,
    1.0,
)
_C = (
    7.74545014278341407640e-4,
    2.27238449892691845833e-2,
    2.41780725177450611770e-1,
    1.27045825245236838258e0,
    3.64784832476320460504e0,
    5.76949722146069140550e0,
    4.63033784615654529590e0,
    1.42343711074968357734e0,
)
_D = (
    1.05075007164441684324e-9,
    5.47593808499534494600e-4,
    1.51986665636164571966e-2,
    1.48103976427480074590e-1,
    6.89767334985100004550e-1,
    1.67638483018380384940e0,
    2.05319162663775882187e0,
    1.0,
)
_E = (
    2.01033439929228813265e-7,
    2.71155556874348757815e-5,
    1.24266094738807843860e-3,
    2.65321895265761230930e-2,
    2.96560571828504891230e-1,
    1.78482653991729133580e0,
    5.46378491116411436990e0,
    6.65790464350110377720e0,
)
_F = (
    2.04426310338993978564e-15,
    1.42151175831644588870e-7,
    1.84631831751005468180e-5,
    7.86869131145613259100e-4,
    1.48753612908506148525e-2,
    1.36929880922735805310e-1,
    5.99832206555887937690e-1,
    1.0,
)

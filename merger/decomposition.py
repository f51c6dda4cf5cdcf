"""Small dense matrices: triangular factors of tall ones, singular values, products. Knows no tensors.

Plain loops instead of LAPACK and BLAS, whose order of addition follows the processor and the number of threads. Sums
run in a fixed order in float64, divisions and square roots are rounded correctly by IEEE 754, so the numbers are the
same on every processor.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from merger.kernels import compiled

Matrix = NDArray[np.float64]

_SWEEPS = 60  # of Jacobi rotations; about ten are needed
_PRECISION = 2.0**-52


def triangular(rank: int) -> Matrix:
    """The triangular factor of no rows yet, for `absorb`."""
    return np.zeros((rank, rank))


def absorb(factor: Matrix, columns: Matrix) -> Matrix:
    """The triangular factor R of a tall matrix Q R that more rows are put under.

    `factor` [r, r] is that of the rows so far, `columns` [r, n] the new rows, a column each. Householder reflections
    (Golub and Van Loan, Matrix computations, 5.2.1), block after block: Q is never formed.
    """
    work = np.ascontiguousarray(np.concatenate([factor.T, columns], axis=1))
    _reflect(work)
    return np.ascontiguousarray(work[:, : len(factor)].T)


@compiled
def dot(a: Any, b: Any) -> Any:
    """Eight sums side by side: an order that any processor can keep and the wide ones can use."""
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = 0.0
    whole = a.size - a.size % 8
    for i in range(0, whole, 8):
        s0 += a[i] * b[i]
        s1 += a[i + 1] * b[i + 1]
        s2 += a[i + 2] * b[i + 2]
        s3 += a[i + 3] * b[i + 3]
        s4 += a[i + 4] * b[i + 4]
        s5 += a[i + 5] * b[i + 5]
        s6 += a[i + 6] * b[i + 6]
        s7 += a[i + 7] * b[i + 7]
    total = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))
    for i in range(whole, a.size):
        total += a[i] * b[i]
    return total


@compiled
def _reflect(columns: Any) -> None:
    """Make the matrix whose columns are the rows of `columns` upper triangular, in place."""
    for k in range(columns.shape[0]):
        v = columns[k, k:]
        largest = 0.0
        for i in range(v.size):
            largest = max(largest, abs(v[i]))
        if largest == 0.0:
            continue
        for i in range(v.size):
            v[i] /= largest  # so that no square leaves the range of float64
        norm = np.sqrt(dot(v, v))
        pivot = -norm if v[0] > 0 else norm
        v[0] -= pivot
        half = dot(v, v) / 2
        for j in range(k + 1, columns.shape[0]):
            other = columns[j, k:]
            along = dot(v, other) / half
            for i in range(v.size):
                other[i] -= along * v[i]
        v[:] = 0.0
        v[0] = pivot * largest


@compiled
def _orthogonalize(rows: Any, turned: Any) -> None:
    """Rotate pairs of rows until all are orthogonal, and those of `turned` along (one-sided Jacobi, Hestenes 1958)."""
    count = rows.shape[0]
    for _ in range(_SWEEPS):
        rotations = 0
        for p in range(count - 1):
            for q in range(p + 1, count):
                a, b, c = dot(rows[p], rows[p]), dot(rows[q], rows[q]), dot(rows[p], rows[q])
                if abs(c) <= _PRECISION * np.sqrt(a) * np.sqrt(b):
                    continue
                rotations += 1
                zeta = (b - a) / (2.0 * c)
                tangent = (1.0 if zeta >= 0 else -1.0) / (abs(zeta) + np.sqrt(1.0 + zeta * zeta))
                cosine = 1.0 / np.sqrt(1.0 + tangent * tangent)
                _rotate(rows[p], rows[q], cosine, cosine * tangent)
                _rotate(turned[p], turned[q], cosine, cosine * tangent)
        if rotations == 0:
            return


@compiled
def _rotate(p: Any, q: Any, cosine: Any, sine: Any) -> None:
    for i in range(p.size):
        x, y = p[i], q[i]
        p[i] = cosine * x - sine * y
        q[i] = sine * x + cosine * y


def svd(matrix: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """U^T, the singular values in falling order, V^T of a square matrix; rows of U^T for a value of 0 are 0."""
    rows, turned = matrix.T.copy(), np.eye(len(matrix))
    scale = float(np.abs(rows).max(initial=0.0))
    if scale == 0.0:
        return np.zeros_like(rows), np.zeros(len(rows)), turned
    rows /= scale
    _orthogonalize(rows, turned)
    values = np.array([np.sqrt(dot(row, row)) for row in rows])
    order = np.argsort(-values, kind="stable")
    rows, values, turned = rows[order], values[order], turned[order]
    some = values > _PRECISION * len(values) * values[0]
    return np.where(some[:, None], rows / np.where(some, values, 1.0)[:, None], 0.0), values * scale * some, turned


# ---- products -----------------------------------------------------------------------------------------

_TILE = 2048  # columns: a tile of the right factor stays in the second-level cache


@compiled
def _multiply(left: Any, right: Any, first: Any, out: Any) -> None:
    width = right.shape[1]
    rank = right.shape[0]
    whole = rank - rank % 4
    for tile in range(0, width, _TILE):
        for i in range(left.shape[0]):
            begin = max(tile, first - i * width)
            end = min(tile + _TILE, width, first + out.size - i * width)
            if begin >= end:
                continue
            sums = out[i * width + begin - first : i * width + end - first]
            sums[:] = 0.0
            for k in range(0, whole, 4):
                b0, b1, b2, b3 = left[i, k], left[i, k + 1], left[i, k + 2], left[i, k + 3]
                a0, a1 = right[k, begin:end], right[k + 1, begin:end]
                a2, a3 = right[k + 2, begin:end], right[k + 3, begin:end]
                for j in range(sums.size):
                    sums[j] = (((sums[j] + b0 * a0[j]) + b1 * a1[j]) + b2 * a2[j]) + b3 * a3[j]
            for k in range(whole, rank):
                b0, a0 = left[i, k], right[k, begin:end]
                for j in range(sums.size):
                    sums[j] += b0 * a0[j]


def multiply(left: Matrix, right: Matrix, first: int = 0, count: int | None = None) -> Matrix:
    """Elements `first` to `first + count` (all without) of left [m, r] times right [r, n], row after row.

    Each is summed over r in order.
    """
    out = np.empty(left.shape[0] * right.shape[1] - first if count is None else count)
    _multiply(np.ascontiguousarray(left), np.ascontiguousarray(right), first, out)
    return out

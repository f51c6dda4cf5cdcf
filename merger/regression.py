"""The regression mean of matrices: RegMean, written from arXiv 2212.09849, in float64.

Knows torch; knows nothing of models, files or memory. Of linear layers W_i [m, n] whose inputs X_i [tokens, n] have the
Gram matrices G_i = X_i^T X_i it is the one layer W that minimises the sum over i of |X_i W^T - X_i W_i^T|^2.

It is sought as a change of the plain mean: where no inputs tell anything the mean stays, and equal matrices stay
themselves.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Load = Callable[[int], "Tensor"]  # a matrix or a Gram matrix, in fresh memory
ROUNDING = 2.0**-23  # of Gram matrices, which are stored in float32


def regression_mean(load: Load, shares: Sequence[float], weights: Sequence[float], alpha: float) -> "Tensor":
    """The matrix [m, n] of the matrices `load(i)` and the Gram matrices `load(count + i)`, each of which counts by its
    weight. Off its diagonal a Gram matrix is multiplied by `alpha` (equation 2 and section 3.2 of the paper); the mean
    has the `shares`.
    """
    count = len(shares)
    mean = load(0).double() * shares[0]
    for i in range(1, count):
        mean += load(i).double() * shares[i]
    total, right = mean.new_zeros(mean.shape[1], mean.shape[1]), mean.new_zeros(mean.shape[1], mean.shape[0])
    for i in range(count):
        gram = load(count + i).double() * weights[i]
        diagonal = gram.diagonal().clone()
        gram *= alpha
        gram.diagonal().copy_(diagonal)
        right += gram @ (load(i).double() - mean).T
        total += gram
    return mean + solution(total, right).T


def solution(total: "Tensor", right: "Tensor") -> "Tensor":
    """The solution of total x = right, total [n, n] symmetric and not negative; the smallest one in units of its
    diagonal's roots where there are many. What lies below the rounding of Gram matrices counts as nothing.
    """
    import torch

    diagonal = total.diagonal()
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    scaled = total * scale * scale[:, None]
    scaled.diagonal().copy_((diagonal > 0).double() + (diagonal <= 0).double())
    right = right * scale[:, None]
    least = len(total) * ROUNDING
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if not failed and float(factor.diagonal().min()) ** 2 > least:
        found = torch.cholesky_solve(right, factor)
    else:
        values, vectors = torch.linalg.eigh(scaled)
        kept = vectors[:, values > least * values[-1]]
        found = kept @ ((kept.T @ right) / values[values > least * values[-1]][:, None])
    answer: Tensor = found * scale[:, None]
    return answer

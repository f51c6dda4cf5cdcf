"""Merges of task vectors by their singular values, of one matrix each: formulas in float64, written from the papers.

Knows torch's decompositions; knows nothing of models, files or memory. A task vector is a fine-tune's matrix [m, n]
less its base's. Directions whose singular value is nothing but rounding (below eps * max(m, n) * the largest) carry no
task: a decomposition fills them with whatever it likes, so they are left out.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Load = Callable[[int], "Tensor"]  # one task vector, in fresh memory
_EPS = 2.0**-52


def svd(matrix: "Tensor") -> "tuple[Tensor, Tensor, Tensor]":
    """U [m, r], the singular values [r] in falling order and V^T [r, n] of a matrix of the rank r."""
    import torch

    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((s > s[:1] * (_EPS * max(matrix.shape))).sum())
    return u[:, :rank], s[:rank], vt[:rank]


def orthogonal(matrix: "Tensor") -> "Tensor":
    """The nearest matrix with orthonormal columns (or rows, where it is wide): P Q^T of the decomposition P D Q^T
    (orthogonal Procrustes, Schoenemann 1966).
    """
    import torch

    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = u @ vt
    return nearest


def tsv(load: Load, count: int) -> "Tensor":
    """TSV-M (arXiv 2412.00081, algorithm 1) of `count` task vectors: of each the largest min(m, n) / count singular
    values (rounded down), their left and their right vectors side by side made orthonormal.
    """
    import torch

    lefts, values, rights, shape = [], [], [], load(0).shape
    for index in range(count):
        u, s, vt = svd(load(index))
        kept = min(shape) // count
        lefts.append(u[:, :kept].clone())
        values.append(s[:kept].clone())
        rights.append(vt[:kept].clone())
    left, right, scale = torch.cat(lefts, 1), torch.cat(rights), torch.cat(values)
    if not len(scale):
        return load(0)  # all are zero
    return (orthogonal(left) * scale) @ orthogonal(right)


def iso_c(total: "Tensor") -> "Tensor":
    """Iso-C (arXiv 2502.04959, section 4.1): the sum of the task vectors with its singular values made equal to their
    mean; over those directions that it has.
    """
    u, s, vt = svd(total)
    return (u @ vt) * s.mean() if len(s) else total


def ranks_of_iso_cts(smallest: int, count: int, fraction: float) -> tuple[int, int]:
    """How many singular directions are common, and how many each task adds: so that all together are `smallest`."""
    each = round((smallest - int(smallest * fraction)) / count)
    while each * count > smallest:
        each -= 1
    return smallest - each * count, each


def iso_cts(load: Load, count: int, fraction: float) -> "Tensor":
    """Iso-CTS (arXiv 2502.04959, section 4.2). The first of what `load` gives is the sum, the `count` task vectors
    follow. Directions of the sum are common; each task adds those of what it has outside of their span.
    """
    import torch

    total = load(0)
    common, each = ranks_of_iso_cts(min(total.shape), count, fraction)
    u, s, vt = svd(total)
    lefts, values, rights = [u[:, :common].clone()], [s[:common].clone()], [vt[:common].clone()]
    del u, vt
    shared = lefts[0]
    for index in range(1, count + 1) if each else ():
        task = load(index)
        u, s, vt = _of_rest(task, shared)
        lefts.append(u[:, :each].clone())
        values.append(s[:each].clone())
        rights.append(vt[:each].clone())
    left, right, scale = torch.cat(lefts, 1), torch.cat(rights), torch.cat(values)
    return (orthogonal(left) @ orthogonal(right)) * scale.mean() if len(scale) else total


def _of_rest(task: "Tensor", shared: "Tensor") -> "tuple[Tensor, Tensor, Tensor]":
    """The decomposition of what a task vector has outside of the span of orthonormal columns; of what is more than the
    rounding that the subtraction leaves.
    """
    import torch

    rounding = _EPS * max(task.shape) * torch.linalg.matrix_norm(task)
    u, s, vt = svd(task - shared @ (shared.T @ task))
    rank = int((s > rounding).sum())
    return u[:, :rank], s[:rank], vt[:rank]


def wudi(load: Load, count: int) -> "Tensor":
    """The minimum that WUDI (arXiv 2503.08099) looks for, in closed form: m that minimizes the sum over the tasks of
    ||(m - tau) tau^T||^2 / ||tau||^2, and of all such that one in the span of the rows of the task vectors.

    With A = [tau / ||tau||; ...] = U S V^T and B = [tau tau^T / ||tau||, ...] it is B A (A^T A)^+ = B U S^-1 V^T.
    """
    import torch

    stacked, products = [], []
    for index in range(count):
        task = load(index)
        norm = torch.linalg.matrix_norm(task)
        if norm > 0:
            stacked.append(task / norm)
            products.append(task @ stacked[-1].T)
    if not stacked:
        return load(0)
    u, s, vt = svd(torch.cat(stacked))
    return ((torch.cat(products, 1) @ u) / s) @ vt


def wudi_by_steps(load: Load, count: int, steps: int, rate: float) -> "Tensor":
    """WUDI as the paper has it: `steps` of Adam (Kingma and Ba 2015, its defaults) from the sum of the task vectors."""
    import torch

    merged = torch.zeros_like(load(0))
    target, gram = torch.zeros_like(merged), merged.new_zeros(merged.shape[1], merged.shape[1])
    for index in range(count):
        task = load(index)
        norm = torch.linalg.matrix_norm(task)
        merged += task
        if norm > 0:
            task /= norm
            share = task.T @ task
            gram += share
            target.addmm_(task, share, alpha=float(norm))
    first, second = torch.zeros_like(merged), torch.zeros_like(merged)
    for step in range(1, steps + 1):
        slope = torch.addmm(target, merged, gram, beta=-2.0, alpha=2.0)
        first.mul_(0.9).add_(slope, alpha=0.1)
        second.mul_(0.999).addcmul_(slope, slope, value=0.001)
        size = second.div(1.0 - 0.999**step).sqrt_().add_(1e-8)
        merged.addcdiv_(first, size, value=-rate / (1.0 - 0.9**step))
    return merged


def svc(load: Load, count: int, alpha: float) -> "Tensor":
    """Singular value calibration (arXiv 2602.05536) of a merged change, which `load` gives first; the `count` task
    vectors follow. A direction u in which the change is s times that of a task is scaled by count / sum max(alpha, s).
    A task that has nothing in a direction counts there with alpha.
    """
    import torch

    u, values, vt = svd(load(0))
    total = torch.zeros_like(values)
    for index in range(1, count + 1):
        share = u.T @ load(index)
        size = share.square().sum(1)
        projected = (share * vt).sum(1) * values
        found = torch.where(size > 0, projected / torch.where(size > 0, size, 1.0), alpha)
        total += found.clamp(min=alpha)
    return (u * (values * count / total)) @ vt


def low_rank(matrix: "Tensor", rank: int, seed: int) -> "tuple[Tensor, Tensor]":
    """B [m, rank] and A [rank, n] whose product is nearly the best approximation of the rank: a randomized
    decomposition (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1) with four steps of power iteration; an
    exact one where the matrix is small or the rank is not. The singular values are shared evenly.
    """
    import torch

    smallest, sample = min(matrix.shape), rank + max(16, rank // 2)
    if smallest <= 512 or 2 * sample >= smallest:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        made = torch.Generator().manual_seed(seed)
        drawn = torch.randn(matrix.shape[1], sample, generator=made, dtype=matrix.dtype).to(matrix.device)
        basis = torch.linalg.qr(matrix @ drawn)[0]
        for _ in range(4):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
        inner, s, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ inner
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vt[:rank]

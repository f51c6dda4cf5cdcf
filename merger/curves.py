"""The weights of interpolations between tensors taken as vectors, from their dot products. Pure functions of numbers.

Where a rule is known by what mergekit 0.1.5 does, that is the definition, named by its file.
"""

import math
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from merger.blends import Curve, Gram

Vector = NDArray[np.float64]


def _cosine(gram: Gram, a: int, b: int, least: float) -> float:
    """The cosine between two vectors, norms under `least` taken for it."""
    norms = [max(math.sqrt(gram[i, i]), least) for i in (a, b)]
    return min(1.0, max(-1.0, float(gram[a, b]) / (norms[0] * norms[1])))


def _on_arc(cosine: float, t: float) -> tuple[float, float]:
    """The weights of the ends at a share t of the arc between them (Shoemake 1985)."""
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


@final
@dataclass(frozen=True)
class Slerp(Curve):
    """From the first to the second: 0 is the first. Straight where they are nearly parallel (slerp.py)."""

    t: float

    def weights(self, gram: Gram) -> tuple[float, ...]:
        cosine = _cosine(gram, 0, 1, 1e-8)
        return (1 - self.t, self.t) if abs(cosine) > 0.9995 else _on_arc(cosine, self.t)


@final
@dataclass(frozen=True)
class NuSlerp(Curve):
    """The same of two weights that need not sum to 1; straight only where they are parallel (nuslerp.py)."""

    t: float

    def weights(self, gram: Gram) -> tuple[float, ...]:
        cosine = _cosine(gram, 0, 1, 1e-7)
        return (1 - self.t, self.t) if 1 - cosine * cosine <= 1e-16 else _on_arc(cosine, self.t)


@final
@dataclass(frozen=True)
class MultiSlerp(Curve):
    """Many at once, by the tangent space at their mean direction (multislerp.py); norms are averaged."""

    shares: tuple[float, ...]
    eps: float

    def weights(self, gram: Gram) -> tuple[float, ...]:
        shares = np.array(self.shares)
        norms = np.sqrt(np.diag(gram))
        scale = 1.0 / (norms + self.eps)  # units are scale * vectors
        units = gram * scale[:, None] * scale
        length = _length(units, shares)
        if length < self.eps:
            return self._between_opposites()
        mean = shares / length  # coordinates along the units
        along = units @ mean  # of each unit on the mean
        tangent = shares - float(shares @ along) * mean
        angle = _length(units, tangent) + self.eps
        total = (mean * math.cos(angle) + tangent * (math.sin(angle) / angle)) * float(norms @ shares)
        return tuple(float(weight) for weight in total * scale)

    def _between_opposites(self) -> tuple[float, ...]:
        if len(self.shares) == 2:
            return self.shares
        raise ValueError("the weighted directions cancel: no mean direction is left; take other weights")


def _length(gram: Gram, coordinates: Vector) -> float:
    """The norm of a sum of vectors."""
    return math.sqrt(max(0.0, float(coordinates @ gram @ coordinates)))


@final
@dataclass(frozen=True)
class Karcher(Curve):
    """The mean on the sphere: steps along the mean of the directions to all, until they are short (karcher.py); times
    the mean norm.
    """

    count: int
    steps: int
    tolerance: float

    def weights(self, gram: Gram) -> tuple[float, ...]:
        if self.count == 1:
            return (1.0,)
        norms = np.sqrt(np.diag(gram))
        valid = norms > self.tolerance
        if not valid.any():
            return (0.0,) * self.count
        scale = np.where(valid, 1.0 / np.where(valid, norms, 1.0), 0.0)
        units = gram * scale[:, None] * scale
        shares = valid / valid.sum()
        mean = self._mean(units, shares, valid)
        return tuple(float(weight) for weight in mean * scale * norms.sum() / self.count)

    def _mean(self, units: Gram, shares: Vector, valid: NDArray[np.bool_]) -> Vector:
        """The mean direction, in coordinates along the units."""
        length = _length(units, shares)
        mean = shares / length if length >= self.tolerance else np.eye(self.count)[int(valid.argmax())]
        for _ in range(self.steps):
            tangent = self._tangent(units, shares, mean, valid)
            length = _length(units, tangent)
            if length < self.tolerance:
                break
            mean = math.cos(length) * mean + math.sin(length) / length * tangent
            mean = mean / max(_length(units, mean), self.tolerance)
        return mean

    def _tangent(self, units: Gram, shares: Vector, mean: Vector, valid: NDArray[np.bool_]) -> Vector:
        tangent = np.zeros(self.count)
        for i in np.flatnonzero(valid):
            cosine = min(1.0, max(-1.0, float(units[i] @ mean)))
            angle = math.acos(cosine)
            if angle < self.tolerance:
                continue
            towards = -cosine * mean
            towards[i] += 1.0
            tangent += shares[i] * (angle / math.sin(angle) if math.sin(angle) else 0.0) * towards
        return tangent


@final
@dataclass(frozen=True)
class ModelStock(Curve):
    """Towards the mean of the fine-tunes, as far as their angles say (arXiv 2403.19522, equation 2, with the mean
    cosine over pairs). What mergekit does not do and the paper's geometry asks for: `clamp` keeps it from passing the
    base where they point apart.
    """

    count: int
    clamp: bool = False

    def weights(self, gram: Gram) -> tuple[float, ...]:
        pairs = [(i, j) for i in range(self.count) for j in range(i + 1, self.count)]
        cosines = [
            min(1.0, max(-1.0, float(gram[i, j]) / max(math.sqrt(gram[i, i] * gram[j, j]), 1e-6))) for i, j in pairs
        ]
        cosine = sum(cosines) / len(pairs)
        if self.clamp:
            cosine = max(0.0, cosine)
        divisor = 1 + (self.count - 1) * cosine
        share = 0.0 if abs(divisor) < 1e-6 else self.count * cosine / divisor
        return (share / self.count,) * self.count

"""The weights of every average, as functions of the training steps.

Pure arithmetic; knows nothing of recipes or tensors.

Each function takes the steps of the checkpoints, oldest first, and returns one float64 weight a checkpoint;
the weights of each sum to 1. A checkpoint of weight 0 takes no part and is not read.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Steps = Sequence[int]
Weights = tuple[float, ...]
Floats = NDArray[np.float64]


def normalized(weights: Sequence[float]) -> Weights:
    """`weights` divided by their sum. Raises ValueError where the sum is zero or not finite."""
    total = math.fsum(weights)
    if total == 0 or not math.isfinite(total):
        raise ValueError(f"weights that add up to {total} cannot be normalised")
    return tuple(weight / total for weight in weights)


def uniform(chosen: Sequence[bool]) -> Weights:
    """The same weight for every chosen checkpoint, 0 for the others."""
    return normalized([1.0 if taken else 0.0 for taken in chosen])


def ema(steps: Steps, decay: Callable[[int, int], float], *, bias_correction: bool) -> Weights:
    """An exponential moving average over the checkpoints: e_i = b_i e_(i-1) + (1 - b_i) x_i.

    `decay(t, gap)` is the decay of update t (from 1), `gap` steps after the one before. The average starts from the
    first checkpoint, and the second is the first update; with `bias_correction` it starts from zero, the first
    checkpoint is the first update, and the sum is divided by what it has gathered (Kingma & Ba 2015, section 3).
    """
    gaps = [b - a for a, b in pairwise(steps)]
    if bias_correction:
        kept = [decay(t, gap) for t, gap in enumerate([_first_gap(gaps), *gaps], start=1)]
    else:
        kept = [0.0, *(decay(t, gap) for t, gap in enumerate(gaps, start=1))]
    weights = [(1.0 - b) * math.prod(kept[i + 1 :]) for i, b in enumerate(kept)]
    return normalized(weights)


def _first_gap(gaps: Sequence[int]) -> int:
    """How far the first checkpoint is from an imagined one before it: as far as the second from the first."""
    return gaps[0] if gaps else 1


def lawa(steps: Steps, k: int, interval: int | None, end: int | None) -> Weights:
    """LAWA (arXiv 2209.14981, 2306.03241): the mean of exactly `k` checkpoints, the newest at `end` (the last by
    default).

    With `interval` they are that many steps apart, else consecutive. Raises ValueError where one is missing.
    """
    newest = steps[-1] if end is None else end
    if newest not in steps:
        raise ValueError(f"there is no checkpoint at step {newest}, the end of the window; there are {_listed(steps)}")
    if interval is None:
        before = [step for step in steps if step <= newest]
        if len(before) < k:
            raise ValueError(f"a window of k={k} needs {k} checkpoints up to step {newest}; there are {len(before)}")
        window = before[-k:]
    else:
        window = [newest - j * interval for j in range(k)]
        missing = sorted(set(window) - set(steps))
        if missing:
            raise ValueError(
                f"k={k} at an interval of {interval} needs checkpoints at {_listed(missing)}; "
                f"there are {_listed(steps)}"
            )
    return uniform([step in window for step in steps])


def _listed(steps: Steps) -> str:
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:3], "...", *shown[-3:]])


def swa(steps: Steps, start: int, every: int | None) -> Weights:
    """SWA (arXiv 1803.05407): the mean of the checkpoints from step `start` on, those at multiples of `every`
    from there.
    """
    chosen = [step >= start and (every is None or (step - start) % every == 0) for step in steps]
    if not any(chosen):
        raise ValueError(f"no checkpoint is at or after step {start}; there are {_listed(steps)}")
    return uniform(chosen)


def power_ema(steps: Steps, gamma: float) -> Weights:
    """A power-function EMA (arXiv 2312.02696, eq. 2) sampled at the checkpoints: b_i = (t_(i-1) / t_i)^(gamma + 1).

    Steps count from the start of training, where the average begins.
    """
    if steps[0] <= 0:
        raise ValueError("a power-function average counts steps from the start of training: they must be above 0")
    reached = [(step / steps[-1]) ** (gamma + 1) for step in steps]
    return normalized([b - a for a, b in pairwise([0.0, *reached])])


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power-function EMA whose width, relative to the training so far, is `sigma_rel`.

    The largest real root of g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2) = 0 (arXiv 2312.02696, appendix C.1).
    """
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


MAX_SIGMA_REL = 12**-0.5  # where gamma is 0: the plain mean over the training so far


def posthoc_ema(steps: Steps, gammas: Sequence[float], step: int, gamma: float) -> Weights:
    """Weights that rebuild the power-function EMA of exponent `gamma` at `step` from snapshots of tracked ones.

    Snapshot i was tracked with exponent gammas[i] and saved at steps[i]. Least squares between the profiles,
    then normalised (arXiv 2312.02696, section 3.2 and appendix C.3).
    """
    if min([step, *steps]) <= 0:
        raise ValueError("a power-function average counts steps from the start of training: they must be above 0")
    t, g = np.asarray(steps, np.float64), np.asarray(gammas, np.float64)
    gram = _profile_product(t[:, None], g[:, None], t[None, :], g[None, :])
    target = _profile_product(t, g, np.array(step, np.float64), np.array(gamma, np.float64))
    solution = np.linalg.lstsq(gram, target, rcond=None)[0] if len(t) > 1 else np.ones(1)
    return normalized(solution.tolist())


def _profile_product(ta: Floats, ga: Floats, tb: Floats, gb: Floats) -> Floats:
    """<p_a, p_b> of two power-function profiles p(t) ~ t^gamma on [0, t_end] (arXiv 2312.02696, eq. 126)."""
    ratio = ta / tb
    exponent = np.where(ta < tb, gb, -ga)
    product: Floats = (ga + 1) * (gb + 1) * ratio**exponent / ((ga + gb + 1) * np.maximum(ta, tb))
    return product


def pma(count: int, weighting: str, alpha: float) -> Weights:
    """PMA (arXiv 2505.12082, section 3):

    `uniform` 1/n, `linear` w_i ~ i, `ema` M_i = alpha x_i + (1 - alpha) M_(i-1).
    """
    if weighting == "uniform":
        return normalized([1.0] * count)
    if weighting == "linear":
        return normalized([float(i) for i in range(1, count + 1)])
    return ema(range(count), lambda _i, _gap: 1.0 - alpha, bias_correction=False)


PROFILES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: (1.0 + math.cos(math.pi * x)) / 2,
    "sqrt": lambda x: 1.0 - math.sqrt(x),
}


def wsm(count: int, decay: str) -> Weights:
    """WSM (arXiv 2507.17634, section 3): the weights that replay the last updates under a decaying learning rate.

    With n = count - 1 updates scaled by w_i = profile(i / (n + 1)): c_0 = 1 - w_1, c_j = w_j - w_(j+1), c_n = w_n.
    """
    scales = [1.0, *(PROFILES[decay](i / count) for i in range(1, count)), 0.0]
    return normalized([a - b for a, b in pairwise(scales)])

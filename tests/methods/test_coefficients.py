import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from merger.methods.coefficients import (
    MAX_SIGMA_REL,
    PROFILES,
    ema,
    gamma_of,
    lawa,
    normalized,
    pma,
    posthoc_ema,
    power_ema,
    swa,
    uniform,
    wsm,
)

STEPS = [100, 200, 300, 400, 500, 600, 700, 800]
UNEVEN = [10, 30, 40, 100, 250, 260, 400, 1000]


@pytest.fixture
def checkpoints():
    """Eight points in a space of five dimensions."""
    return np.random.default_rng(0).normal(size=(8, 5))


def weighted(weights, points):
    return np.array(weights) @ points


def recursion(points, decays, start):
    """e_i = b_i e_(i-1) + (1 - b_i) x_i, from `start`."""
    average = start
    for point, decay in zip(points, decays, strict=True):
        average = decay * average + (1 - decay) * point
    return average


def averaged_by_torch(points, **options):
    """What torch's AveragedModel holds after it has seen the points one after another."""
    model = torch.nn.Linear(len(points[0]), 1, bias=False).double()
    average = AveragedModel(model, **options)
    for point in points:
        model.weight.data[0] = torch.from_numpy(point)
        average.update_parameters(model)
    return average.module.weight.data[0].numpy()


def assert_same(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-14)


# ---- all of them --------------------------------------------------------------------------------------

increasing = st.lists(st.integers(1, 10**7), min_size=1, max_size=40, unique=True).map(sorted)
gammas = st.floats(0, 50)


@pytest.mark.parametrize(
    "weights",
    [
        lambda steps, g: uniform([True] * len(steps)),
        lambda steps, g: swa(steps, steps[len(steps) // 2], None),
        lambda steps, g: ema(steps, lambda _i, _gap: g / 51, bias_correction=False),
        lambda steps, g: ema(steps, lambda _i, _gap: g / 51, bias_correction=True),
        lambda steps, g: lawa(steps, 1 + len(steps) // 2, None, None),
        power_ema,
        lambda steps, g: posthoc_ema(steps, [gamma_of(0.1)] * len(steps), steps[-1], g),
        lambda steps, g: pma(len(steps), "uniform", 0.2),
        lambda steps, g: pma(len(steps), "linear", 0.2),
        lambda steps, g: pma(len(steps), "ema", 0.2),
        lambda steps, g: wsm(len(steps), "linear"),
        lambda steps, g: wsm(len(steps), "cosine"),
        lambda steps, g: wsm(len(steps), "sqrt"),
    ],
)
@given(steps=increasing, gamma=gammas)
def test_weights_come_one_a_checkpoint_and_sum_to_one(weights, steps, gamma):
    found = weights(steps, gamma)
    assert len(found) == len(steps)
    assert all(type(weight) is float and math.isfinite(weight) for weight in found)
    assert math.fsum(found) == pytest.approx(1, abs=1e-15 * (1 + sum(map(abs, found))))


def test_weights_are_divided_by_their_sum():
    assert normalized([1, 2, 5]) == (0.125, 0.25, 0.625)
    assert normalized([3, -1]) == (1.5, -0.5)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [math.inf, 1.0], [math.nan, 1.0]])
def test_weights_without_a_sum_cannot_be_normalised(weights):
    with pytest.raises(ValueError, match="cannot be normalised"):
        normalized(weights)


def test_the_chosen_share_the_weight():
    assert uniform([True, False, True, True, True]) == (0.25, 0, 0.25, 0.25, 0.25)
    with pytest.raises(ValueError):
        uniform([False, False])


# ---- SWA ----------------------------------------------------------------------------------------------


def test_swa_is_the_running_mean_of_torch(checkpoints):
    found = weighted(swa(STEPS, 300, None), checkpoints)
    assert_same(found, averaged_by_torch(checkpoints[2:]))
    running = checkpoints[2]
    for n, point in enumerate(checkpoints[3:], start=1):
        running = (running * n + point) / (n + 1)
    assert_same(found, running)


@pytest.mark.parametrize(
    ("start", "every", "chosen"),
    [
        (0, None, STEPS),
        (350, None, [400, 500, 600, 700, 800]),
        (800, None, [800]),
        (200, 300, [200, 500, 800]),
        (100, 250, [100, 600]),
        (0, 200, [200, 400, 600, 800]),
    ],
)
def test_swa_takes_every_so_many_steps_from_the_start_on(start, every, chosen):
    wanted = [1 / len(chosen) if step in chosen else 0 for step in STEPS]
    assert swa(STEPS, start, every) == pytest.approx(wanted, abs=1e-16)


def test_swa_without_a_checkpoint_is_refused():
    with pytest.raises(ValueError, match=r"no checkpoint is at or after step 801; there are 100, 200, 300, .*800"):
        swa(STEPS, 801, None)


# ---- EMA ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_ema_is_that_of_torch(checkpoints, decay):
    found = weighted(ema(STEPS, lambda _i, _gap: decay, bias_correction=False), checkpoints)
    assert_same(found, averaged_by_torch(checkpoints, multi_avg_fn=get_ema_multi_avg_fn(decay)))
    assert_same(found, recursion(checkpoints[1:], [decay] * 7, checkpoints[0]))


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_bias_correction_starts_from_zero_and_divides_by_what_was_gathered(checkpoints, decay):
    found = weighted(ema(STEPS, lambda _i, _gap: decay, bias_correction=True), checkpoints)
    np.testing.assert_allclose(found, recursion(checkpoints, [decay] * 8, 0) / (1 - decay**8), rtol=1e-10)


@pytest.mark.parametrize("bias_correction", [True, False])
def test_decays_may_change_from_checkpoint_to_checkpoint(checkpoints, bias_correction):
    decays = [min(0.9, (1 + i) / (10 + i)) for i in range(1, 9)]
    found = weighted(ema(STEPS, lambda i, _gap: decays[i - 1], bias_correction=bias_correction), checkpoints)
    if bias_correction:
        wanted = recursion(checkpoints, decays, 0) / recursion([1.0] * 8, decays, 0)
    else:
        wanted = recursion(checkpoints[1:], decays[:-1], checkpoints[0])
    assert_same(found, wanted)


def test_decays_that_follow_the_gaps_are_those_of_every_step(checkpoints):
    # As if each checkpoint had stood for all the steps since the one before it.
    gaps = [b - a for a, b in pairwise(UNEVEN)]
    found = weighted(ema(UNEVEN, lambda _i, gap: 0.99**gap, bias_correction=False), checkpoints)
    every_step = np.repeat(checkpoints[1:], gaps, axis=0)
    assert_same(found, recursion(every_step, [0.99] * len(every_step), checkpoints[0]))


def test_the_first_checkpoint_is_as_far_as_the_second():
    seen = []
    ema(UNEVEN, lambda i, gap: seen.append((i, gap)) or 0.5, bias_correction=True)
    assert seen == list(enumerate([20, 20, 10, 60, 150, 10, 140, 600], start=1))


def test_an_average_of_one_is_itself():
    for bias_correction in (True, False):
        assert ema([70], lambda _i, _gap: 0.9, bias_correction=bias_correction) == (1.0,)


# ---- LAWA ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "interval", "end", "window"),
    [
        (1, None, None, [800]),
        (3, None, None, [600, 700, 800]),
        (8, None, None, STEPS),
        (3, None, 500, [300, 400, 500]),
        (1, None, 100, [100]),
        (3, 200, None, [400, 600, 800]),
        (3, 200, 700, [300, 500, 700]),
        (2, 700, None, [100, 800]),
        (1, 12345, None, [800]),
    ],
)
def test_lawa_is_the_mean_of_exactly_k(k, interval, end, window):
    assert lawa(STEPS, k, interval, end) == tuple(1 / k if step in window else 0 for step in STEPS)


def test_lawa_of_uneven_steps_counts_checkpoints():
    assert lawa(UNEVEN, 3, None, 260) == (0, 0, 0, 1 / 3, 1 / 3, 1 / 3, 0, 0)


@pytest.mark.parametrize(
    ("k", "interval", "end", "says"),
    [
        (9, None, None, "a window of k=9 needs 9 checkpoints up to step 800; there are 8"),
        (4, None, 300, "a window of k=4 needs 4 checkpoints up to step 300; there are 3"),
        (2, None, 350, "no checkpoint at step 350"),
        (2, None, 900, "no checkpoint at step 900"),
        (3, 150, None, "k=3 at an interval of 150 needs checkpoints at 650; there are 100, 200"),
        (4, 300, None, "k=4 at an interval of 300 needs checkpoints at -100; there are 100, 200"),
        (2, 100, 350, "no checkpoint at step 350"),
    ],
)
def test_lawa_refuses_a_window_with_a_gap(k, interval, end, says):
    with pytest.raises(ValueError, match=says):
        lawa(STEPS, k, interval, end)


# ---- power-function EMA -------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.972199), (0.10, 6.937204), (0.15, 3.557869)])
def test_gamma_is_that_of_the_paper(sigma_rel, gamma):
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=5e-7)


@given(st.floats(0, 150))
def test_gamma_has_the_width_that_was_asked(gamma):
    sigma_rel = math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))
    assert gamma_of(sigma_rel) == pytest.approx(gamma, rel=1e-9, abs=1e-9)


def test_the_widest_power_function_is_the_mean():
    assert gamma_of(MAX_SIGMA_REL) == pytest.approx(0, abs=1e-12)
    assert power_ema(STEPS, 0.0) == pytest.approx([1 / 8] * 8)


@pytest.mark.parametrize("gamma", [0.0, 3.557869, 16.972199])
@pytest.mark.parametrize("steps", [STEPS, UNEVEN])
def test_power_ema_is_its_recursion(checkpoints, steps, gamma):
    gaps = [b - a for a, b in pairwise([0, *steps])]
    decays = [(1 - gap / step) ** (gamma + 1) for gap, step in zip(gaps, steps, strict=True)]
    assert_same(weighted(power_ema(steps, gamma), checkpoints), recursion(checkpoints, decays, 0))


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_power_ema_is_as_wide_as_was_asked(sigma_rel):
    steps = np.arange(1, 5001)
    weights = np.array(power_ema(steps.tolist(), gamma_of(sigma_rel)))
    deviation = math.sqrt(weights @ steps**2.0 - (weights @ steps) ** 2)
    assert deviation / 5000 == pytest.approx(sigma_rel, rel=1e-3)


def test_power_ema_cannot_count_from_before_the_start():
    with pytest.raises(ValueError, match="above 0"):
        power_ema([0, 10, 20], 3.0)


# ---- post-hoc EMA -------------------------------------------------------------------------------------

LAST = 8192


@pytest.fixture(scope="module")
def tracked():
    """Power-function EMAs of a random walk in 64 dimensions, by their recursion: sigma_rel -> one a step."""
    walk = np.cumsum(np.random.default_rng(0).standard_normal((LAST, 64)), axis=0)
    averages = {}
    for sigma_rel in (0.05, 0.07, 0.10, 0.12, 0.20):
        track = np.zeros_like(walk)
        for t in range(1, LAST + 1):
            decay = (1 - 1 / t) ** (gamma_of(sigma_rel) + 1)
            track[t - 1] = decay * track[t - 2] + (1 - decay) * walk[t - 1]
        averages[sigma_rel] = track
    return averages


def posthoc_error(tracked, snapshots, sigma_rel, step=LAST):
    """The relative error of an average rebuilt from `snapshots`, half of them of 0.05 and half of 0.10."""
    each = snapshots // 2
    steps = [LAST * (i + 1) // each for i in range(each)]
    points = np.concatenate([tracked[tracked_sigma][np.array(steps) - 1] for tracked_sigma in (0.05, 0.10)])
    snapshot_gammas = [gamma_of(0.05)] * each + [gamma_of(0.10)] * each
    rebuilt = weighted(posthoc_ema([*steps, *steps], snapshot_gammas, step, gamma_of(sigma_rel)), points)
    wanted = tracked[sigma_rel][step - 1]
    return np.linalg.norm(rebuilt - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("sigma_rel", [0.07, 0.12])
@pytest.mark.parametrize(("snapshots", "error"), [(8, 5e-3), (32, 6.5e-5), (64, 8e-6)])
def test_posthoc_ema_is_as_near_as_was_measured(tracked, snapshots, error, sigma_rel):
    # The errors are those of docs and reference for one walk; another walk is within a factor of two.
    assert posthoc_error(tracked, snapshots, sigma_rel) < 2 * error


@pytest.mark.parametrize("sigma_rel", [0.05, 0.10])
@pytest.mark.parametrize("step", [LAST, LAST // 2])
@pytest.mark.parametrize("snapshots", [8, 32, 64])
def test_posthoc_ema_of_a_snapshot_is_the_snapshot(tracked, snapshots, step, sigma_rel):
    assert posthoc_error(tracked, snapshots, sigma_rel, step) < 1e-12


def test_posthoc_ema_of_a_width_outside_is_worse(tracked):
    assert posthoc_error(tracked, 32, 0.20) > 10 * posthoc_error(tracked, 32, 0.07)


def test_posthoc_ema_of_one_snapshot_is_the_snapshot():
    assert posthoc_ema([500], [6.94], 500, 16.97) == (1.0,)


def test_posthoc_ema_does_not_depend_on_the_unit_of_time():
    steps, snapshot_gammas = [250, 500, 750, 1000], [6.94] * 4
    thousands = [1000 * step for step in steps]
    found = posthoc_ema(thousands, snapshot_gammas, 900_000, 4.0)
    assert found == pytest.approx(posthoc_ema(steps, snapshot_gammas, 900, 4.0), rel=1e-9)


@pytest.mark.parametrize(("steps", "step"), [([0, 10], 10), ([10, 20], 0), ([-5, 10], 10)])
def test_posthoc_ema_cannot_count_from_before_the_start(steps, step):
    with pytest.raises(ValueError, match="above 0"):
        posthoc_ema(steps, [6.94, 6.94], step, 16.97)


# ---- PMA and WSM --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 8])
def test_pma_weights_are_those_of_the_paper(checkpoints, count):
    points = checkpoints[:count]
    assert_same(weighted(pma(count, "uniform", 0.2), points), points.mean(axis=0))
    assert_same(weighted(pma(count, "linear", 0.2), points), np.average(points, axis=0, weights=range(1, count + 1)))
    assert_same(weighted(pma(count, "ema", 0.2), points), recursion(points[1:], [0.8] * (count - 1), points[0]))


PROFILE = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "sqrt": lambda x: 1 - math.sqrt(x),
}


@pytest.mark.parametrize("decay", PROFILE)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_wsm_replays_the_updates_under_a_decaying_rate(checkpoints, count, decay):
    points = checkpoints[:count]
    updates = np.diff(points, axis=0)
    replayed = points[0] + sum(PROFILE[decay](i / count) * update for i, update in enumerate(updates, start=1))
    assert_same(weighted(wsm(count, decay), points), replayed)


def test_wsm_knows_no_other_decays():
    assert PROFILES.keys() == PROFILE.keys()


@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_linear_wsm_is_the_plain_mean(count):
    assert wsm(count, "linear") == pytest.approx([1 / count] * count, abs=1e-15)


@given(st.integers(1, 200), st.sampled_from(list(PROFILE)))
def test_wsm_weights_are_never_negative(count, decay):
    assert min(wsm(count, decay)) >= 0

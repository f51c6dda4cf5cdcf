"""Formulas on singular values: their invariants, and independent computations in numpy's float64."""

import numpy as np
import pytest
import torch

from merger import spectra

SHAPES = [(12, 20), (20, 12), (9, 9)]


def tasks_of(shape, count, seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(size=shape) for _ in range(count)]


def load_of(tasks):
    return lambda index: torch.tensor(tasks[index])


def close(found, expected, tolerance=1e-10):
    assert np.abs(np.asarray(found) - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


def orthonormal(rows, columns, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


# ---- pieces -------------------------------------------------------------------------------------------


def test_a_decomposition_leaves_out_what_is_rounding():
    random = np.random.default_rng(0)
    matrix = random.normal(size=(30, 4)) @ random.normal(size=(4, 20))
    u, s, vt = spectra.svd(torch.tensor(matrix))
    assert (u.shape, s.shape, vt.shape) == ((30, 4), (4,), (4, 20))
    close((u * s) @ vt, matrix)
    assert spectra.svd(torch.zeros(3, 5, dtype=torch.float64))[1].shape == (0,)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_the_nearest_orthonormal_matrix(shape):
    matrix = tasks_of(shape, 1)[0]
    found = spectra.orthogonal(torch.tensor(matrix)).numpy()
    gram = found.T @ found if shape[0] > shape[1] else found @ found.T
    close(gram, np.eye(8))
    for seed in range(20):  # nothing else that is orthonormal is nearer
        other = orthonormal(12, 8, seed) if shape[0] > shape[1] else orthonormal(12, 8, seed).T
        assert np.linalg.norm(found - matrix) <= np.linalg.norm(other - matrix)


# ---- TSV ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_tsv_of_one_task_is_that_task(shape):
    tasks = tasks_of(shape, 1)
    close(spectra.tsv(load_of(tasks), 1), tasks[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_tsv_is_the_formula(shape, count):
    tasks = tasks_of(shape, count)
    kept = min(shape) // count
    parts = [np.linalg.svd(task, full_matrices=False) for task in tasks]
    u = np.concatenate([part[0][:, :kept] for part in parts], 1)
    s = np.concatenate([part[1][:kept] for part in parts])
    v = np.concatenate([part[2][:kept] for part in parts])
    # the polar factor by eigenvalues: X (X^T X)^(-1/2)
    values, vectors = np.linalg.eigh(u.T @ u)
    left = u @ (vectors / np.sqrt(values)) @ vectors.T
    values, vectors = np.linalg.eigh(v @ v.T)
    right = (vectors / np.sqrt(values)) @ vectors.T @ v
    close(left.T @ left, np.eye(kept * count))
    close(spectra.tsv(load_of(tasks), count), left @ np.diag(s) @ right, 1e-8)


def test_tsv_of_orthogonal_tasks_is_the_sum_of_their_largest_parts():
    u, v = orthonormal(16, 8, 1), orthonormal(12, 8, 2)
    strengths = [np.array([4.0, 3.0, 2.0, 1.0]), np.array([5.0, 2.5, 1.5, 0.5])]
    tasks = [u[:, i * 4 : i * 4 + 4] * s @ v[:, i * 4 : i * 4 + 4].T for i, s in enumerate(strengths)]
    close(spectra.tsv(load_of(tasks), 2), tasks[0] + tasks[1])  # 4 of 12 // 2 directions are kept: all there are


def test_tsv_of_nothing_is_nothing_and_an_unchanged_task_takes_no_part():
    nothing = np.zeros((6, 8))
    close(spectra.tsv(load_of([nothing, nothing]), 2), nothing)
    task = tasks_of((6, 8), 1)[0]
    u, s, v = np.linalg.svd(task, full_matrices=False)
    close(spectra.tsv(load_of([nothing, task]), 2), u[:, :3] * s[:3] @ v[:3])


# ---- Iso ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c_has_equal_singular_values_and_the_same_nuclear_norm(shape):
    total = sum(tasks_of(shape, 3))
    found = np.linalg.svd(spectra.iso_c(torch.tensor(total)).numpy(), compute_uv=False)
    values = np.linalg.svd(total, compute_uv=False)
    close(found, np.full(min(shape), values.mean()))
    assert np.linalg.norm(spectra.iso_c(torch.tensor(total)).numpy() - total) > 0.1  # it does flatten
    close(spectra.iso_c(torch.tensor(3.0 * total)), 3.0 * spectra.iso_c(torch.tensor(total)).numpy())


def test_iso_c_is_the_formula_and_adds_no_direction():
    total = tasks_of((10, 4), 1)[0] @ tasks_of((4, 14), 1)[0]
    u, s, v = np.linalg.svd(total, full_matrices=False)
    close(spectra.iso_c(torch.tensor(total)), s[:4].mean() * u[:, :4] @ v[:4])
    assert not spectra.iso_c(torch.zeros(4, 3, dtype=torch.float64)).any()


@pytest.mark.parametrize(
    ("smallest", "count", "fraction", "expected"),
    [(12, 2, 0.8, (8, 2)), (12, 3, 0.8, (9, 1)), (100, 3, 0.8, (79, 7)), (9, 4, 0.0, (1, 2)), (9, 2, 1.0, (9, 0))],
)
def test_the_directions_of_iso_cts_are_as_many_as_there_are(smallest, count, fraction, expected):
    common, each = spectra.ranks_of_iso_cts(smallest, count, fraction)
    assert (common, each) == expected
    assert common + count * each == smallest


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_cts_with_everything_common_is_iso_c(shape):
    tasks = tasks_of(shape, 3)
    total = sum(tasks)
    found = spectra.iso_cts(load_of([total, *tasks]), 3, 1.0)
    close(found, spectra.iso_c(torch.tensor(total)).numpy())


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_cts_is_the_formula(shape):
    tasks = tasks_of(shape, 2)
    total, smallest = sum(tasks), min(shape)
    common, each = spectra.ranks_of_iso_cts(smallest, 2, 0.6)
    assert each > 0
    u, s, v = (part for part in np.linalg.svd(total, full_matrices=False))
    lefts, values, rights = [u[:, :common]], [s[:common]], [v[:common]]
    for task in tasks:
        a, b, c = np.linalg.svd(task - u[:, :common] @ u[:, :common].T @ task, full_matrices=False)
        lefts, values, rights = [*lefts, a[:, :each]], [*values, b[:each]], [*rights, c[:each]]
    left, right = np.concatenate(lefts, 1), np.concatenate(rights)
    p, _, q = np.linalg.svd(left, full_matrices=False)
    x, _, y = np.linalg.svd(right, full_matrices=False)
    found = spectra.iso_cts(load_of([total, *tasks]), 2, 0.6).numpy()
    close(found, np.concatenate(values).mean() * (p @ q) @ (x @ y), 1e-8)
    equal = np.linalg.svd(found, compute_uv=False)
    close(equal, np.full(smallest, np.concatenate(values).mean()), 1e-8)


# ---- WUDI ---------------------------------------------------------------------------------------------


def loss(merged, tasks):
    return sum(np.linalg.norm((merged - task) @ task.T) ** 2 / np.linalg.norm(task) ** 2 for task in tasks)


@pytest.mark.parametrize("shape", SHAPES)
def test_wudi_of_one_task_is_that_task(shape):
    tasks = tasks_of(shape, 1)
    close(spectra.wudi(load_of(tasks), 1), tasks[0], 1e-9)


@pytest.mark.parametrize("shape", [(5, 40), (20, 12), (9, 9)])
def test_wudi_is_the_least_squares_solution_of_its_normal_equations(shape):
    tasks = tasks_of(shape, 3)
    grams = [task.T @ task / np.linalg.norm(task) ** 2 for task in tasks]
    target = sum(task @ gram for task, gram in zip(tasks, grams, strict=True))
    expected = np.linalg.lstsq(sum(grams), target.T, rcond=1e-12)[0].T
    found = spectra.wudi(load_of(tasks), 3).numpy()
    close(found, expected, 1e-7)
    random = np.random.default_rng(5)
    assert loss(found, tasks) <= loss(sum(tasks), tasks)
    for _ in range(10):  # no step in any direction makes it less
        assert loss(found + 1e-3 * random.normal(size=shape), tasks) >= loss(found, tasks)


def test_wudi_of_tasks_with_orthogonal_rows_is_their_sum():
    v = orthonormal(20, 8, 0).T
    tasks = [task @ rows for task, rows in zip(tasks_of((6, 4), 2), (v[:4], v[4:]), strict=True)]
    close(spectra.wudi(load_of(tasks), 2), tasks[0] + tasks[1], 1e-9)
    assert loss(tasks[0] + tasks[1], tasks) < 1e-20
    nothing = np.zeros((6, 20))
    close(spectra.wudi(load_of([tasks[0], nothing]), 2), tasks[0], 1e-9)
    assert not spectra.wudi(load_of([nothing, nothing]), 2).any()


def test_wudi_by_steps_is_adam_from_the_sum():
    tasks = [torch.tensor(task) for task in tasks_of((7, 11), 3)]
    merged = torch.nn.Parameter(sum(tasks))
    adam = torch.optim.Adam([merged], lr=1e-3)
    for _ in range(40):
        adam.zero_grad()
        value = sum(((merged - t) @ t.T).square().sum() / t.square().sum() for t in tasks)
        value.backward()
        adam.step()
    found = spectra.wudi_by_steps(lambda index: tasks[index].clone(), 3, 40, 1e-3)
    close(found, merged.detach().numpy(), 1e-9)
    arrays = [task.numpy() for task in tasks]
    losses = [
        loss(spectra.wudi_by_steps(lambda index: tasks[index].clone(), 3, steps, 1e-3).numpy(), arrays)
        for steps in (0, 10, 20, 40)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


# ---- calibration --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_one_task_is_calibrated_already(shape):
    [task] = tasks_of(shape, 1)
    close(spectra.svc(load_of([task, task]), 1, 1.0), task)


@pytest.mark.parametrize("count", [2, 5])
def test_identical_tasks_count_once(count):
    [task] = tasks_of((8, 10), 1)
    close(spectra.svc(load_of([count * task, *[task] * count]), count, 1.0), task)


def test_calibration_is_the_formula_and_only_scales_down():
    tasks = tasks_of((9, 14), 3)
    total = sum(tasks)
    u, s, v = np.linalg.svd(total, full_matrices=False)
    expected = np.zeros_like(total)
    for r in range(len(s)):
        shares = []
        for task in tasks:
            a, b = u[:, r] @ total, u[:, r] @ task
            shares.append(max(1.0, (a @ b) / (b @ b)))
        expected += 3 / sum(shares) * s[r] * np.outer(u[:, r], v[r])
    found = spectra.svc(load_of([total, *tasks]), 3, 1.0).numpy()
    close(found, expected)
    assert (np.linalg.svd(found, compute_uv=False) <= s + 1e-12).all()


def test_a_task_that_has_nothing_in_a_direction_is_no_division_by_zero():
    task = np.zeros((4, 5))
    task[0, 0] = 2.0
    close(spectra.svc(load_of([task, task, np.zeros((4, 5))]), 2, 1.0), task)


# ---- a low rank ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 50), (700, 900), (900, 600)])
def test_a_low_rank_is_nearly_the_best(shape):
    random = np.random.default_rng(0)
    smallest = min(shape)
    strengths = 1.0 / (1.0 + np.arange(smallest)) ** 0.7
    matrix = orthonormal(shape[0], smallest, 1) * strengths @ orthonormal(shape[1], smallest, 2).T
    matrix += 1e-4 * random.normal(size=shape)
    b, a = spectra.low_rank(torch.tensor(matrix), 16, seed=0)
    assert (b.shape, a.shape) == ((shape[0], 16), (16, shape[1]))
    values = np.linalg.svd(matrix, compute_uv=False)
    best = np.sqrt((values[16:] ** 2).sum())
    assert np.linalg.norm(matrix - (b @ a).numpy()) <= best * 1.001
    close(np.linalg.norm(b.numpy(), axis=0), np.linalg.norm(a.numpy(), axis=1))

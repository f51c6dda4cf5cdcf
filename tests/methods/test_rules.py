"""Every rule against mergekit's own arithmetic in float64, and against itself: any range equals the whole."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import merge_tensors

from merger.kernels import CODES
from merger.methods.merging import RULES
from merger.methods.rules import Group, Parameter
from tests.checkpoints import as_float64
from tests.memory import InMemory, as_bytes, evaluate

SMALL = [(60, 70), (1, 5), (7,), (3, 1), (2, 3, 50)]
LARGE = (1024, 513)  # more than one block of the first pass
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
ULP = {"F32": 2.0**-23, "BF16": 2.0**-8, "F16": 2.0**-11, "F64": 2.0**-23}  # float32 within

# What to call each deterministic rule with: the models beside the base, shared numbers, numbers for each.
CALLS = {
    "linear": [(3, {}, {"weight": (0.5, 0.3, 0.4)}), (3, {"normalize": False}, {"weight": (0.5, -0.3, 0.4)})],
    "passthrough": [(1, {}, {"scale": (None,)}), (1, {}, {"scale": (0.3,)})],
    "slerp": [(1, {"t": t}, {}) for t in (0.0, 0.3, 1.0)],
    "nuslerp": [
        (2, {}, {"weight": (0.5, 0.3)}),
        (2, {"nuslerp_flatten": False}, {"weight": (0.1, 0.9)}),
    ],
    "multislerp": [
        (1, {}, {"weight": (0.4,)}),
        (3, {}, {"weight": (0.5, 0.3, 0.4)}),
        (3, {"normalize_weights": False}, {"weight": (0.5, 0.3, 0.4)}),
    ],
    "karcher": [(1, {}, {}), (2, {}, {}), (4, {"max_iter": 3}, {})],
    "model_stock": [(2, {}, {}), (3, {"filter_wise": True}, {})],
    "task_arithmetic": [
        (3, {}, {"weight": (0.5, -0.3, 0.4)}),
        (2, {"normalize": True, "lambda": 0.7}, {"weight": (0.5, 0.3)}),
    ],
    "ties": [
        (3, {}, {"weight": (0.5, 0.3, 0.4), "density": (0.5, 0.1, 1.0)}),
        (2, {"normalize": False, "rescale": True, "lambda": 0.7}, {"weight": (0.5, -0.3), "density": (0.2, 0.0)}),
        (2, {}, {"weight": (1.0, 1.0), "density": (1e-9, 0.999)}),
    ],
    "breadcrumbs": [
        (2, {}, {"weight": (0.5, 0.3), "density": (0.9, 0.5)}),
        (2, {"rescale": True}, {"weight": (0.5, 0.3), "density": (0.995, 1.0), "gamma": (0.2, 0.01)}),
    ],
    "breadcrumbs_ties": [(3, {}, {"weight": (0.5, 0.3, 0.2), "density": (0.9, 0.5, 0.1), "gamma": (0.1, 0.2, 0.3)})],
    "sce": [(3, {}, {}), (3, {"select_topk": 0.3}, {}), (1, {"select_topk": 0.0}, {})],
    "nearswap": [(1, {"t": 0.001}, {}), (1, {"t": 0.0}, {})],
    "dare_linear": [(2, {}, {"weight": (0.5, 0.3), "density": (1.0, 1.0)})],
    "dare_ties": [(2, {}, {"weight": (0.5, 0.3), "density": (1.0, 1.0)})],
    "della": [(2, {}, {"weight": (0.5, 0.3), "density": (1.0, 0.0)})],
    "della_linear": [(2, {}, {"weight": (0.5, 0.3), "density": (1.0, 1.0)})],
}
CHOOSING = ("ties", "breadcrumbs", "breadcrumbs_ties", "sce", "dare_ties", "della")  # elements or signs
CASES = [
    (name, number, dtype, shape)
    for name, calls in CALLS.items()
    for number in range(len(calls))
    for dtype in ("F32", "BF16", "F16", "F64")
    for shape in (*SMALL, *([LARGE] if number == 0 and dtype == "BF16" else []))
]


def tensors_of(count: int, shape: tuple[int, ...], dtype: str, seed: int = 0) -> list[torch.Tensor]:
    """A base and models that differ from it, as fine-tunes do, without equal differences in magnitude."""
    torch.manual_seed(seed)
    base = torch.randn(shape, dtype=torch.float64) * 0.02
    models = [base + torch.randn(shape, dtype=torch.float64) * 0.01 for _ in range(count)]
    return [tensor.to(TORCH[dtype]) for tensor in (base, *models)]


def numbers(parameters: dict[str, Parameter], given: dict, count: int = 0) -> dict:
    """Numbers with the defaults filled in, for each of `count` models where there are such."""
    return {
        name: given.get(name, (parameter.default,) * count if count else parameter.default)
        for name, parameter in parameters.items()
    }


def group_of(name: str, tensors: list[torch.Tensor], shared: dict, each: dict, dtype: str = "F32", seed: int = 0):
    rule = RULES[name]
    inputs = [
        InMemory(as_bytes(tensor), {v: k for k, v in TORCH.items()}[tensor.dtype], tuple(tensor.shape))
        for tensor in tensors
    ]
    ignores = rule.base == "ignored"
    base, models = (None, inputs[1:]) if ignores else (inputs[0], inputs[1:])
    count = len(models)
    return Group(
        "w", tuple(models), base, numbers(rule.shared, shared), numbers(rule.each, each, count), dtype, dtype, seed
    )


def expected(name: str, tensors: list[torch.Tensor], shared: dict, each: dict) -> np.ndarray:
    """mergekit's arithmetic on float64 tensors."""
    rule = RULES[name]
    given = tensors[1:] if rule.base == "ignored" else tensors
    parameters = {**shared, **{key: list(values) for key, values in each.items()}}
    base = None if rule.base == "ignored" else 0
    return merge_tensors([t.double() for t in given], name, parameters=parameters, base_index=base).numpy()


def bound(tensors: list[torch.Tensor], wanted: np.ndarray, dtype: str) -> np.ndarray:
    """What float32 arithmetic and one rounding to `dtype` may be off by."""
    largest = sum(tensor.double().abs().numpy() for tensor in tensors)
    return 16 * 2.0**-24 * (largest + np.abs(wanted)) + ULP[dtype] * np.abs(wanted) / 2 + 2.0**-25 * (dtype == "F16")


@pytest.mark.parametrize(("name", "number", "dtype", "shape"), CASES)
def test_is_what_mergekit_makes_in_float64(name: str, number: int, dtype: str, shape: tuple[int, ...]) -> None:
    count, shared, each = CALLS[name][number]
    tensors = tensors_of(count, shape, dtype)
    found = as_float64(evaluate(RULES[name].make(group_of(name, tensors, shared, each))), "F32").reshape(shape)
    wanted = expected(name, tensors, shared, each)
    off = np.abs(found - wanted) > bound(tensors, wanted, "F32")
    if dtype in ("BF16", "F16") and name in CHOOSING:
        off &= ~doubtful(tensors, each)
    assert not off.any(), (found[off][:5], wanted[off][:5])


def doubtful(tensors: list[torch.Tensor], each: dict) -> np.ndarray:
    """Elements whose magnitude equals that of others: narrow types have many, and mergekit keeps any of those at the
    threshold (which ones `merger` keeps is tested below). And those whose differences cancel but for rounding: theirs
    is the sign.
    """
    deltas = [tensor.double().numpy() - tensors[0].double().numpy() for tensor in tensors[1:]]
    result = np.zeros(deltas[0].shape, bool)
    for delta in deltas:
        _, places, counts = np.unique(np.abs(delta), return_inverse=True, return_counts=True)
        result |= (counts[places] > 1).reshape(delta.shape)
    terms = [weight * delta for weight, delta in zip(each.get("weight", ()), deltas, strict=False)]
    return result | (np.abs(sum(terms)) <= 1e-6 * sum(np.abs(term) for term in terms)) if terms else result


@pytest.mark.parametrize("name", sorted(CALLS))
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_any_range_equals_the_whole(name: str, dtype: str) -> None:
    count, shared, each = CALLS[name][-1]
    if "density" in each:
        each = {**each, "density": (0.5,) * count}
    shape = (40, 333)
    made = RULES[name].make(group_of(name, tensors_of(count, shape, dtype), shared, each, dtype))
    whole, size = evaluate(made), math.prod(shape)
    for start, stop in [(0, 1), (size - 1, size), (332, 334), (1000, 7777), (5, 5)]:
        part = evaluate(made, start, stop)
        assert np.array_equal(part, whole[start * made.itemsize : stop * made.itemsize])


# ---- which of equal magnitudes ------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 400),
    st.integers(1, 6),
    st.floats(0, 1, allow_nan=False),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.1, 0.4]),
)
def test_of_equal_magnitudes_the_earlier_stay(size: int, levels: int, density: float, seed: int, gamma: float) -> None:
    rng = np.random.default_rng(seed)
    delta = (rng.integers(-levels, levels + 1, size) / 8).astype("f4")
    tensors = [torch.zeros(size), torch.from_numpy(delta)]
    order = np.lexsort((np.arange(size), -np.abs(delta)))  # the largest first, of equal ones the earlier
    for name in ("ties", "breadcrumbs"):
        shared, each = {"normalize": False}, {"weight": (1.0,), "density": (density,)}
        if name == "breadcrumbs":
            each["gamma"] = (gamma,)
        found = as_float64(evaluate(RULES[name].make(group_of(name, tensors, shared, each))), "F32")
        kept = np.zeros(size, bool)
        if density >= 1:
            kept[:] = True
        elif name == "ties":
            kept[order[: max(1, int(density * size)) if density > 0 else 0]] = True
        else:
            target, top = int(density * size), int(gamma * size)
            begin = size - max(0, size - target - top) - target
            kept[order[begin : begin + target]] = True
        assert np.array_equal(found, np.where(kept, delta, 0))


# ---- random ones --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_masks_keep_as_many_and_as_much(name: str) -> None:
    shape, density = (200, 500), 0.3
    tensors = tensors_of(1, shape, "F32")
    each = {"weight": (1.0,), "density": (density,)}
    made = [evaluate(RULES[name].make(group_of(name, tensors, {}, each, seed=seed))) for seed in (0, 0, 1)]
    assert np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])
    base, delta = tensors[0].numpy(), (tensors[1] - tensors[0]).numpy()
    left = as_float64(made[0], "F32").reshape(shape) - base
    kept = np.abs(left) > 1e-7
    assert kept.mean() == pytest.approx(density, abs=4 * math.sqrt(0.21 / delta.size))
    assert np.abs(left).sum() == pytest.approx(np.abs(delta).sum(), rel=1e-3)  # rescaled to the same L1 norm
    factor = left[kept] / delta[kept]
    assert np.allclose(factor, np.median(factor), rtol=1e-2)
    if name.startswith("della"):
        ranks = np.abs(delta).argsort(axis=1).argsort(axis=1)
        for lower in range(0, 500, 100):
            some = (ranks >= lower) & (ranks < lower + 100)
            wanted = density - 0.15 + 0.3 * (lower + 49.5) / 499
            assert kept[some].mean() == pytest.approx(wanted, abs=5 * math.sqrt(0.25 / some.sum()))


def test_probabilities_follow_exact_ranks() -> None:
    """With a threshold that a random number nearly meets, one rank more or less decides: all of a small row's ranks."""
    tensors = tensors_of(1, (400, 9), "F32")
    each = {"weight": (1.0,), "density": (0.5,), "epsilon": (0.4999,)}
    counts = np.zeros(9)
    delta = (tensors[1] - tensors[0]).numpy()
    ranks = np.abs(delta).argsort(axis=1).argsort(axis=1)
    for seed in range(40):
        made = RULES["della_linear"].make(group_of("della_linear", tensors, {"rescale": False}, each, seed=seed))
        kept = np.abs(as_float64(evaluate(made), "F32").reshape(400, 9) - tensors[0].numpy()) > 1e-8
        counts += [kept[ranks == rank].mean() for rank in range(9)]
    assert np.allclose(counts / 40, np.linspace(0.0001, 0.9999, 9), atol=0.02)


# ---- numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameter", "value", "words"),
    [
        ("ties", "density", 1.5, "at most 1"),
        ("ties", "density", True, "a number"),
        ("karcher", "max_iter", 2.5, "a whole number"),
        ("karcher", "tol", 0.0, "above 0"),
        ("breadcrumbs", "gamma", 1.0, "below 1"),
        ("ties", "normalize", "yes", "true or false"),
    ],
)
def test_numbers_out_of_range_are_refused(name: str, parameter: str, value: object, words: str) -> None:
    rule = RULES[name]
    with pytest.raises(ValueError, match=words):
        {**rule.shared, **rule.each}[parameter].checked(value)


@pytest.mark.parametrize(
    ("name", "count", "has_base", "words"),
    [
        ("ties", 2, False, "needs a base_model"),
        ("slerp", 2, True, "exactly 1 models beside the base, not 2"),
        ("model_stock", 1, True, "at least 2"),
        ("passthrough", 2, False, "exactly 1"),
    ],
)
def test_a_wrong_number_of_models_is_refused(name: str, count: int, has_base: bool, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RULES[name].check_count(count, has_base)


def test_probabilities_beyond_certainty_are_refused() -> None:
    group = group_of("della", tensors_of(1, (4, 4), "F32"), {}, {"weight": (1.0,), "density": (0.9,)})
    with pytest.raises(ValueError, match=r"density 0\.9 and epsilon 0\.15"):
        RULES["della"].make(group)


def test_the_rules_are_those_of_mergekit_with_its_parameters_and_defaults() -> None:
    from mergekit.merge_methods.registry import get

    for name, rule in RULES.items():
        spec = get(name).spec
        theirs = {parameter.name: parameter for parameter in spec.parameters}
        assert theirs.keys() == {**rule.shared, **rule.each}.keys(), name
        for key, parameter in {**rule.shared, **rule.each}.items():
            assert theirs[key].required == parameter.required, (name, key)
            if not parameter.required:
                assert theirs[key].default == parameter.default, (name, key)


def test_the_codes_that_rules_read_are_all_that_are_summed() -> None:
    assert set(CODES) == set(TORCH)

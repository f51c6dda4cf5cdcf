"""Distances between checkpoints against numpy in float64."""

import math
import resource

import numpy as np
import pytest

from merger.checkpoint import open_checkpoint
from merger.difference import Distance, by_layer, measure, pairs_of
from merger.errors import IncompatibleSources
from tests.checkpoints import as_float64, bfloat16, write_model


def stored(values, dtype):
    return bfloat16(values) if dtype == "BF16" else values.astype({"F16": "f2", "F32": "f4", "F64": "f8"}[dtype])


def exact(values, dtype):
    raw = stored(values, dtype)
    return as_float64(raw[2] if isinstance(raw, tuple) else raw.tobytes(), dtype)


def distances(tmp_path, a, b, limit=None):
    models = [open_checkpoint(write_model(tmp_path / name, tensors, {})) for name, tensors in (("a", a), ("b", b))]
    return measure(pairs_of(*models), limit)


@pytest.mark.parametrize(("first", "other"), [("F32", "F32"), ("BF16", "F16"), ("F64", "BF16"), ("F16", "F64")])
@pytest.mark.parametrize("size", [1, 5000, 2_500_000])
def test_sums_are_those_of_float64(tmp_path, first, other, size):
    rng = np.random.default_rng(size)
    x, y = rng.standard_normal((2, size))
    found = distances(tmp_path, {"t": stored(x, first)}, {"t": stored(y, other)})["t"]
    x, y = exact(x, first), exact(y, other)
    assert found.elements == size
    assert found.relative == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-12)
    assert found.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-10, abs=1e-12)
    assert found.largest == abs(x - y).max()


def test_a_limit_looks_at_the_start_of_each_tensor(tmp_path):
    x = np.arange(10.0)
    found = distances(tmp_path, {"t": x}, {"t": np.where(x < 4, x, 99)}, limit=4)["t"]
    assert (found.elements, found.relative) == (4, 0.0)


@pytest.mark.parametrize(
    ("a", "b", "relative", "cosine"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0.0, 1.0),
        ([0.0, 0.0], [1.0, 0.0], math.inf, 0.0),
        ([1.0, 0.0], [0.0, 0.0], 1.0, 0.0),
        ([1.0, 2.0], [-1.0, -2.0], 2.0, -1.0),
    ],
)
def test_zero_vectors_and_opposites(tmp_path, a, b, relative, cosine):
    found = distances(tmp_path, {"t": np.array(a)}, {"t": np.array(b)})["t"]
    assert (found.relative, found.cosine) == pytest.approx((relative, cosine))


def test_layers_add_up_their_tensors():
    rows = {
        "model.layers.0.a": Distance(1, 1, 1, 1, 4, 2),
        "model.layers.0.b": Distance(2, 3, 1, 1, 0, 1),
        "lm_head.weight": Distance(),
    }
    layers = by_layer(rows)
    assert list(layers) == ["model.layers.0", "lm_head.weight"]
    assert layers["model.layers.0"] == Distance(3, 4, 2, 2, 4, 2)
    assert layers["model.layers.0"].relative == 1.0


def test_shapes_must_agree_and_integers_have_no_distance(tmp_path):
    assert distances(tmp_path, {"i": np.array([1])}, {"i": np.array([2])}) == {}
    with pytest.raises(IncompatibleSources, match=r"\[2\] in .*a and \[3\] in .*b"):
        distances(tmp_path, {"t": np.ones(2)}, {"t": np.ones(3)})


def test_many_tensors_do_not_need_many_open_files(tmp_path):
    tensors = {f"layers.{i}.weight": np.ones(4, "f4") for i in range(300)}
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(200, before[1]), before[1]))
    try:
        assert len(distances(tmp_path, tensors, tensors)) == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

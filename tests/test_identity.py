"""What tells stored models from each other."""

import numpy as np
import pytest

from merger.checkpoint import open_checkpoint
from merger.errors import ReadFailed
from merger.identity import ELEMENTS, TENSORS, digest_of
from merger.methods.fine_tunes import sum_of_fine_tunes
from tests.checkpoints import bfloat16, write_model


def values(seed=0, count=3, size=5000):
    random = np.random.default_rng(seed)
    return {f"layers.{i}.weight": random.normal(size=size).astype("f4") for i in range(count)}


def digest(folder, tensors, **more):
    return digest_of(open_checkpoint(write_model(folder, tensors, {"model_type": "x"}, **more)))


def test_it_is_the_same_wherever_the_tensors_lie(tmp_path):
    assert digest(tmp_path / "a", values()) == digest(tmp_path / "b", values(), shards=2)
    reverse = dict(reversed(values().items()))
    assert digest(tmp_path / "a", values()) == digest(tmp_path / "c", reverse)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {**tensors, "more": np.zeros(1, "f4")},
        lambda tensors: {("first" if name.endswith("0.weight") else name): t for name, t in tensors.items()},
        lambda tensors: {name: tensor.reshape(50, 100) for name, tensor in tensors.items()},
        lambda tensors: {name: tensor.astype("f8") for name, tensor in tensors.items()},
        lambda tensors: {name: bfloat16(tensor) for name, tensor in tensors.items()},
        lambda tensors: {**tensors, "layers.1.weight": tensors["layers.1.weight"] * np.float32(1.001)},
        lambda tensors: values(1),
    ],
)
def test_another_model_has_another(tmp_path, change):
    assert digest(tmp_path / "a", values()) != digest(tmp_path / "b", change(values()))


def test_a_fine_tune_of_one_tensor_in_ten_is_told_from_its_base(tmp_path):
    many = values(count=400, size=2 * ELEMENTS)
    tuned = {n: t + np.float32(1e-3) if i % 10 == 3 else t for i, (n, t) in enumerate(sorted(many.items()))}
    assert len(many) > TENSORS
    assert digest(tmp_path / "a", many) != digest(tmp_path / "b", tuned)


def test_of_a_made_model_there_is_none(tmp_path):
    models = [open_checkpoint(write_model(tmp_path / str(i), values(i), {"model_type": "x"})) for i in (0, 1)]
    with pytest.raises(TypeError, match="is not stored"):
        digest_of(sum_of_fine_tunes(models, [0.5, 0.5]))


def test_a_file_that_ends_early_is_refused(tmp_path):
    model = open_checkpoint(write_model(tmp_path / "a", values(), {"model_type": "x"}))
    path = tmp_path / "a" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ReadFailed, match="ends early"):
        digest_of(model)

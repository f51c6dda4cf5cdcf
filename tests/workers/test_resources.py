"""What tasks ask of the cluster for the memory that they take."""

import numpy as np
import pytest

from merger.checkpoint import open_checkpoint
from merger.plan import make_plan
from merger.recipe import make_document
from merger.run import Options, plan_of
from tests.checkpoints import write_model
from workers.resources import TaskSize, measuring_request, request_for, training_request

PARAMETERS = 1_000_000


@pytest.fixture
def plan(tmp_path):
    write_model(tmp_path / "m", {"w": ("F32", (1000, 1000), np.zeros(PARAMETERS, np.float32).tobytes())})
    return make_plan(open_checkpoint(tmp_path / "m"), {}, 1 << 40)


def test_training_asks_for_weights_gradients_and_moments_beside_what_measuring_does(plan):
    size = TaskSize(cpus=2.0, memory=1 << 28)
    measuring, training = measuring_request(plan, size), training_request(plan, size)
    assert training.memory - measuring.memory == 20 * PARAMETERS  # gradients, two moments, and these once more
    assert measuring.memory > 8 * PARAMETERS
    assert (training.cpus, training.gpus) == (2.0, 0.0)


def test_a_shard_asks_for_its_buffers_and_the_process_whatever_the_model(plan):
    request, allotment = request_for(plan, TaskSize(memory=1 << 28))
    assert allotment.memory <= 1 << 28 < request.memory


def test_a_shard_with_tensors_made_as_a_whole_asks_for_their_memory_and_where_it_is_said_for_a_gpu(plan, tmp_path):
    for name, value in {"base": 0.0, "a": 1.0, "b": 2.0}.items():
        write_model(tmp_path / name, {"w": np.full((500, 400), value, np.float32)}, {"model_type": "x"})
    models = [str(tmp_path / name) for name in ("base", "a", "b")]
    recipe = {"method": "tsv", "base": models[0], "models": models[1:], "output": {"path": "unused"}}
    made, _ = plan_of(make_document(recipe), Options())
    cost = made.wholes[0].cost
    request, allotment = request_for(made, TaskSize(memory=1 << 20))
    assert allotment.memory == cost
    assert (request.gpus, allotment.device) == (0.0, "auto")
    assert request.memory > cost + (1 << 30)  # torch
    request, allotment = request_for(made, TaskSize(memory=1 << 20, device="cuda"))
    assert (request.gpus, allotment.device) == (1.0, "cuda")
    assert request_for(plan, TaskSize(memory=1 << 28, device="cuda"))[0].gpus == 0.0

"""Tensors that are made as a whole of models on a Hub, and by a task of a cluster."""

import pickle
from pathlib import Path

import numpy as np

from merger.checkpoint import open_checkpoint
from merger.recipe import make_document
from merger.remote_models import open_on_hub
from merger.run import Options, plan_of
from merger.staging import Staging
from tests.checkpoints import read_raw, write_model
from tests.methods.making import make
from tests.test_remote_models import access, own, server
from tests.test_spilling import SHAPE, whole, write
from tests.test_spilling import plan_of as plan_over
from workers.resources import TaskSize, request_for
from workers.shards import Uploading, Work, write_shard

__all__ = ["own", "server"]


def model(folder: Path, seed: int) -> Path:
    random = np.random.default_rng(seed)
    return write_model(folder, {f"w{i}": random.normal(size=SHAPE).astype("f4") for i in range(2)}, {"model_type": "x"})


def test_a_whole_of_remote_tensors(server, tmp_path):
    """Range by range, in threads, each byte once."""
    folder = model(tmp_path / "model", 0)
    server.add_model("org/a", folder)
    far, near = open_on_hub("hf://org/a", access(server)).tensors, open_checkpoint(folder).tensors
    plans = [plan_over({"x": whole("x", t["w0"], t["w1"]), "w": t["w0"]}) for t in (far, near)]
    assert write(plans[0], tmp_path / "far") == write(plans[1], tmp_path / "near")


def test_a_task_makes_what_a_run_makes_and_says_that_it_is_at_work(tmp_path):
    models = [str(model(tmp_path / name, seed)) for seed, name in enumerate(("base", "a", "b"))]
    recipe = {"method": "tsv", "base": models[0], "models": models[1:]}
    make(recipe, tmp_path / "run")
    document = make_document({**recipe, "output": {"path": str(tmp_path / "out")}})
    plan, _ = plan_of(document, Options())
    request, allotment = request_for(plan, TaskSize(1.0, 1 << 20))
    staging = Staging(tmp_path / "out", "job", 1)
    staging.take(plan)
    work = Work(staging.folder, allotment, plan.fingerprint, request)
    [shard] = pickle.loads(pickle.dumps(plan.shards))
    *said, receipt = write_shard(shard, pickle.loads(pickle.dumps(work)), ".1.0")
    assert any(isinstance(word, Uploading) for word in said)
    assert receipt.size == shard.size
    assert read_raw(staging.folder / receipt.file) == read_raw(tmp_path / "run" / "model.safetensors")
    assert not list((staging.folder / ".merger").glob("*.scratch*"))

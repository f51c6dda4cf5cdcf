"""Checkpoints in object stores, through recipes: what is streamed, found, pinned and refused."""

import json

import numpy as np
import pytest

from merger.engine import write_shards
from merger.errors import PickledWeights, SourceChanged, SourceError
from merger.receipt import FOLDER
from merger.recipe import make_document
from merger.run import Options, plan_of, run
from merger.sources import LocalSources
from merger.stored_objects import admit_location, open_in_store
from tests.checkpoints import bfloat16, write_model
from tests.methods.making import Silent

NAMES = [f"model.layers.{i}.weight" for i in range(4)]


def model(folder, seed, shards=2):
    rng = np.random.default_rng(seed)
    tensors = {name: bfloat16(rng.standard_normal((700, 500)).astype(np.float32)) for name in NAMES}
    config = {"model_type": "llama", "num_hidden_layers": 4}
    side_files = {"tokenizer.json": "{}", "README.md": "---\nlicense: mit\n---\n"}
    return write_model(folder, tensors, config, shards=shards, side_files=side_files)


def recipe(sources, output=None):
    shape = {"shard_size": "1MB"} | ({"path": str(output)} if output else {})
    return make_document({"method": "average", "checkpoints": sources, "weights": [0.25, 0.75], "output": shape})


@pytest.fixture
def parents(bucket, tmp_path):
    """The addresses of two models, which are in folders of the same names too."""
    return [bucket.put(model(tmp_path / name, seed), f"models/{name}") for seed, name in enumerate("ab")]


def test_two_models_are_streamed_range_by_range(bucket, parents, tmp_path):
    bucket.server.clear()
    outcome = run(recipe(parents, tmp_path / "far"), Options(parity="off"), Silent())
    weights = bucket.server.log("GET", ".safetensors")
    run(recipe([str(tmp_path / name) for name in "ab"], tmp_path / "near"), Options(parity="off"), Silent())

    names = sorted(path.name for path in (tmp_path / "near").glob("*.safetensors"))
    assert len(names) > 1
    for name in [*names, "config.json", "tokenizer.json", "model.safetensors.index.json"]:
        assert (tmp_path / "far" / name).read_bytes() == (tmp_path / "near" / name).read_bytes(), name

    weights = [one for one in weights if not one.path.endswith(".json")]
    assert weights
    assert all(one.range for one in weights)
    stored = sum(path.stat().st_size for name in "ab" for path in (tmp_path / name).glob("*.safetensors"))
    heads = 4 * (128 << 10)
    assert sum(one.sent for one in weights) <= stored + heads
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert outcome.figures.read == outcome.plan.read_size

    told = json.loads((tmp_path / "far" / "merger.json").read_text())["sources"][0]
    assert told["reference"] == parents[0]
    etag = bucket.store.head("models/a/model-00001-of-00002.safetensors")["e_tag"].strip('"')
    assert told["files"][0]["address"] == f"{parents[0]}/model-00001-of-00002.safetensors#{etag}"


def test_the_fingerprint_follows_the_objects(bucket, parents, tmp_path):
    before = plan_of(recipe(parents), Options())[0].fingerprint
    assert plan_of(recipe(parents), Options())[0].fingerprint == before
    bucket.put(model(tmp_path / "other", 7), "models/a")
    assert plan_of(recipe(parents), Options())[0].fingerprint != before


def test_an_object_that_changes_while_it_is_read_stops_the_run(bucket, parents, tmp_path):
    plan, allotment = plan_of(recipe(parents), Options())
    bucket.put(model(tmp_path / "other", 7), "models/b")
    (tmp_path / "out" / FOLDER).mkdir(parents=True)
    with pytest.raises(SourceChanged) as caught:
        write_shards(plan.shards, tmp_path / "out", allotment, plan.fingerprint)
    assert caught.value.where.startswith(f"{parents[1]}/model-")


def test_a_run_gets_through_a_store_that_stumbles(bucket, parents, tmp_path):
    bucket.server.fault(method="GET", path=".safetensors", status=503, after=5, times=4)
    bucket.server.fault(method="GET", path=".safetensors", cut=100_000, after=6, times=2)
    run(recipe(parents, tmp_path / "far"), Options(parity="off"), Silent())
    bucket.server.clear()
    run(recipe([str(tmp_path / name) for name in "ab"], tmp_path / "near"), Options(parity="off"), Silent())
    for path in (tmp_path / "near").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "far" / path.name).read_bytes()


def test_patterns_find_folders_in_natural_order(bucket, tmp_path):
    for step in (10, 9, 100):
        bucket.put(model(tmp_path / f"{step}", step), f"runs/tiny/step-{step}")
    bucket.store.put("runs/tiny/step-5.txt", b"")
    members = LocalSources().members(bucket.url("runs/tiny/step-*"))
    assert [str(member.origin) for member in members] == [bucket.url(f"runs/tiny/step-{n}") for n in (9, 10, 100)]
    assert [member.step for member in members] == [9, 10, 100]
    averaged = make_document({"method": "lawa", "checkpoints": bucket.url("runs/tiny/step-*"), "k": 2})
    parts = plan_of(averaged, Options())[0].checkpoint.parts
    assert [part.source.step for part in parts] == [10, 100]


def test_patterns_find_files(bucket, tmp_path):
    path = model(tmp_path / "m", 0, shards=1) / "model.safetensors"
    for name in ("run-2.safetensors", "run-1.safetensors", "run-3.json"):
        bucket.store.put(f"runs/{name}", path.read_bytes())
    members = LocalSources().members(bucket.url("runs/run-*"))
    assert [member.step for member in members] == [1, 2]
    assert LocalSources().open(members[0]).tensors.keys() == set(NAMES)


def test_patterns_that_find_nothing_say_what_is_there(bucket):
    bucket.store.put("runs/big/config.json", b"{}")
    with pytest.raises(SourceError, match="matches nothing") as caught:
        LocalSources().members(bucket.url("runs/step-*"))
    assert caught.value.remedy == f"{bucket.url('runs')} holds big."
    with pytest.raises(SourceError, match="before the last part"):
        LocalSources().members(bucket.url("*/step-1"))
    with pytest.raises(SourceError, match="is not there"):
        LocalSources().members(bucket.url("none/step-*"))


def test_pickles_are_refused(bucket):
    bucket.store.put("m/pytorch_model.bin", b"x")
    bucket.store.put("m/config.json", b"{}")
    for address in ("m", "m/pytorch_model.bin"):
        with pytest.raises(PickledWeights):
            open_in_store(bucket.url(address))
    assert not [one for one in bucket.server.log("GET") if one.path.endswith(".bin")]


def test_an_index_that_names_another_folder_is_refused(bucket, parents):
    index = {"weight_map": {"x": "../b/model.safetensors"}}
    bucket.store.put("models/a/model.safetensors.index.json", json.dumps(index).encode())
    with pytest.raises(SourceError, match="not a safetensors file in the same folder"):
        open_in_store(parents[0])


def test_a_missing_model_is_told_in_a_recipe(bucket):
    with pytest.raises(SourceError, match="is not there"):
        plan_of(make_document({"method": "average", "checkpoints": [bucket.url("none")]}), Options())


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("s3://team/a", ["s3://team/"]),
        ("s3://team", ["s3://team/"]),
        ("s3://team/models/a", ["gs://x/", "s3://team/models"]),
        ("s3://team/models/*", ["s3://team/models"]),
        ("s3://any/a", None),
    ],
)
def test_addresses_below_the_allowed_ones_are_admitted(address, allowed):
    admit_location(address, allowed)


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("s3://team/a", []),
        ("s3://team-b/a", ["s3://team"]),
        ("s3://team/models-b/a", ["s3://team/models"]),
        ("s3://team/mod*", ["s3://team/models"]),
        ("gs://team/a", ["s3://team/"]),
    ],
)
def test_other_addresses_are_refused_before_anything_is_asked(address, allowed):
    sources = LocalSources(stores=allowed)
    with pytest.raises(SourceError, match="is outside of the object stores"):
        sources.members(address)
    with pytest.raises(SourceError, match="is outside of the object stores"):
        sources.members([address])


def test_what_a_recipe_takes_side_files_from_is_admitted_too(bucket, parents, tmp_path):
    output = {"side_files_from": parents[1]}
    document = make_document({"method": "average", "checkpoints": [str(tmp_path / "a")], "output": output})
    with pytest.raises(SourceError, match="is outside of the object stores"):
        plan_of(document, Options(), LocalSources(stores=["s3://team/"]))
    assert plan_of(document, Options(), LocalSources(stores=[bucket.url()]))[0].fingerprint

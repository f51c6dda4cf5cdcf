"""Results in a bucket: whole or not at all, sent once, never in the place of something else."""

import hashlib
import json
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from merger.destination import Landed
from merger.errors import JobError, OutputOccupied, SourceError, WriteFailed
from merger.object_destination import object_destination
from merger.recipe import make_document
from merger.run import Options, plan_of, run
from merger.storage.stores import store_for
from merger.stored_objects import open_in_store
from tests.checkpoints import write_model
from tests.methods.making import Silent


def recipe(folder, weight=0.5, **output):
    sources = [str(folder / "a"), str(folder / "b")]
    shape = {"shard_size": "4KB", **output}
    return make_document(
        {"method": "average", "checkpoints": sources, "weights": [weight, 1 - weight], "output": shape}
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        rng = np.random.default_rng(seed)
        tensors = {f"model.layers.{i}.weight": rng.standard_normal(900).astype(np.float32) for i in range(3)}
        write_model(folder / name, tensors, {"model_type": "llama"}, side_files={"tokenizer.json": "{}"})
    return folder


def made(models: Path, weight: float):
    """A finished result in a folder, and its plan."""
    folder = models / f"out-{weight}"
    if not folder.exists():
        run(recipe(models, weight, path=str(folder)), Options(parity="off"), Silent())
    return folder, plan_of(recipe(models, weight), Options())[0]


@pytest.fixture
def result(models):
    return made(models, 0.5)


@pytest.fixture
def other(models):
    return made(models, 0.25)


def pushed(destination, folder, plan) -> str:
    return destination.publish(folder, plan, landed(destination, folder, plan))


def landed(destination, folder, plan) -> dict[str, Landed]:
    return {shard.name: destination.upload(folder / shard.name) for shard in plan.shards}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sent(bucket, suffix=".safetensors") -> list[str]:
    """The names of the objects that were put since the log was cleared."""
    return [one.path.rpartition("/")[2] for one in bucket.server.log("PUT") if one.path.endswith(suffix)]


def test_a_result_appears_whole(bucket, result):
    folder, plan = result
    destination = object_destination(bucket.url("out/moe"))
    assert destination.name == f"s3://{bucket.name}/out/moe"
    assert destination.check(plan) is None
    destination.prepare()
    assert bucket.content("out/moe") == {}
    there = landed(destination, folder, plan)
    assert {name.partition("/")[0] for name in bucket.content("out/moe")} == {*there, ".merger"}
    assert destination.check(plan) is None
    bucket.server.clear()
    assert destination.publish(folder, plan, there) == destination.name
    assert bucket.content("out/moe") == files(folder)
    *_, index, manifest, config = sent(bucket, ".json")
    assert (index, manifest, config) == ("model.safetensors.index.json", "merger.json", "config.json")
    assert sent(bucket) == []
    assert destination.check(plan) == destination.name
    stored = open_in_store(destination.name)
    assert stored.tensors.keys() == plan.checkpoint.tensors.keys()


def test_every_object_tells_what_it_is(bucket, result):
    folder, plan = result
    destination = object_destination(bucket.url("out"))
    pushed(destination, folder, plan)
    for name, content in files(folder).items():
        told = bucket.store.get(f"out/{name}", options={"head": True}).attributes
        assert told["merger"] == plan.fingerprint
        assert told["sha256"] == hashlib.sha256(content).hexdigest()
    assert bucket.store.get("out/report.html", options={"head": True}).attributes["Content-Type"] == "text/html"


def test_the_same_result_again_is_no_work(bucket, result):
    folder, plan = result
    destination = object_destination(bucket.url("out"))
    pushed(destination, folder, plan)
    before = bucket.content("out")
    bucket.server.clear()
    assert pushed(destination, folder, plan) == destination.name
    assert sent(bucket) == []
    assert bucket.content("out") == before


def test_a_publication_that_was_cut_off_goes_on(bucket, result):
    folder, plan = result
    destination = object_destination(bucket.url("out"))
    there = landed(destination, folder, plan)
    bucket.server.fault(method="PUT", path="config.json", status=403)
    with pytest.raises(SourceError, match="HTTP 403"):
        destination.publish(folder, plan, there)
    names = bucket.content("out").keys()
    assert "merger.json" in names
    assert "config.json" not in names
    with pytest.raises(SourceError, match="is not there"):
        open_in_store(bucket.url("out/config.json/"))
    bucket.server.clear()
    (folder / "report.html").write_bytes(b"another day, another report")
    assert destination.check(plan) is None
    assert pushed(destination, folder, plan) == destination.name
    assert sent(bucket) == []
    assert bucket.content("out") == files(folder)


def test_what_passes_is_tried_again(bucket, result):
    folder, plan = result
    bucket.server.fault(method="PUT", path="model-", status=503, times=2)
    bucket.server.fault(method="PUT", path="config.json", status=500, times=2)
    destination = object_destination(bucket.url("out"))
    pushed(destination, folder, plan)
    assert bucket.content("out") == files(folder)


# ---- others -------------------------------------------------------------------------------------------


def test_what_is_there_is_never_replaced(bucket, result, other):
    destination = object_destination(bucket.url("out"))
    pushed(destination, *other)
    before = bucket.content("out")
    folder, plan = result
    with pytest.raises(OutputOccupied, match="holds a finished result of another recipe"):
        destination.check(plan)
    with pytest.raises(OutputOccupied):
        destination.upload(folder / plan.shards[0].name)
    with pytest.raises(OutputOccupied):
        destination.publish(folder, plan, {})
    assert bucket.content("out") == before


@pytest.mark.parametrize("name", ["README.md", "config.json", "model-00001-of-00003.safetensors", "sub/x"])
def test_a_folder_of_somebody_else_is_left_alone(bucket, result, name):
    folder, plan = result
    bucket.store.put(f"out/{name}", b"theirs")
    destination = object_destination(bucket.url("out"))
    with pytest.raises(OutputOccupied, match="holds something else") as caught:
        destination.check(plan)
    assert "never replaces" in caught.value.remedy
    with pytest.raises(OutputOccupied):
        destination.upload(folder / plan.shards[0].name)
    assert bucket.content("out") == {name: b"theirs"}


def test_objects_that_came_after_the_claim_are_left_alone(bucket, result):
    folder, plan = result
    destination = object_destination(bucket.url("out"))
    there = landed(destination, folder, plan)
    bucket.store.put("out/README.md", b"theirs")
    with pytest.raises(OutputOccupied, match=r"holds another README\.md"):
        destination.publish(folder, plan, there)
    assert bucket.content("out")["README.md"] == b"theirs"
    bucket.store.put("out/config.json", b"{}")
    with pytest.raises(OutputOccupied):
        destination.publish(folder, plan, there)


def test_of_two_recipes_the_first_to_come_wins(bucket, result, other):
    destination = object_destination(bucket.url("out"))
    assert [destination.check(plan) for _, plan in (result, other)] == [None, None]
    there = landed(destination, *result)
    folder, plan = other
    with pytest.raises(OutputOccupied, match="unfinished work of another recipe"):
        destination.check(plan)
    with pytest.raises(OutputOccupied, match="is being written by another recipe"):
        destination.upload(folder / plan.shards[0].name)
    destination.publish(*result, there)
    assert bucket.content("out") == files(result[0])


def test_of_many_publishers_at_once_one_wins(bucket, result, other):
    ends: dict[int, object] = {}

    def push(i: int) -> None:
        try:
            ends[i] = pushed(object_destination(bucket.url("out")), *(result, other)[i % 2])
        except OutputOccupied as error:
            ends[i] = error

    threads = [threading.Thread(target=push, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = {i % 2 for i, end in ends.items() if isinstance(end, str)}
    assert len(won) == 1
    assert all(isinstance(end, OutputOccupied) for i, end in ends.items() if i % 2 not in won)
    assert bucket.content("out") == files((result, other)[won.pop()][0])
    configs = [one.status for one in bucket.server.log("PUT", "out/config.json")]
    assert configs.count(200) == 1


def test_a_shard_that_was_exchanged_is_not_published(bucket, result):
    folder, plan = result
    destination = object_destination(bucket.url("out"))
    there = landed(destination, folder, plan)
    bucket.store.put(f"out/{plan.shards[1].name}", b"x")
    with pytest.raises(WriteFailed, match="is not there as it was uploaded") as caught:
        destination.publish(folder, plan, there)
    assert caught.value.where == bucket.url(f"out/{plan.shards[1].name}")
    assert "config.json" not in bucket.content("out")


# ---- refusals -----------------------------------------------------------------------------------------


def test_a_store_without_conditions_is_refused_before_anything_is_made(bucket):
    destination = object_destination(bucket.url("out"))
    destination.prepare()
    bucket.server.fault(method="PUT", unconditional=True)
    with pytest.raises(WriteFailed, match="If-None-Match"):
        destination.prepare()
    assert bucket.content("out") == {}


def test_who_may_only_read_is_refused_before_anything_is_made(bucket, result, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", bucket.server.reader[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", bucket.server.reader[1])
    store_for.cache_clear()
    destination = object_destination(bucket.url("out"))
    assert destination.check(result[1]) is None
    with pytest.raises(SourceError, match="HTTP 403 AccessDenied") as caught:
        destination.prepare()
    assert not any(key in str(caught.value) for key in bucket.server.reader)


def test_what_is_no_address_is_no_destination():
    with pytest.raises(SourceError, match="is not an address"):
        object_destination("s3://")


def test_a_missing_bucket_is_told_first(bucket, result):
    object_destination(bucket.url("out")).admit()
    with pytest.raises(SourceError, match="no such bucket"):
        object_destination("s3://no-such-bucket/x").admit()
    with pytest.raises(SourceError, match="no such bucket"):
        object_destination("s3://no-such-bucket/x").check(result[1])


def test_only_finished_shards_are_uploaded(bucket, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"x")
    with pytest.raises(WriteFailed, match="no receipt"):
        object_destination(bucket.url("out")).upload(tmp_path / "x.safetensors")
    (tmp_path / "merger.json").write_text('{"fingerprint": "f"}')
    with pytest.raises(WriteFailed, match="cannot be read any more"):
        object_destination(bucket.url("out")).upload(tmp_path / "y.safetensors")
    assert bucket.content("out") == {}


# ---- processes ----------------------------------------------------------------------------------------

UPLOAD = """
import sys
from pathlib import Path
from merger.object_destination import object_destination
destination = object_destination(sys.argv[1])
for path in sorted(Path(sys.argv[2]).glob("*.safetensors")):
    print(destination.upload(path), flush=True)
"""


def large(folder: Path, sizes: list[int]) -> Path:
    """Something like finished shards of so many bytes."""
    folder.mkdir()
    (folder / "merger.json").write_text(json.dumps({"fingerprint": "f" * 64}))
    for i, size in enumerate(sizes):
        (folder / f"{i}.safetensors").write_bytes(np.random.default_rng(i).bytes(size))
    return folder


def test_after_a_kill_only_what_is_missing_is_sent(bucket, tmp_path):
    folder = large(tmp_path / "big", [20 << 20, 20 << 20])
    bucket.server.fault(method="PUT", path="out/1.", hold=True)
    first = bucket.process(UPLOAD, bucket.url("out"), folder)
    assert first.stdout.readline().startswith("Landed(file='0.safetensors'")
    deadline = time.monotonic() + 60
    while not sent(bucket, "1.safetensors"):
        assert time.monotonic() < deadline
    first.send_signal(signal.SIGKILL)
    first.communicate()
    bucket.server.clear()
    assert bucket.content("out").keys() == {"0.safetensors", ".merger/claim.json"}

    second = bucket.process(UPLOAD, bucket.url("out"), folder)
    out, error = second.communicate(timeout=120)
    assert (second.returncode, len(out.splitlines())) == (0, 2), error
    assert set(sent(bucket)) == {"1.safetensors"}
    content = bucket.content("out")
    assert all(content[path.name] == path.read_bytes() for path in folder.glob("*.safetensors"))


MEASURED = """
import re, sys
from pathlib import Path
from merger.object_destination import object_destination

def most() -> int:
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

destination = object_destination(sys.argv[1])
small, big = (Path(sys.argv[2]) / f"{i}.safetensors" for i in (0, 1))
destination.upload(small)
before = most()
destination.upload(big)
print(most() - before)
"""


def test_an_upload_holds_a_few_parts_in_memory(bucket, tmp_path):
    folder = large(tmp_path / "big", [1 << 20, 160 << 20])
    out, error = bucket.process(MEASURED, bucket.url("out"), folder).communicate(timeout=300)
    assert out, error
    assert 16 << 20 < int(out) < 112 << 20  # three parts of 16 MiB on their way, some being filled or sent
    assert bucket.store.head("out/1.safetensors")["size"] == 160 << 20


def test_an_upload_that_is_interrupted_leaves_nothing_begun(bucket, tmp_path, monkeypatch):
    folder = large(tmp_path / "big", [40 << 20])
    passed = []

    def pieces(path):
        yield path.read_bytes()[: 33 << 20]
        passed.append(path)
        raise KeyboardInterrupt

    destination = object_destination(bucket.url("out"))
    monkeypatch.setattr("merger.object_destination._digest", lambda path: (40 << 20, "0" * 64))
    monkeypatch.setattr("merger.object_destination._pieces", pieces)
    with pytest.raises(KeyboardInterrupt):
        destination.upload(folder / "0.safetensors")
    assert passed
    assert bucket.content("out").keys() == {".merger/claim.json"}
    assert [one.status for one in bucket.server.log("DELETE") if "uploadId" in one.query] == [204]


# ---- the whole flow -----------------------------------------------------------------------------------


def test_a_recipe_pushes_while_it_is_made(bucket, models, result, tmp_path):
    document = recipe(models, 0.5, push=bucket.url("whole"), accept_license=True)
    outcome = run(document, Options(parity="off"), Silent())
    assert outcome.published == f"s3://{bucket.name}/whole"
    there = bucket.content("whole")
    assert {name: content for name, content in there.items() if name.endswith((".safetensors", "config.json"))} == {
        name: content for name, content in files(result[0]).items() if name.endswith((".safetensors", "config.json"))
    }
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    bucket.server.clear()
    assert run(document, Options(parity="off"), Silent()).published == outcome.published
    assert bucket.server.log("PUT") == []


def test_a_run_that_could_not_publish_goes_on_with_what_landed(bucket, models):
    document = recipe(models, 0.5, push=bucket.url("whole"), accept_license=True)
    bucket.server.fault(method="PUT", path="config.json", status=418)
    with pytest.raises(JobError, match="HTTP 418"):
        run(document, Options(parity="off"), Silent())
    bucket.server.clear()
    assert run(document, Options(parity="off"), Silent()).published
    assert sent(bucket) == []

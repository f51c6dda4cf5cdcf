"""Objects and folders of a store that speaks S3: ranges, pins, faults, the cache."""

import pickle
import traceback
from types import SimpleNamespace

import numpy as np
import pytest

from merger.errors import FormatError, ReadFailed, SourceChanged, SourceError
from merger.storage import objects, patience
from merger.storage.objects import ObjectFile, ObjectFolder, object_at
from merger.storage.stores import location_of, store_for
from tests.checkpoints import write_model

CONTENT = np.random.default_rng(0).bytes(3_000_000)


def fetched(file, start, stop):
    into = bytearray(stop - start)
    file.fetch(start, memoryview(into))
    return bytes(into)


@pytest.fixture
def file(bucket):
    bucket.store.put("a/x y", CONTENT)
    return object_at(bucket.url("a/x y"))


def test_a_range_is_asked_for_as_a_range(bucket, file):
    bucket.server.clear()
    assert fetched(file, 1_000_000, 2_500_000) == CONTENT[1_000_000:2_500_000]
    assert [one.range for one in bucket.server.log("GET")] == ["bytes=1000000-2499999"]


def test_an_object_is_its_address_and_its_etag(bucket, file):
    assert file.address == f"{bucket.url('a/x y')}#{file.etag.strip(chr(34))}"
    assert file.name == "x y"
    assert object_at(bucket.url("a/x y")) == file
    bucket.store.put("a/x y", CONTENT[:-1])
    assert object_at(bucket.url("a/x y")) != file


def test_an_object_travels_without_secrets(bucket, file):
    pickled = pickle.dumps(file)
    assert not any(key.encode() in pickled for key in bucket.server.owner)
    program = (
        "import pickle, sys; f = pickle.loads(bytes.fromhex(sys.argv[1])); "
        "b = bytearray(5); f.fetch(7, memoryview(b)); print(b.hex(), f)"
    )
    out, error = bucket.process(program, pickled.hex()).communicate(timeout=60)
    assert out.split(" ", 1) == [CONTENT[7:12].hex(), f"{file}\n"], error


@pytest.mark.parametrize(
    "change", [lambda store: store.put("a/x y", CONTENT[::-1]), lambda store: store.delete("a/x y")]
)
def test_an_object_that_was_changed_is_not_read(bucket, file, change):
    change(bucket.store)
    with pytest.raises(SourceChanged, match="since it was planned"):
        fetched(file, 0, 10)


def test_failures_that_pass_are_asked_again(bucket, file):
    bucket.server.fault(method="GET", status=503, times=5)
    assert fetched(file, 0, len(CONTENT)) == CONTENT


def test_what_was_cut_goes_on_where_it_was(bucket, file):
    bucket.server.clear()
    bucket.server.fault(method="GET", cut=2_000_000, times=1)
    assert fetched(file, 0, len(CONTENT)) == CONTENT
    starts = [int(one.range.removeprefix("bytes=").split("-")[0]) for one in bucket.server.log("GET")]
    assert starts[0] == 0
    assert 0 < starts[1] <= 2_000_000


def test_a_store_that_fails_for_good_is_given_up(bucket, file):
    bucket.server.fault(method="GET", status=500)
    with pytest.raises(ReadFailed, match="failed 8 times, the last time: HTTP 500 Injected: fault 500"):
        fetched(file, 0, 10)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ({"size": 11}, SourceChanged, "has 11 bytes, 10 were planned"),
        ({"range": (0, 9)}, ReadFailed, "another range"),
        ({"body": [b"0123456789X"]}, ReadFailed, "more than was asked for"),
        ({"body": []}, ReadFailed, "ended 10 bytes early"),
    ],
)
def test_answers_that_are_not_what_was_asked_for(monkeypatch, answer, error, message):
    given = {"size": 10, "range": (0, 10), "body": [b"0123456789"], **answer}
    reply = SimpleNamespace(meta=given, range=given["range"], stream=lambda _: iter(given["body"]))
    monkeypatch.setattr(objects, "store_for", lambda _: SimpleNamespace(get=lambda _, options: reply))
    monkeypatch.setattr(patience, "_FIRST", 0.001)
    with pytest.raises(error, match=message):
        fetched(ObjectFile(location_of("s3://b/a"), 10, '"e"', "v1"), 0, 10)


def test_an_object_without_an_etag_is_refused(monkeypatch):
    told = {"size": 1, "e_tag": None, "version": None}
    monkeypatch.setattr(objects, "store_for", lambda _: SimpleNamespace(head=lambda _: told))
    with pytest.raises(SourceError, match="no ETag"):
        object_at("s3://b/a")


def test_a_cache_that_cannot_be_written_is_told(bucket, file, monkeypatch, tmp_path):
    (tmp_path / "taken").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    with pytest.raises(ReadFailed, match="cannot be kept in the cache") as caught:
        file.download()
    assert "XDG_CACHE_HOME" in caught.value.remedy


def test_an_index_that_is_far_too_large_is_not_fetched(bucket, monkeypatch):
    bucket.store.put("m/model.safetensors.index.json", b"{}")
    monkeypatch.setattr(objects, "_LARGEST_INDEX", 1)
    with pytest.raises(FormatError, match="an index of 2 bytes"):
        ObjectFolder(location_of(bucket.url("m"))).path("model.safetensors.index.json")


def test_a_download_is_kept_and_checked(bucket, file):
    path = file.download()
    assert (path.name, path.read_bytes()) == ("x y", CONTENT)
    bucket.server.clear()
    assert file.download() == path
    assert bucket.server.log() == []
    assert list(path.parent.iterdir()) == [path]


def test_a_download_of_what_was_changed_leaves_nothing(bucket, file, tmp_path):
    bucket.store.put("a/x y", CONTENT[::-1])
    with pytest.raises(SourceChanged):
        file.download()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_folder_is_what_its_keys_have_in_common(bucket):
    for key in ("m/a.json", "m/sub/b", "m2/c", "m", "m/"):
        bucket.store.put(key, b"{}")
    place = ObjectFolder(location_of(bucket.url("m/")))
    assert place.names == {"a.json", "sub"}
    assert (place.size("a.json"), place.size("sub")) == (2, None)
    assert place.path("a.json").read_bytes() == b"{}"
    assert place.where("a.json") == bucket.url("m/a.json")


@pytest.mark.slow
def test_a_folder_of_more_objects_than_one_answer_holds(bucket):
    for i in range(1005):
        bucket.store.put(f"m/{i}", b"")
    assert len(ObjectFolder(location_of(bucket.url("m"))).names) == 1005


def test_headers_are_read_with_one_small_request(bucket, tmp_path):
    write_model(tmp_path / "m", {"x": np.ones(1_000_000, np.float32)})
    bucket.put(tmp_path / "m", "m")
    bucket.server.clear()
    weights = ObjectFolder(location_of(bucket.url("m"))).weights("model.safetensors")
    assert list(weights.header.tensors) == ["x"]
    assert [one.range for one in bucket.server.log("GET", "safetensors")] == [f"bytes=0-{(128 << 10) - 1}"]


def test_a_damaged_header_names_the_object(bucket):
    bucket.store.put("m/model.safetensors", b"\xff" * 100)
    with pytest.raises(FormatError) as caught:
        ObjectFolder(location_of(bucket.url("m"))).weights("model.safetensors")
    assert caught.value.where == bucket.url("m/model.safetensors")


def test_what_is_not_there(bucket):
    with pytest.raises(SourceError, match=r"absent: is not there"):
        ObjectFolder(location_of(bucket.url("absent")))
    with pytest.raises(SourceError, match=r"absent: is not there"):
        object_at(bucket.url("absent"))
    with pytest.raises(SourceError, match=r"^s3://no-such-bucket: there is no such bucket"):
        ObjectFolder(location_of("s3://no-such-bucket/m"))


def test_wrong_keys_are_told_without_showing_them(bucket, monkeypatch):
    for identity, secret, code in (
        (bucket.server.owner[0], "wrongsecret", "SignatureDoesNotMatch"),
        ("AKIAWRONGKEY", "wrongsecret", "InvalidAccessKeyId"),
    ):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", identity)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        store_for.cache_clear()
        with pytest.raises(SourceError, match=f"HTTP 403 {code}") as caught:
            ObjectFolder(location_of(bucket.url("m")))
        shown = "".join(traceback.format_exception(caught.value))
        assert not any(key in shown for key in (identity, secret))


def test_a_store_that_is_not_there(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    store_for.cache_clear()
    with pytest.raises(ReadFailed, match="the store cannot be reached"):
        ObjectFolder(location_of(bucket.url("m")))

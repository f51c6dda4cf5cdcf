"""Models on a Hub: pinned, described by their trees, read by ranges or downloaded once; clear refusals."""

import logging
import os
import pickle
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from merger.errors import FormatError, MergerError, ReadFailed, SourceChanged, SourceError
from merger.secret import Token
from merger.storage import hub as module
from merger.storage import patience, ranges, xet
from merger.storage.hub import Access, HubFile, HubFolder, asked, branches, library, own_access, pinned
from merger.storage.patience import TRIES
from merger.storage.reference import Reference, reference_of
from tests.checkpoints import write_header, write_model
from tests.hub_server.fixtures import hub

DATA = random.Random(0).randbytes(1_000_000)
CONFIG = b'{"model_type": "llama"}'
MAIN = Reference("org/a")


@pytest.fixture(autouse=True)
def impatient(monkeypatch, tmp_path) -> None:
    """Short waits, a cache of its own, and a process that knows no address yet."""
    monkeypatch.setattr(patience, "_FIRST", 0.002)
    monkeypatch.setattr(patience, "_LONGEST", 0.004)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setattr(ranges, "ADDRESSES", ranges.Addresses())
    monkeypatch.setattr(library().constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["lfs", "xet"])
def mode(request, monkeypatch) -> str:
    use(monkeypatch, request.param)
    return request.param


def use(monkeypatch, mode: str) -> None:
    """What the environment says of Xet, to a process that has read it already."""
    monkeypatch.setattr(library().constants, "HF_HUB_DISABLE_XET", mode == "lfs")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "20ms")
    monkeypatch.setattr(xet, "_GROUPS", xet._Groups())


@pytest.fixture
def server(tmp_path, mode) -> Iterator:
    with hub(tmp_path, mode) as one:
        one.write("org/a", {"model.safetensors": DATA, "config.json": CONFIG, "sub/x.txt": b"x"})
        yield one


@pytest.fixture
def lfs(tmp_path, monkeypatch) -> Iterator:
    """A server where Xet plays no part."""
    use(monkeypatch, "lfs")
    with hub(tmp_path) as one:
        one.write("org/a", {"model.safetensors": DATA, "config.json": CONFIG, "sub/x.txt": b"x"})
        yield one


def access(server, token: str | None = "hf_test_me") -> Access:
    return Access(server.endpoint, Token(token) if token else None)


def folder(server, reference: Reference = MAIN, token: str | None = "hf_test_me") -> HubFolder:
    return HubFolder(pinned(reference, access(server, token)), reference.folder, str(reference))


def part(file: HubFile, start: int, stop: int) -> bytes:
    into = bytearray(stop - start)
    file.fetch(start, memoryview(into))
    return bytes(into)


def refused(kind: type[MergerError], says: str, do: Callable[..., object], *arguments: object) -> MergerError:
    """The error, which has no secret in it, nor has what it came from."""
    with pytest.raises(kind, match=says) as caught:
        do(*arguments)
    assert type(caught.value) is kind
    error: BaseException | None = caught.value
    while error:
        assert "hf_test" not in f"{error} {error!r}"
        assert "hf_wrong" not in f"{error} {error!r}"
        error = error.__cause__ or error.__context__
    return caught.value


# ---- pinning ------------------------------------------------------------------------------------------


def test_a_branch_that_moves_after_it_was_pinned_does_not_matter(server, mode):
    before = folder(server)
    server.write("org/a", {"model.safetensors": DATA[::-1], "config.json": b"{}", "new.json": b"{}"})
    assert before.names == {".gitattributes", "model.safetensors", "config.json", "sub"}
    assert part(before.file("model.safetensors"), 10, 500_000) == DATA[10:500_000]
    assert before.path("config.json").read_bytes() == CONFIG
    assert folder(server).path("config.json").read_bytes() == b"{}"


def test_branches_tags_pull_requests_and_commits(lfs):
    first = pinned(MAIN, access(lfs)).commit
    other = lfs.write("org/a", {"config.json": b"{}"}, revision="other")
    for revision, commit in (("other", other), (other, other), (first, first), ("refs/heads/other", other)):
        assert pinned(Reference("org/a", revision), access(lfs)).commit == commit
    api = access(lfs).api()
    api.create_tag("org/a", tag="v1", revision="other")
    api.create_pull_request("org/a", title="mine")
    assert pinned(Reference("org/a", "v1"), access(lfs)).commit == other
    assert pinned(Reference("org/a", "refs/pr/1"), access(lfs)).commit == first
    assert branches(MAIN, access(lfs)) == ["main", "other", "v1"]


def test_a_branch_with_a_slash(lfs):
    commit = lfs.write("org/a", {"config.json": b"{}"}, revision="runs/step-1")
    assert pinned(reference_of("hf://org/a@runs%2Fstep-1"), access(lfs)).commit == commit


# ---- refusals -----------------------------------------------------------------------------------------


def test_a_repository_that_is_not_there(lfs):
    error = refused(SourceError, "is not on the Hub, or is private", pinned, Reference("org/none"), access(lfs))
    assert error.where == "hf://org/none"
    assert "--token" in error.remedy


def test_a_private_repository_without_its_token(lfs):
    lfs.add_token("hf_test_other", "other")
    lfs.protect("org/a", private=True)
    for token in (None, "hf_test_other"):
        refused(SourceError, "is not on the Hub, or is private", pinned, MAIN, access(lfs, token))
    assert part(folder(lfs).file("model.safetensors"), 0, 9) == DATA[:9]


def test_a_gated_repository_is_refused_before_anything_is_read(server, mode):
    server.add_token("hf_test_other", "other")
    server.protect("org/a", gated=True)
    for token in (None, "hf_test_other"):
        error = refused(SourceError, "is gated", pinned, MAIN, access(server, token))
        assert error.where == "hf://org/a"
        assert "Accept its terms" in error.remedy
    server.allow("org/a", "other")
    opened = folder(server, token="hf_test_other")
    assert opened.repository.gated
    assert part(opened.file("model.safetensors"), 0, 9) == DATA[:9]


def test_a_revision_that_is_not_there(lfs):
    error = refused(SourceError, "has no such revision", pinned, Reference("org/a", "v9"), access(lfs))
    assert error.where == "hf://org/a@v9"


def test_a_folder_that_is_not_there(lfs):
    reference = Reference("org/a", folder="none")
    refused(SourceError, "has no such file or folder", folder, lfs, reference)


def test_a_token_that_nobody_knows(lfs):
    error = refused(SourceError, "Invalid credentials", pinned, MAIN, access(lfs, "hf_wrong"))
    assert error.where == "hf://org/a"


def test_a_repository_that_has_another_name_now(lfs):
    lfs.rename("org/a", "org/b")
    error = refused(SourceError, "was renamed to org/b", pinned, MAIN, access(lfs))
    assert "taken over" in error.remedy


def test_a_library_that_may_not_ask_is_not_asked_again(lfs, monkeypatch):
    monkeypatch.setattr(library().constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    error = refused(SourceError, "offline", pinned, MAIN, access(lfs))
    assert "HF_HUB_OFFLINE" in error.remedy
    assert lfs.log() == []


def test_a_hub_that_is_not_there(tmp_path, monkeypatch):
    with hub(tmp_path) as gone:
        pass
    refused(ReadFailed, "cannot be reached", pinned, MAIN, access(gone))


# ---- failures that pass -------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 429}, {"drop": True}, {"cut": 10}], ids=str)
def test_what_passes_is_asked_again(server, mode, fault):
    server.faults.add(path="/api/models/org/a", times=3, **fault)
    assert folder(server).has("config.json")


def test_a_download_that_fails_for_a_while(server, mode):
    opened = folder(server)
    server.faults.add(path="/resolve/", times=12, status=503)
    assert opened.path("config.json").read_bytes() == CONFIG


@pytest.mark.parametrize("fault", [{"status": 503}, {"drop": True}], ids=str)
def test_a_download_that_fails_for_good_is_not_said_to_be_missing(lfs, fault):
    opened = folder(lfs)
    lfs.faults.add(path="/resolve/", **fault)
    refused(ReadFailed, f"failed {TRIES} times", opened.path, "config.json")


def test_a_download_that_is_refused_says_so_at_once(lfs):
    opened = folder(lfs)
    lfs.faults.add(path="/resolve/", status=403, headers={"X-Error-Message": "no more"})
    refused(SourceError, "HTTP 403: no more", opened.path, "config.json")


def test_an_answer_that_nobody_expects(lfs):
    lfs.faults.add(path="/api/models/org/a", status=418)
    refused(ReadFailed, "HTTP 418", pinned, MAIN, access(lfs))


def test_a_cache_that_cannot_be_written(lfs, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where a folder should be")
    error = refused(ReadFailed, "cannot be stored", folder(lfs).path, "config.json")
    assert str(tmp_path / "cache") in error.where


# ---- folders ------------------------------------------------------------------------------------------


def test_a_folder_is_what_its_tree_says(server, mode):
    opened = folder(server)
    assert str(opened) == "hf://org/a"
    assert (opened.size("model.safetensors"), opened.size("sub"), opened.size("none")) == (len(DATA), None, None)
    assert (opened.has("config.json"), opened.has("sub"), opened.has("none")) == (True, False, False)
    assert list(opened.matches("*.safetensors")) == ["model.safetensors"]
    assert opened.where("x") == "hf://org/a/x"
    inner = folder(server, Reference("org/a", folder="sub"))
    assert (inner.names, inner.where("x.txt")) == ({"x.txt"}, "hf://org/a/sub/x.txt")
    assert inner.file("x.txt").address == f"hf://org/a@{opened.repository.commit}/sub/x.txt"
    file = opened.file("model.safetensors")
    assert (file.name, file.size, bool(file.xet_hash)) == ("model.safetensors", len(DATA), mode == "xet")


def test_a_large_tree_comes_in_pages(lfs):
    lfs.write("org/a", {f"{i}.txt": b"" for i in range(25)})
    lfs.page_size(10)
    assert len(folder(lfs).names) == 29


def test_headers_are_read_with_one_request(server, mode, tmp_path):
    import numpy as np

    write_model(tmp_path / "m", {"x": np.arange(500_000, dtype=np.float32)})
    server.add_model("org/m", tmp_path / "m")
    opened = folder(server, Reference("org/m"))
    server.clear_log()
    weights = opened.weights("model.safetensors")
    assert weights.header.tensors["x"].shape == (500_000,)
    assert weights.header.file_size == weights.path.size == opened.size("model.safetensors")
    assert len(server.log("cdn", "GET")) == 1
    assert sum(entry.sent for entry in server.log("cdn")) <= (128 << 10) + (1 << 16)  # Xet rounds to its chunks
    assert len(server.log("api")) == 1


def test_a_long_header_is_read_to_its_end(server, mode, tmp_path):
    (tmp_path / "m").mkdir()
    header = {f"tensor.{i:06d}" + "x" * 100: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(5000)}
    write_header(tmp_path / "m" / "model.safetensors", header)
    server.add_model("org/m", tmp_path / "m")
    assert folder(server, Reference("org/m")).weights("model.safetensors").header.tensors.keys() == header.keys()


def test_a_header_that_lies_about_its_length_is_not_fetched(server, mode, tmp_path):
    (tmp_path / "m").mkdir()
    for name, length in (("huge", 1 << 60), ("large", 33 << 20), ("truncated", 900_000)):
        write_header(tmp_path / "m" / f"{name}.safetensors", b"{}" + b" " * 800_000, length=length)
    server.add_model("org/m", tmp_path / "m")
    opened = folder(server, Reference("org/m"))
    for name in ("huge", "large", "truncated"):
        server.clear_log()
        refused(FormatError, "header", opened.weights, f"{name}.safetensors")
        assert sum(entry.sent for entry in server.log("cdn")) <= 200 << 10


@pytest.mark.parametrize("size", [500_000, 2_000_000])
def test_a_tree_that_lies_about_a_size(lfs, size):
    lfs.lie_about_size("org/a", "model.safetensors", size)
    refused(SourceChanged, "has 1,000,000 bytes", part, folder(lfs).file("model.safetensors"), 0, 1000)


def test_a_tree_that_promises_more_than_there_is(server, mode):
    server.lie_about_size("org/a", "model.safetensors", 2_000_000)
    kind, says = (SourceChanged, "has 1,000,000 bytes") if mode == "lfs" else (ReadFailed, "the last time: ")
    refused(kind, says, part, folder(server).file("model.safetensors"), 900_000, 1_100_000)


def test_an_index_that_is_too_large_is_not_downloaded(lfs, monkeypatch):
    monkeypatch.setattr(module, "_LARGEST_INDEX", 10)
    lfs.write("org/a", {"model.safetensors.index.json": b" " * 11})
    refused(FormatError, "is an index of 11 bytes", folder(lfs).path, "model.safetensors.index.json")
    assert lfs.log(path="/resolve/") == []


def test_strange_names(lfs):
    lfs.write("org/a", {"a b?#%41ü.txt": DATA[:100], "../evil.txt": b"e"})
    opened = folder(lfs)
    assert opened.path("a b?#%41ü.txt").read_bytes() == DATA[:100]
    assert part(opened.file("a b?#%41ü.txt"), 5, 50) == DATA[5:50]


# ---- ranges -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 1_000_000), (65_535, 65_537), (123, 777_777), (7, 7)])
def test_any_range(server, mode, start, stop):
    assert part(folder(server).file("model.safetensors"), start, stop) == DATA[start:stop]
    assert server.violations() == []
    assert {entry.token for entry in server.log("cdn")} <= {None}
    assert server.token not in {entry.token for entry in server.log("cas")}


def test_many_threads_cost_one_question(server, mode):
    file = folder(server).file("model.safetensors")
    server.clear_log()
    with ThreadPoolExecutor(8) as pool:
        parts = pool.map(lambda i: part(file, i * 10_000, i * 10_000 + 10_000), range(64))
    assert b"".join(parts) == DATA[:640_000]
    assert len(server.log("api")) == 1


@pytest.mark.parametrize("fault", [{"status": 503}, {"drop": True}, {"cut": 5000}, {"status": 403}], ids=str)
@pytest.mark.parametrize("origin", ["cdn", "cas"])
def test_a_range_survives_what_passes(server, mode, origin, fault):
    file = folder(server).file("model.safetensors")
    server.faults.add(origin=origin, times=2, **fault)
    assert part(file, 1000, 900_000) == DATA[1000:900_000]


def test_xet_that_fails_for_good_is_told_without_secrets(tmp_path, monkeypatch):
    use(monkeypatch, "xet")
    with hub(tmp_path, "xet") as server:
        server.write("org/a", {"model.safetensors": DATA})
        file = folder(server).file("model.safetensors")
        server.faults.add(origin="api", path="xet-read-token", status=403)
        error = refused(ReadFailed, f"failed {TRIES} times", part, file, 0, 100)
        assert "xet_" not in str(error)
        assert error.where == file.address


def test_where_xet_is_switched_off_its_files_come_by_ranges(tmp_path, monkeypatch):
    use(monkeypatch, "lfs")
    with hub(tmp_path, "xet") as server:
        server.write("org/a", {"model.safetensors": DATA})
        assert part(folder(server).file("model.safetensors"), 5, 500_000) == DATA[5:500_000]
        assert server.log("cas") == []


# ---- downloads ----------------------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch) -> list[Path]:
    """The files whose content was looked at."""
    seen: list[Path] = []
    for name in ("_sha256", "_git_sha1"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path, original=original: (seen.append(path), original(path))[1])
    return seen


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_download_is_made_and_checked_once(server, mode, hashed, name):
    first = folder(server).file(name).download()
    server.clear_log()
    again = folder(server).file(name).download()
    assert first.read_bytes() == again.read_bytes() == (DATA if name == "model.safetensors" else CONFIG)
    assert hashed == [first]
    assert server.log("cdn") == []


def test_a_byte_that_changed_on_its_way_is_found(server, mode):
    server.faults.add(origin="cdn", flip=10_000)
    refused(ReadFailed, "is not the file that the Hub has", folder(server).file("model.safetensors").download)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_cache_is_found_and_the_remedy_works(server, mode, name):
    path = folder(server).file(name).download()
    blob = path.resolve()
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.write(b"#")
    os.utime(blob, ns=(0, 0))
    error = refused(ReadFailed, "is not the file that the Hub has", folder(server).file(name).download)
    assert "remove that file" in error.remedy
    Path(error.where).unlink()
    assert folder(server).file(name).download().read_bytes() == (DATA if name == "model.safetensors" else CONFIG)


def test_a_cache_that_may_only_be_read_serves_what_it_holds(lfs, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".merger-checked").write_text("no folder can be made here")
    for _ in range(2):
        assert folder(lfs).file("config.json").download().read_bytes() == CONFIG


def test_no_token_of_its_own_is_sent_with_a_job_that_has_none(lfs, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", lfs.token)
    opened = folder(lfs, token=None)
    opened.path("config.json")
    part(opened.file("model.safetensors"), 0, 5)
    assert {entry.token for entry in lfs.log()} == {None}
    assert own_access().token == Token(lfs.token)


# ---- other processes ----------------------------------------------------------------------------------


def test_a_file_travels_with_the_address_that_is_known(lfs):
    file = folder(lfs).file("model.safetensors")
    part(file, 0, 1)
    text = pickle.dumps(file)
    ranges.ADDRESSES = ranges.Addresses()  # another process
    lfs.clear_log()
    arrived = pickle.loads(text)
    assert arrived == file
    assert part(arrived, 5, 500) == DATA[5:500]
    assert lfs.log("api") == []
    lfs.expire_urls()
    assert part(arrived, 5, 500) == DATA[5:500]
    assert part(pickle.loads(text), 5, 500) == DATA[5:500]
    assert len(lfs.log("api", "HEAD")) == 1
    assert pickle.loads(pickle.dumps(pickle.loads(text))).resolved != file.resolved


def test_a_file_that_was_not_read_yet_travels_too(server, mode):
    arrived = pickle.loads(pickle.dumps(folder(server).file("model.safetensors")))
    assert arrived.resolved is None
    assert part(arrived, 5, 500) == DATA[5:500]


def test_the_token_travels_as_a_token_and_is_never_shown(lfs):
    opened = folder(lfs)
    file = opened.file("model.safetensors")
    part(file, 0, 1)
    arrived = pickle.loads(pickle.dumps(file))
    assert arrived.access.token == Token(lfs.token)
    for shown in (file, arrived, opened.repository, opened.repository.access, opened, replace(file, path="x")):
        assert lfs.token not in f"{shown!r} {shown}"
    assert "sig=" not in f"{file!r} {arrived!r} {arrived}"


def test_no_token_is_logged(lfs, caplog):
    caplog.set_level(logging.DEBUG)
    opened = folder(lfs)
    opened.path("config.json")
    part(opened.file("model.safetensors"), 0, 1)
    refused(SourceError, "renamed", lambda: (lfs.rename("org/a", "org/z"), pinned(MAIN, access(lfs))))
    assert lfs.token not in caplog.text


def test_other_errors_pass_as_they_are():
    with pytest.raises(KeyError):
        asked(lambda: {}["x"], "there")


def test_a_failure_without_an_answer_is_asked_again():
    from huggingface_hub.errors import HfHubHTTPError

    error = HfHubHTTPError("no answer", response=SimpleNamespace(headers={}, request=None, status_code=502))
    error.response = None
    failures = iter([error, error])

    def ask() -> str:
        for failure in failures:
            raise failure
        return "done"

    assert asked(ask, "there") == "done"

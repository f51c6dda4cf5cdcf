"""Xet storage with the real hf_xet: whole files, ranges, uploads by several processes, and what goes wrong."""

import json
import os
from pathlib import Path

import hf_xet
import httpx2
import numpy as np
import pytest

from tests.hub_server import xet_formats as formats
from tests.hub_server.fixtures import client, environment, hub

# Larger than a xorb's content would be worth in time; several chunks, and the last one is not full.
DATA = os.urandom(1_500_000)

STREAM = """
from hf_xet import XetFileInfo, XetSession
base, repo, path = api.endpoint, sys.argv[1], sys.argv[2]
sha = api.model_info(repo).sha
(entry,) = api.get_paths_info(repo, [path], revision=sha)
url = f"{base}/api/models/{repo}/xet-read-token/{sha}"
group = XetSession().new_download_stream_group(token_refresh_url=url, token_refresh_headers={})
info = XetFileInfo(entry.xet_hash, entry.size)
for start, end in json.loads(sys.argv[3]):
    data = b"".join(group.download_stream(info, start, end))
    assert data == Path(sys.argv[4]).read_bytes()[start:end], (start, end, len(data))
print("same")
"""


@pytest.fixture
def server(tmp_path):
    with hub(tmp_path, "xet") as one:
        yield one


@pytest.fixture
def variables(server, tmp_path):
    return environment(server, tmp_path, "xet", HF_XET_CLIENT_RETRY_BASE_DELAY="50ms")


@pytest.fixture
def model(tmp_path, server) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(DATA)
    (folder / "config.json").write_text("{}")
    server.add_model("org/a", folder)
    return folder


def stream(variables: dict[str, str], path: Path, *ranges: tuple[int, int]) -> None:
    assert client(variables, STREAM, "org/a", path.name, json.dumps(ranges), str(path)) == "same\n"


def test_a_model_that_lies_where_it_is(server, variables, model):
    folder = Path(client(variables, "print(snapshot_download('org/a'))").strip())
    assert (folder / "model.safetensors").read_bytes() == DATA
    assert server.log("cdn", "GET", "^/blobs/") == []
    assert server.log("cdn", "GET", "^/xorbs/")
    assert list((model.parent / "hub" / "xorbs").iterdir()) == []
    assert server.violations() == []


def test_the_bridge_for_clients_without_xet(server, model, tmp_path):
    program = "print(hf_hub_download('org/a', 'model.safetensors'))"
    path = client(environment(server, tmp_path, "lfs"), program).strip()
    assert Path(path).read_bytes() == DATA
    assert server.log("cas") == []


def test_ranges_of_a_stream(server, variables, model):
    ranges = [(0, 10), (65_535, 65_537), (100_000, 900_000), (len(DATA) - 5, len(DATA)), (0, len(DATA))]
    stream(variables, model / "model.safetensors", *ranges)
    small = [entry for entry in server.log("cdn", "GET", "^/xorbs/") if entry.sent < len(DATA) // 2]
    assert small, "a small range fetches few chunks"


def test_uploaded_by_two_processes_and_committed_by_a_third(server, variables, tmp_path):
    server.write("org/a", {"config.json": b"{}"})
    contents = {"one.safetensors": DATA, "two.safetensors": bytes(range(256)) * 4000 + DATA[:300_000]}
    program = """
operation = CommitOperationAdd(sys.argv[1], sys.argv[2])
api.preupload_lfs_files('org/a', [operation], free_memory=True)
Path(sys.argv[2] + '.pickle').write_bytes(pickle.dumps(operation))
"""
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        # A home of its own: as on another machine.
        client({**variables, "HF_HOME": str(tmp_path / f"home-{name}")}, program, name, str(tmp_path / name))
        (tmp_path / name).unlink()
    commit = """
operations = [pickle.loads(Path(name).read_bytes()) for name in sys.argv[1:]]
api.create_commit('org/a', operations, commit_message='both', parent_commit=api.model_info('org/a').sha)
"""
    client(variables, commit, *(str(tmp_path / f"{name}.pickle") for name in contents))
    for name, data in contents.items():
        assert server.content("org/a", name) == data
        (tmp_path / name).write_bytes(data)
        stream({**variables, "HF_HOME": str(tmp_path / "fresh")}, tmp_path / name, (0, len(data)), (70_000, 500_001))
    assert server.violations() == []


def test_compressed_weights(server, variables, tmp_path):
    """The client groups the bytes of numbers before it compresses them; the server undoes it to check the sha256."""
    server.write("org/a", {"config.json": b"{}"})
    weights = np.random.default_rng(0).normal(size=300_001).astype(np.float32)
    weights.tofile(tmp_path / "w.safetensors")
    (tmp_path / "t.safetensors").write_bytes(b"the same words again and again. " * 20_000)
    program = "api.upload_folder(folder_path=sys.argv[1], allow_patterns='*.safetensors', repo_id='org/a')"
    client(variables, program, str(tmp_path))
    assert server.content("org/a", "w.safetensors") == weights.tobytes()
    schemes = {chunk.scheme for xorb in server.site.xet.xorbs.values() for chunk in xorb.chunks}
    assert {1, 2} <= schemes


def test_an_upload_from_a_stream(server, variables, tmp_path):
    """The client's own way to upload what is being made: no file, the hash as it goes."""
    server.write("org/a", {"config.json": b"{}"})
    program = """
from hf_xet import COMPUTE_SHA256, XetSession
from huggingface_hub.lfs import UploadInfo
url = f"{api.endpoint}/api/models/org/a/xet-write-token/main"
headers = {"Authorization": "Bearer " + get_token()}
commit = XetSession().new_upload_commit(token_refresh_url=url, token_refresh_headers=headers)
upload = commit.start_upload_stream("made.safetensors", sha256=COMPUTE_SHA256)
for part in range(5):
    upload.write(bytes([part]) * 300_000)
info = upload.finish().xet_info
commit.wait_to_finish()
print(info.sha256, info.hash, info.file_size)
"""
    sha256, name, size = client(variables, program).split()
    assert int(size) == 1_500_000
    assert server.site.xet_hashes[sha256] == name
    assert b"".join(server.site.blobs[sha256].path.read_bytes()[part * 300_000 :][:1] for part in range(5)) == bytes(
        range(5)
    )


@pytest.mark.parametrize("fault", [{"status": 503}, {"cut": 100_000}, {"drop": True}, {"status": 403}])
def test_the_client_overcomes_faults_of_the_cdn(server, variables, model, fault):
    server.faults.add(origin="cdn", times=1, **fault)
    stream(variables, model / "model.safetensors", (0, len(DATA)))
    assert [bool(entry.fault) for entry in server.log("cdn")][:2] == [True, False]


def test_the_client_overcomes_faults_of_an_upload(server, variables, tmp_path):
    server.write("org/a", {"config.json": b"{}"})
    server.faults.add(origin="cas", method="POST", path="/v1/xorbs/", times=1, status=500)
    server.faults.add(origin="cas", method="POST", path="/v1/shards", times=1, status=500, after=True)
    (tmp_path / "a.safetensors").write_bytes(DATA)
    program = "api.upload_file(path_or_fileobj=sys.argv[1], path_in_repo='a.safetensors', repo_id='org/a')"
    client(variables, program, str(tmp_path / "a.safetensors"))
    assert server.content("org/a", "a.safetensors") == DATA
    assert len(server.log("cas", "POST", "/v1/shards")) == 2


def test_tokens_of_the_store(server, model):
    name = server.site.xet_hashes[server.files("org/a")["model.safetensors"]]
    with httpx2.Client() as http:
        read = http.get(f"{server.endpoint}/api/models/org/a/xet-read-token/main").json()
        url, token = f"{read['casUrl']}/v1/reconstructions/{name}", {"Authorization": f"Bearer {read['accessToken']}"}
        assert http.get(url).status_code == 401
        whole = http.get(url, headers=token).json()
        assert sum(term["unpacked_length"] for term in whole["terms"]) == len(DATA)
        part = http.get(url, headers={**token, "Range": "bytes=70000-70009"}).json()
        assert part["offset_into_first_range"] == 70_000 - 65_536
        assert http.get(url, headers={**token, "Range": f"bytes={len(DATA)}-"}).status_code == 416
        assert http.post(f"{read['casUrl']}/v1/shards", headers=token).status_code == 403
        assert http.get(f"{server.endpoint}/api/models/org/a/xet-write-token/main").status_code == 401


def test_a_xorb_of_another_content_is_refused(server):
    with httpx2.Client() as http:
        headers = {"Authorization": f"Bearer {server.token}"}
        told = http.get(f"{server.endpoint}/api/models/org/none/xet-write-token/main", headers=headers)
        assert told.headers["x-error-code"] == "RepoNotFound"
        server.write("org/a", {"config.json": b"{}"})
        write = http.get(f"{server.endpoint}/api/models/org/a/xet-write-token/main", headers=headers).json()
        data, token = formats.chunk_header(5) + b"hello", {"Authorization": f"Bearer {write['accessToken']}"}
        name = formats.text(formats.xorb_hash([(formats.chunk_hash(b"hello"), 5)]))
        url = f"{write['casUrl']}/v1/xorbs/default"
        assert http.post(f"{url}/{'0' * 64}", content=data, headers=token).status_code == 400
        assert http.post(f"{url}/{name}", content=data, headers=token).json() == {"was_inserted": True}
        assert http.post(f"{url}/{name}", content=data, headers=token).json() == {"was_inserted": False}


def test_hashes_are_the_clients(tmp_path):
    """For a file of one chunk our name is the one that hf_xet computes."""
    path = tmp_path / "small"
    path.write_bytes(b"some bytes" * 100)
    (found,) = hf_xet.hash_files([str(path)])
    content = path.read_bytes()
    assert found.hash == formats.text(formats.file_hash([(formats.chunk_hash(content), len(content))]))
    assert formats.text(formats.digest_of(found.hash)) == found.hash

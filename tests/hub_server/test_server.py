"""What the server does apart from what `conformance` asks of any Hub: rights, addresses that expire, lies, the log."""

import hashlib
import os
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest

from tests.hub_server.fixtures import client, environment, hub

DATA = os.urandom(200_000)


@pytest.fixture
def server(tmp_path):
    with hub(tmp_path) as one:
        one.write("org/a", {"model.safetensors": DATA, "config.json": b"{}", "sub/x.txt": b"x"})
        one.add_token("hf_other", "other")
        one.add_token("hf_reading", "me", role="read")
        yield one


@pytest.fixture
def http(server):
    with httpx2.Client(base_url=server.endpoint) as session:
        yield session


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def location(http: httpx2.Client, headers: dict[str, str] | None = None) -> str:
    return http.head("/org/a/resolve/main/model.safetensors", headers=headers).headers["location"]


def test_a_folder_is_published_without_copies(tmp_path, server, http):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "model.safetensors").write_bytes(DATA[:1000])
    (folder / "README.md").write_text("---\ntags: [merge]\n---\n")
    (folder / "link.txt").symlink_to("../../etc/passwd-that-is-not-there")
    server.add_model("org/b", folder)
    assert server.files("org/b")["sub/model.safetensors"] == hashlib.sha256(DATA[:1000]).hexdigest()
    assert server.content("org/b", "sub/model.safetensors") == DATA[:1000]
    assert not (tmp_path / "hub" / "blobs" / server.files("org/b")["sub/model.safetensors"]).exists()
    assert http.get("/org/b/resolve/main/link.txt").text == "../../etc/passwd-that-is-not-there"
    assert http.get("/api/models/org/b").json()["tags"] == ["merge"]


def test_a_known_hash_is_believed(tmp_path, server):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "big.safetensors").write_bytes(b"x")
    server.add_model("org/b", tmp_path / "m", hashes={"big.safetensors": "a" * 64})
    assert server.files("org/b")["big.safetensors"] == "a" * 64


def test_tokens_and_rights(server, http):
    assert http.get("/api/whoami-v2", headers=bearer(server.token)).json()["name"] == server.user
    unknown = http.get("/api/models/org/a", headers=bearer("hf_nobody"))
    assert (unknown.status_code, unknown.headers["x-error-message"]) == (
        401,
        "Invalid credentials in Authorization header",
    )
    for token, status in ((None, 401), ("hf_other", 403), ("hf_reading", 403), (server.token, 200)):
        headers = bearer(token) if token else {}
        assert http.post("/api/models/org/a/branch/x", json={}, headers=headers).status_code == status
    assert [entry.token for entry in server.log(path="/branch/")] == [None, "hf_other", "hf_reading", server.token]


def test_private_and_gated(server, http):
    server.write("me/p", {"config.json": b"{}"})
    server.protect("me/p", private=True)
    for headers in ({}, bearer("hf_other")):
        refused = http.get("/api/models/me/p", headers=headers)
        assert (refused.status_code, refused.headers["x-error-code"]) == (404, "RepoNotFound")
    server.protect("org/a", gated=True)
    assert http.get("/api/models/org/a", headers=bearer("hf_other")).json()["gated"] == "auto"
    refused = http.head("/org/a/resolve/main/config.json", headers=bearer("hf_other"))
    assert (refused.status_code, refused.headers["x-error-code"]) == (403, "GatedRepo")
    server.allow("org/a", "other")
    assert http.head("/org/a/resolve/main/config.json", headers=bearer("hf_other")).status_code == 200


def test_a_renamed_repository(server, http):
    server.rename("org/a", "org/b")
    answer = http.get("/api/models/org/a/tree/main?recursive=true")
    assert (answer.status_code, answer.headers["location"]) == (307, "/api/models/org/b/tree/main?recursive=true")
    assert http.get("/api/models/org/a", follow_redirects=True).json()["id"] == "org/b"


def test_addresses_expire(server, http):
    good = location(http)
    assert http.get(good).content == DATA
    server.expire_urls()
    assert http.get(good).status_code == 403
    server.url_lifetime(0.02)
    soon = location(http)
    deadline = time.monotonic() + 5
    while http.get(soon).status_code == 200:
        assert time.monotonic() < deadline
    assert http.get(location(http) + "0").status_code == 403


def test_a_token_at_the_cdn_is_a_violation(server, http):
    assert http.get(location(http), headers=bearer(server.token)).status_code == 400
    (violation,) = server.violations()
    assert "a token was sent to the CDN" in violation


def test_ranges(server, http):
    url = location(http)
    for asked, expected in (("0-0", DATA[:1]), ("199990-", DATA[199990:]), ("5-999999", DATA[5:]), ("-3", DATA[-3:])):
        answer = http.get(url, headers={"Range": f"bytes={asked}"})
        assert (answer.status_code, answer.content) == (206, expected)
    assert http.get(url, headers={"Range": "bytes=200000-"}).status_code == 416
    assert http.get("/org/a/resolve/main/config.json", headers={"Range": "bytes=1-1"}).content == b"}"
    assert [entry.sent for entry in server.log("cdn")] == [1, 10, 199995, 3, 0]


def test_a_tree_in_pages(server, http):
    server.page_size(2)
    paths, url = [], "/api/models/org/a/tree/main?recursive=true"
    while url:
        answer = http.get(url)
        paths += [one["path"] for one in answer.json()]
        url = answer.links["next"]["url"] if "next" in answer.links else ""
    assert paths == [".gitattributes", "config.json", "model.safetensors", "sub", "sub/x.txt"]
    assert len(server.log(path="/tree/")) == 3


def test_hostile_repositories(server, http):
    server.write("org/a", {"../evil.txt": b"e", "name\n.txt": b"n"})
    server.add_link("org/a", "link", "/etc/passwd")
    server.lie_about_size("org/a", "model.safetensors", 5)
    server.redirect_elsewhere("org/a", "config.json", "http://169.254.169.254/latest")
    tree = {one["path"]: one for one in http.get("/api/models/org/a/tree/main").json()}
    assert {"..", "name\n.txt", "link"} <= set(tree)
    assert (tree["model.safetensors"]["size"], tree["model.safetensors"]["lfs"]["size"]) == (5, 5)
    assert http.head("/org/a/resolve/main/model.safetensors").headers["x-linked-size"] == "5"
    answer = http.get("/org/a/resolve/main/config.json")
    assert (answer.status_code, answer.headers["location"]) == (302, "http://169.254.169.254/latest")


def test_oids_are_those_of_git(server, http):
    """Known names: of the empty blob, and of a tree that holds only it as `empty.txt`."""
    server.write("org/c", {"empty.txt": b"", "sub/empty.txt": b""})
    tree = {one["path"]: one["oid"] for one in http.get("/api/models/org/c/tree/main?recursive=1").json()}
    assert tree["empty.txt"] == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    entry = b"100644 empty.txt\0" + bytes.fromhex(tree["empty.txt"])
    assert tree["sub"] == hashlib.sha1(b"tree %d\0" % len(entry) + entry).hexdigest()


def test_what_nobody_committed_is_collected(tmp_path, server):
    variables = environment(server, tmp_path)
    upload = "api.preupload_lfs_files('org/a', [o := CommitOperationAdd('new.bin', b'new' * 9)], free_memory=True)\n"
    commit = "api.create_commit('org/a', [o], commit_message='new')\n"
    pickled = str(tmp_path / "operation")
    client(variables, upload + "Path(sys.argv[1]).write_bytes(pickle.dumps(o))", pickled)
    server.forget_uncommitted()
    with pytest.raises(AssertionError, match="was never uploaded"):
        client(variables, "o = pickle.loads(Path(sys.argv[1]).read_bytes())\n" + commit, pickled)
    client(variables, upload + commit)
    assert server.content("org/a", "new.bin") == b"new" * 9


def test_a_client_that_leaves(server, http):
    """Half of an upload is in the log and nowhere else."""
    headers = {"Authorization": f"Bearer {server.token}"}
    told = {"operation": "upload", "objects": [{"oid": "a" * 64, "size": 1000}]}
    batch = http.post("/org/a.git/info/lfs/objects/batch", json=told, headers=headers).json()
    address = urlsplit(batch["objects"][0]["actions"]["upload"]["href"])
    with socket.create_connection(("127.0.0.1", address.port)) as connection:
        head = f"PUT {address.path}?{address.query} HTTP/1.1\r\nHost: cdn\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head.encode() + b"x" * 500)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    (entry,) = server.log("cdn", "PUT")
    assert (entry.status, entry.received) == (0, 500)
    assert not list(server.folder.rglob("*.part"))


def test_parts(tmp_path, server):
    """An upload in parts through the real client."""
    server.part_size(64 << 10)
    (tmp_path / "big.bin").write_bytes(DATA[::-1])
    program = "api.upload_file(path_or_fileobj=sys.argv[1], path_in_repo='big.bin', repo_id='org/a')"
    client(environment(server, tmp_path), program, str(tmp_path / "big.bin"))
    assert server.content("org/a", "big.bin") == DATA[::-1]
    assert len(server.log("cdn", "PUT")) == 4
    assert server.violations() == []


def test_the_same_server_in_another_process(tmp_path):
    with hub(tmp_path, process=True) as server:
        server.write("org/a", {"model.safetensors": DATA, "config.json": b"{}"})
        server.faults.add(path="/tree/", times=1, status=503)
        folder = client(environment(server, tmp_path), "print(snapshot_download('org/a'))").strip()
        assert (Path(folder) / "model.safetensors").read_bytes() == DATA
        assert server.content("org/a", "model.safetensors") == DATA
        assert [entry.status for entry in server.log("api", "GET", "/tree/")] == [503, 200]
        assert server.violations() == []
        server.clear_log()
        server.faults.clear()
        assert server.log() == []
        assert server.commits("org/a")[0]["author"] == "org"
    assert server.process.returncode == 0

"""Commits on a Hub: one or none, whatever the server answers. With the real client, by LFS, in this process."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from merger.cli.terminal import Silent
from merger.destination import Destination, Landed, uploaded
from merger.errors import OutputOccupied, RecipeError, SourceError, WriteFailed
from merger.hub_destination import HubDestination, hub_destination
from merger.plan import Plan
from merger.recipe import make_document
from merger.run import Options, run
from merger.secret import Token
from merger.storage import patience
from merger.storage.hub import Access, library
from tests.checkpoints import write_model
from tests.hub_server.fixtures import hub
from tests.hub_server.server import HubServer

# The library's uploads by LFS.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
SHARDS = 3
WEIGHTS = [f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors" for i in range(SHARDS)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Plan]:
    """A finished result in a folder, and its plan."""
    folder = tmp_path_factory.mktemp("made")
    for i in (1, 2):
        tensors = {f"model.layers.{n}.weight": np.full(1000, i + n, np.float32) for n in range(SHARDS)}
        write_model(folder / f"step-{i}", tensors, {"model_type": "llama"}, side_files={"tokenizer.json": "{}"})
    output = {"path": str(folder / "out"), "shard_size": 4000}
    recipe = {"method": "average", "checkpoints": str(folder / "step-*"), "output": output}
    return folder / "out", run(make_document(recipe), Options(), Silent()).plan


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of it as it is before it is published: with the traces of the work."""
    copy = shutil.copytree(made[0], tmp_path / "out")
    (copy / ".merger").mkdir()
    return copy


@pytest.fixture
def plan(made) -> Plan:
    return made[1]


@pytest.fixture(autouse=True)
def hurried(monkeypatch, tmp_path) -> None:
    """Nobody waits, uploads go by LFS, caches are the test's own."""
    constants = library().constants
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(patience, "_LONGEST", 0.01)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture
def server(tmp_path) -> Iterator[HubServer]:
    with hub(tmp_path) as one:
        yield one


def destination(server: HubServer, token: str | None = HubServer.token, name: str = "me/x", **more) -> HubDestination:
    return HubDestination(name, Access(server.endpoint, Token(token) if token else None), **more)


def land(place: Destination, folder: Path) -> dict[str, Landed]:
    return {name: uploaded(folder, name, place) for name in WEIGHTS}


def push(place: Destination, folder: Path, plan: Plan) -> str:
    """All that a run does with a destination."""
    address = place.check(plan)
    if address:
        return address
    place.prepare()
    return place.publish(folder, plan, land(place, folder))


def titles(server: HubServer, revision: str = "main") -> list[str]:
    return [commit["title"].partition(" (")[0] for commit in server.commits("me/x", revision)]


ONE = ["Add average by merger", "initial commit"]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


# ---- one commit ---------------------------------------------------------------------------------------


def test_a_folder_becomes_one_commit_of_a_new_private_repository(server, folder, plan):
    address = push(destination(server), folder, plan)
    assert titles(server) == ONE
    assert address == f"{server.endpoint}/me/x/commit/{server.refs('me/x')['main']}"
    assert plan.fingerprint in server.commits("me/x")[0]["message"]
    assert server.files("me/x").keys() == {".gitattributes", *names(folder)}
    assert all(server.content("me/x", name) == (folder / name).read_bytes() for name in names(folder))
    assert server.site.store.find("me/x").private


def test_what_is_published_is_not_sent_again(server, folder, plan):
    first = push(destination(server), folder, plan)
    server.clear_log()
    assert push(destination(server), folder, plan) == first
    assert {entry.method for entry in server.log()} <= {"GET", "HEAD"}


def test_uploads_that_landed_are_not_sent_again(server, folder, plan):
    place = destination(server)
    place.prepare()
    landed = land(place, folder)
    server.clear_log()
    assert land(place, folder) == landed
    assert not server.log()


def test_what_a_killed_run_has_half_written_is_not_published(server, folder, plan):
    (folder / ".config.json.tmp").write_text("{")
    push(destination(server), folder, plan)
    assert ".config.json.tmp" not in server.files("me/x")


@pytest.mark.parametrize(
    ("method", "path", "fault"),
    [
        ("GET", "whoami", {"status": 429}),
        ("POST", "repos/create", {"status": 500, "after": True}),
        ("POST", "repos/create", {"drop": True, "after": True}),
        ("POST", "preupload", {"status": 503}),
        ("POST", "objects/batch", {"status": 500}),
        ("PUT", "uploads", {"drop": True}),
        ("PUT", "uploads", {"status": 500}),
        ("PUT", "uploads", {"status": 500, "after": True}),
        ("PUT", "uploads", {"status": 403}),  # a signed address that has expired
        ("POST", "objects/verify", {"status": 500}),
        ("POST", "objects/verify", {"status": 500, "after": True}),
        ("POST", "validate-yaml", {"status": 503}),
        ("POST", "validate-yaml", {"status": 502, "message": 'the balancer says "no"'}),  # no JSON
        ("POST", "commit", {"status": 500}),
        ("POST", "commit", {"status": 429}),
        ("POST", "commit", {"status": 500, "after": True}),
        ("POST", "commit", {"drop": True, "after": True}),
        ("POST", "commit", {"cut": 10}),
        ("POST", "commit", {"status": 412}),
        ("GET", "models/me/x/tree", {"status": 503}),
        ("GET", "models/me/x/revision", {"cut": 20}),
    ],
)
def test_faults_that_pass_leave_one_commit(server, folder, plan, method, path, fault):
    server.faults.add(method=method, path=path, times=2, **fault)
    address = push(destination(server), folder, plan)
    assert titles(server) == ONE
    assert address.endswith(server.refs("me/x")["main"])
    assert all(server.content("me/x", name) == (folder / name).read_bytes() for name in names(folder))


def test_faults_of_an_upload_in_parts_leave_one_commit(server, folder, plan):
    server.part_size(3000)
    server.faults.add(method="PUT", path="/uploads/[0-9a-f]+/2", nth=[1, 3], status=500)
    server.faults.add(method="PUT", path="/uploads/", times=1, drop=True)
    server.faults.add(method="POST", path="objects/complete", times=1, status=500, after=True)
    push(destination(server), folder, plan)
    assert titles(server) == ONE
    assert all(server.content("me/x", name) == (folder / name).read_bytes() for name in WEIGHTS)


@pytest.mark.parametrize(("path", "cause"), [("commit", "503"), ("uploads", "503"), ("preupload", "503")])
def test_faults_that_stay_end_with_a_clear_error_and_no_commit(server, folder, plan, path, cause):
    server.faults.add(method="PUT" if path == "uploads" else "POST", path=path, status=503)
    with pytest.raises(WriteFailed, match=cause) as failure:
        push(destination(server), folder, plan)
    assert "hf://me/x" in str(failure.value)
    assert "run the same command again" in str(failure.value).lower()
    assert titles(server) == ["initial commit"]
    server.faults.clear()
    push(destination(server), folder, plan)
    assert titles(server) == ONE


def test_a_card_that_the_hub_refuses_is_an_error_with_its_words(server, folder, plan):
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(WriteFailed, match=r"Invalid metadata in README\.md"):
        push(destination(server), folder, plan)
    assert titles(server) == ["initial commit"]


def test_uploads_that_the_hub_has_forgotten_since_are_sent_again(server, folder, plan):
    place = destination(server)
    place.prepare()
    landed = land(place, folder)
    server.forget_uncommitted()
    place.publish(folder, plan, landed)
    assert titles(server) == ONE
    assert all(server.content("me/x", name) == (folder / name).read_bytes() for name in WEIGHTS)


# ---- what is there ------------------------------------------------------------------------------------


def test_a_repository_with_a_card_and_a_licence_only_has_room(server, folder, plan):
    server.write("me/x", {"README.md": b"soon", "LICENSE": b"x", "NOTICE.txt": b"x"})
    push(destination(server), folder, plan)
    assert server.content("me/x", "README.md") == (folder / "README.md").read_bytes()


def test_anything_else_is_refused_with_who_committed_what(server, plan):
    server.write("me/x", {"notes.txt": b"mine"}, message="Add my notes")
    with pytest.raises(OutputOccupied) as refusal:
        destination(server).check(plan)
    for words in ("hf://me/x", "notes.txt", "last commit by me at 20", "Add my notes", "output.branch", "create_pr"):
        assert words in str(refusal.value)


def test_a_result_of_another_plan_is_refused(server, folder, plan):
    push(destination(server), folder, plan)
    with pytest.raises(OutputOccupied, match="Add average by merger"):
        destination(server).check(Plan(plan.recipe, plan.checkpoint, plan.shards, "another"))


def test_whoever_commits_first_wins(server, folder, plan):
    place = destination(server)
    place.prepare()
    landed = land(place, folder)
    server.write("me/x", {"model.safetensors": b"theirs"}, message="First")
    with pytest.raises(OutputOccupied, match="First"):
        place.publish(folder, plan, landed)
    assert server.content("me/x", "model.safetensors") == b"theirs"
    assert titles(server) == ["First", "initial commit"]


def test_a_harmless_commit_in_between_is_built_upon(server, folder, plan):
    place = destination(server)
    place.prepare()
    landed = land(place, folder)
    server.write("me/x", {"README.md": b"soon"}, message="Announce")
    place.publish(folder, plan, landed)
    assert titles(server) == ["Add average by merger", "Announce", "initial commit"]


def test_offline_nothing_is_tried(server, plan, monkeypatch):
    monkeypatch.setattr(library().constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE"):
        destination(server).check(plan)
    assert not server.log()


def test_a_repository_that_was_renamed_is_refused(server, plan):
    server.write("me/x", {"README.md": b"soon"})
    server.rename("me/x", "me/y")
    with pytest.raises(SourceError, match="was renamed to me/y"):
        destination(server).check(plan)


# ---- branches and pull requests -----------------------------------------------------------------------


@pytest.fixture
def model_there(server) -> None:
    """A model of two shards stands in the repository."""
    weights = {f"model-0000{i}-of-00002.safetensors": b"old" for i in (1, 2)}
    others = {"config.json": b"{}", "model.safetensors.index.json": b"{}", "pytorch_model.bin": b"old"}
    server.write("me/x", {**weights, **others, "vocab.txt": b"a"}, message="Old")


def test_a_new_branch_replaces_the_weights_of_main(server, model_there, folder, plan):
    push(destination(server, branch="v2"), folder, plan)
    assert titles(server) == ["Old", "initial commit"]
    assert titles(server, "v2") == ["Add average by merger", "Old", "initial commit"]
    assert server.files("me/x", "v2").keys() == {".gitattributes", "vocab.txt", *names(folder)}
    commit = destination(server, branch="v2").check(plan)
    assert commit == f"{server.endpoint}/me/x/commit/{server.refs('me/x')['v2']}"


def test_a_branch_with_something_of_its_own_is_refused(server, model_there, folder, plan):
    server.write("me/x", {"notes.txt": b"mine"}, revision="v2", message="Mine")
    with pytest.raises(OutputOccupied, match="Mine"):
        destination(server, branch="v2").check(plan)


def test_a_pull_request_replaces_the_weights_and_leaves_main_alone(server, model_there, folder, plan):
    address = push(destination(server, create_pr=True), folder, plan)
    assert address == f"{server.endpoint}/me/x/discussions/1"
    assert titles(server) == ["Old", "initial commit"]
    assert server.files("me/x", "refs/pr/1").keys() == {".gitattributes", "vocab.txt", *names(folder)}


@pytest.mark.parametrize("fault", [{}, {"status": 500, "after": True}, {"drop": True, "after": True}])
def test_a_pull_request_is_opened_once(server, model_there, folder, plan, fault):
    if fault:
        server.faults.add(method="POST", path="/commit/", times=1, **fault)
    first = push(destination(server, create_pr=True), folder, plan)
    assert push(destination(server, create_pr=True), folder, plan) == first
    assert [ref for ref in server.refs("me/x") if "pr" in ref] == ["refs/pr/1"]


def test_whoever_may_read_a_model_may_open_a_pull_request_to_it(server, model_there, folder, plan):
    server.add_token("hf_other", "somebody")
    push(destination(server, "hf_other", create_pr=True), folder, plan)
    assert server.commits("me/x", "refs/pr/1")[0]["author"] == "somebody"
    with pytest.raises(SourceError, match="outside of what"):
        destination(server, "hf_other", name="me/new", create_pr=True).check(plan)


@pytest.mark.parametrize("more", [{"branch": "v2"}, {"create_pr": True}])
def test_nothing_of_the_old_model_that_would_be_loaded_stays(server, folder, plan, more):
    stale = ["adapter_config.json", "adapter_model.safetensors", "model.onnx", "modeling.py", "model.gguf", "tf.h5"]
    server.write("me/x", {**dict.fromkeys(stale, b"old"), "config.json": b"{}", "vocab.txt": b"a"})
    push(destination(server, **more), folder, plan)
    revision = more.get("branch", "refs/pr/1")
    assert server.files("me/x", revision).keys() == {".gitattributes", "vocab.txt", *names(folder)}


def test_a_branch_and_its_revision_must_agree(server):
    access = Access(server.endpoint)
    options = {"create_pr": False, "private": True}
    assert hub_destination("hf://me/x@v2", access, branch=None, **options).name == "hf://me/x@v2"
    assert hub_destination("me/x", access, branch="v2", **options).branch == "v2"
    with pytest.raises(RecipeError, match="another branch"):
        hub_destination("hf://me/x@v2", access, branch="v3", **options)
    with pytest.raises(RecipeError, match="whole repository"):
        hub_destination("hf://me/x/folder", access, branch=None, **options)
    with pytest.raises(RecipeError, match="commit"):
        hub_destination(f"hf://me/x@{'0' * 40}", access, branch=None, **options)


# ---- who may ------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["new", "existing"])
def repository(request, server) -> HubServer:
    """A server where the repository is not there yet, or is there and has room."""
    server.add_token("hf_read", "me", role="read")
    server.add_token("hf_other", "somebody")
    if request.param:
        server.write("me/x", {"README.md": b"soon"})
    return server


@pytest.mark.parametrize(
    ("token", "says"),
    [
        (None, "needs a token"),
        ("hf_read", "may only read"),
        ("hf_other", "outside of what the token of somebody may write to"),
        ("hf_unknown", "Invalid credentials"),
    ],
)
def test_whoever_may_not_write_is_refused_at_once_with_a_remedy(repository, plan, token, says):
    with pytest.raises(SourceError, match=says) as refusal:
        destination(repository, token).check(plan)
    assert "token" in refusal.value.remedy
    assert not [entry for entry in repository.log() if entry.method in ("POST", "PUT") and entry.status < 400]


def test_an_organisation_of_the_account_may_be_written_to(server, plan):
    assert destination(server, name="org/x").check(plan) is None


def test_whoever_asks_for_what_is_published_needs_no_right_to_write(server, folder, plan):
    first = push(destination(server, private=False), folder, plan)
    assert destination(server, None).check(plan) == first


def test_an_existing_repository_says_who_sees_the_result(server):
    assert not destination(server).is_public()
    assert destination(server, private=False).is_public()
    server.write("me/x", {"README.md": b"soon"})
    assert destination(server).is_public()
    server.protect("me/x", private=True)
    assert not destination(server, private=False).is_public()


def test_a_public_result_is_public(server, folder, plan):
    push(destination(server, private=False), folder, plan)
    assert not server.site.store.find("me/x").private

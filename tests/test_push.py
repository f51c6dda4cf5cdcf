"""Results of models on a Hub, pushed to it: the whole flow in this process, by LFS."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import ModelCard, snapshot_download

from merger import publish
from merger.cli.terminal import Silent
from merger.errors import JobError, LicenseRefused, OutputOccupied, RecipeError, SourceError, UnsupportedModel
from merger.push import destination_of, is_destination, staging_of
from merger.recipe import Output, make_document
from merger.run import Options, Outcome, plan_of, run
from merger.secret import Token
from merger.sources import LocalSources
from merger.storage import patience
from merger.storage.hub import Access, library
from tests.checkpoints import write_model
from tests.hub_server.fixtures import hub
from tests.hub_server.server import HubServer

# The library's uploads by LFS.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
RECIPE = {"method": "average", "checkpoints": ["org/a", "org/b"]}
SHARD_SIZE = 400_000


@pytest.fixture(scope="module")
def parents(tmp_path_factory) -> Path:
    """Two models of three shards, each larger than what is read of a header."""
    folder = tmp_path_factory.mktemp("parents")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        tensors = {f"model.layers.{i}.weight": rng.standard_normal((100, 1000)).astype(np.float32) for i in range(4)}
        side_files = {"tokenizer.json": "{}", "README.md": "---\nlicense: mit\n---\n", "modeling.py": "1/0"}
        write_model(folder / name, tensors, {"model_type": "llama"}, shards=3, side_files=side_files)
    return folder


@pytest.fixture(autouse=True)
def own(monkeypatch, tmp_path) -> Path:
    """The folder of this user's caches; nobody waits, uploads go by LFS."""
    constants = library().constants
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(patience, "_LONGEST", 0.01)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    return tmp_path / "cache"


def own_token() -> Token | None:
    token = os.environ.get("HF_TOKEN")
    return Token(token) if token else None


@pytest.fixture
def server(tmp_path, parents, monkeypatch) -> Iterator[HubServer]:
    with hub(tmp_path) as one:
        for name in ("a", "b"):
            one.add_model(f"org/{name}", parents / name)
        monkeypatch.setattr("merger.sources.own_access", lambda: Access(one.endpoint, own_token()))
        yield one


def push(recipe: dict[str, object] = RECIPE, token: str | None = HubServer.token, **output: object) -> Outcome:
    whole = {**recipe, "output": {"shard_size": SHARD_SIZE, "push": "hf://me/x", **output}}
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("HF_TOKEN", raising=False)
        if token:
            environment.setenv("HF_TOKEN", token)
        return run(make_document(whole), Options(), Silent())


@pytest.fixture
def local(server, tmp_path) -> dict[str, bytes]:
    """The files of the same result in a folder."""
    push(push=None, path=str(tmp_path / "local"))
    server.clear_log()
    return {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}


def published(server: HubServer, revision: str = "main") -> dict[str, bytes]:
    files = server.files("me/x", revision)
    return {name: server.content("me/x", name, revision) for name in files if name != ".gitattributes"}


def same(found: dict[str, bytes], local: dict[str, bytes]) -> bool:
    """Whether these are the files of one result: the texts that name the recipe's output differ."""
    texts = ("README.md", "report.html", "merger.json")
    return found.keys() == local.keys() and all(found[name] == local[name] for name in local if name not in texts)


def staged(own: Path) -> list[str]:
    folder = own / "merger" / "staging"
    return [path.name for path in folder.iterdir()] if folder.exists() else []


def weights_were_read(server: HubServer) -> bool:
    """Whether more than the beginnings of the parents' files, where headers stand, were asked for."""
    return any(entry.range and not entry.range.startswith("bytes=0-") for entry in server.log("cdn", "GET"))


def sent(server: HubServer) -> list[str]:
    """What was sent that changes anything."""
    return [entry.path for entry in server.log() if entry.method in ("PUT", "POST") and entry.status < 400]


# ---- the result ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_folder", [False, True])
def test_the_repository_holds_what_a_local_run_writes_in_one_commit(server, local, own, tmp_path, with_folder):
    path = str(tmp_path / "out") if with_folder else None
    done = push(path=path)
    assert same(published(server), local)
    assert done.published == f"{server.endpoint}/me/x/commit/{server.refs('me/x')['main']}"
    assert [commit["title"].partition(" (")[0] for commit in server.commits("me/x")] == [
        "Add average by merger",
        "initial commit",
    ]
    assert server.site.store.find("me/x").private
    recipe = json.loads(published(server)["merger.json"])["recipe"]
    assert recipe.pop("output")["push"] == "hf://me/x"
    assert recipe == {k: v for k, v in json.loads(local["merger.json"])["recipe"].items() if k != "output"}
    assert staged(own) == []
    if path:
        assert done.output == Path(path)
        assert {name: (Path(path) / name).read_bytes() for name in published(server)} == published(server)
        assert not (Path(path) / ".merger").exists()
    assert not server.violations()


@pytest.mark.parametrize("with_folder", [False, True])
def test_a_second_run_sends_nothing_and_gives_the_same_address(server, own, tmp_path, with_folder):
    path = str(tmp_path / "out") if with_folder else None
    first = push(path=path)
    server.clear_log()
    second = push(path=path)
    assert (second.published, second.figures) == (first.published, None)
    assert sent(server) == []
    assert not weights_were_read(server)
    assert staged(own) == []


def test_a_result_that_was_made_before_is_pushed_later(server, local, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "local").iterdir()}
    done = push(path=str(tmp_path / "local"))
    assert published(server) == local
    assert done.figures is None
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "local").iterdir()} == before
    assert not weights_were_read(server)


def test_a_folder_is_made_of_what_was_pushed_before(server, local, tmp_path):
    first = push()
    server.clear_log()
    assert push(path=str(tmp_path / "out")).published == first.published
    assert sent(server) == []
    assert same({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}, local)


def test_a_failed_push_goes_on_with_what_has_landed(server, local, own):
    server.faults.add(method="POST", path="/commit/", status=503)
    with pytest.raises(JobError, match="503"):
        push()
    assert len(server.commits("me/x")) == 1
    assert len(staged(own)) == 1
    server.faults.clear()
    server.clear_log()
    push()
    assert same(published(server), local)
    assert not [entry for entry in server.log("cdn", "PUT") if entry.received > 100_000]
    assert not weights_were_read(server)
    assert staged(own) == []


def test_a_result_for_everybody(server):
    push(private=False)
    assert not server.site.store.find("me/x").private


@pytest.mark.parametrize("seed", range(6))
def test_with_a_tenth_of_all_requests_going_wrong_there_is_one_whole_commit_or_none(server, local, own, seed):
    own.joinpath("hub").rename(own / "other")  # what the local run has cached
    kinds = ("500", "503", "429", "cut", "drop", "slow", "after")
    server.faults.random(rate=0.1, seed=seed, origin="api", kinds=kinds)
    server.faults.random(rate=0.1, seed=seed, origin="cdn", kinds=(*kinds, "403"))
    try:
        done, words = push(), ""
    except JobError as error:
        done, words = None, error.message
    if done:
        assert same(published(server), local)
        assert len(server.commits("me/x")) == 2
        assert done.published == f"{server.endpoint}/me/x/commit/{server.refs('me/x')['main']}"
    else:
        assert re.search(r"failed \d+ times", words)
        assert "me/x" not in server.repos() or len(server.commits("me/x")) == 1
    assert [entry for entry in server.log() if entry.fault]
    assert not server.violations()


# ---- folders of unpublished results -------------------------------------------------------------------


def plan_and_staging(server: HubServer) -> tuple[object, Path]:
    document = make_document({**RECIPE, "output": {"shard_size": SHARD_SIZE, "push": "hf://me/x"}})
    sources = LocalSources(access=lambda: Access(server.endpoint, Token(HubServer.token)))
    plan, _ = plan_of(document, Options(), sources)
    place = destination_of(document.output, sources.hub)
    assert place
    return plan, staging_of(plan, place)


def test_two_runs_of_one_recipe_do_not_share_a_folder(server):
    plan, folder = plan_and_staging(server)
    with publish.taken(folder, plan), pytest.raises(OutputOccupied, match="is being written by another run"):
        push()
    assert server.commits("me/x")[0]["title"] == "initial commit"
    assert push().published


def test_what_a_run_left_that_was_killed_after_its_commit_is_taken_away(server, own):
    plan, folder = plan_and_staging(server)
    push()
    with publish.taken(folder, plan):
        (folder / "model.safetensors").touch()
        folder.with_name(f".{folder.name}.gone").mkdir()
        push()
        assert folder.exists()  # somebody is at it
    push()
    assert staged(own) == []


def test_a_folder_that_was_taken_away_while_it_was_taken_is_not_worked_in(server, own, monkeypatch):
    plan, folder = plan_and_staging(server)
    lock = publish.fcntl.flock

    def lock_late(*arguments: int) -> None:
        publish.remove(folder)
        lock(*arguments)

    monkeypatch.setattr(publish.fcntl, "flock", lock_late)
    with pytest.raises(OutputOccupied, match="another run"), publish.taken(folder, plan):
        pass
    assert staged(own) == []


# ---- what is refused ----------------------------------------------------------------------------------


def refused(server: HubServer, error: type[Exception], says: str, **arguments: object) -> str:
    """See that it is refused before weights are read and before anything is sent."""
    server.clear_log()
    with pytest.raises(error, match=says) as refusal:
        push(**arguments)
    assert not weights_were_read(server)
    assert sent(server) == []
    assert "me/x" not in server.repos() or len(server.commits("me/x")) == 2
    return str(refusal.value)


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    ("token", "says"),
    [(None, "needs a token"), ("hf_read", "may only read"), ("hf_other", "outside of what the token of somebody")],
)
def test_whoever_may_not_write_is_refused_before_any_weight_moves(server, own, exists, token, says):
    server.add_token("hf_read", "me", role="read")
    server.add_token("hf_other", "somebody")
    if exists:
        server.write("me/x", {"README.md": b"soon"})
    assert "--token" in refused(server, SourceError, says, token=token)
    assert staged(own) == []


def test_a_repository_with_something_else_is_refused_before_any_weight_moves(server):
    server.write("me/x", {"notes.txt": b"mine"}, message="Mine")
    refused(server, OutputOccupied, "holds something else: notes.txt; last commit by me at .*: Mine")


def licensed(server: HubServer, license: str) -> None:
    server.write("org/b", {"README.md": f"---\nlicense: {license}\n---\n".encode()})


def test_a_licence_that_forbids_it_is_refused_whatever_is_accepted(server):
    licensed(server, "cc-by-nd-4.0")
    for accepted in (False, True):
        refused(server, LicenseRefused, "org/b is under cc-by-nd-4.0, which forbids", accept_license=accepted)


def test_a_licence_that_asks_is_refused_until_it_is_accepted(server):
    licensed(server, "unknown")
    assert "--accept-license" in refused(server, LicenseRefused, "org/b declares no licence")
    assert push(accept_license=True).published


def test_a_gated_parent_asks_where_the_repository_is_public_whatever_the_recipe_says(server):
    server.protect("org/a", gated=True)
    server.write("me/x", {"README.md": b"soon"})
    refused(server, LicenseRefused, "org/a is gated")
    server.protect("me/x", private=True)
    assert push().published


@pytest.fixture
def with_code(server) -> None:
    config = {"model_type": "llama", "auto_map": {"AutoModel": "modeling.Model"}}
    server.write("org/a", {"config.json": json.dumps(config).encode()})


def test_a_model_with_code_of_its_own_is_refused(server, with_code):
    remedy = refused(server, UnsupportedModel, "org/a: brings code of its own")
    assert "output.drop_code: true" in remedy


def test_code_is_dropped_on_request_and_never_published(server, with_code):
    settings = {"model_max_length": 64, "auto_map": {"AutoTokenizer": ["tokens.Tokenizer", None]}, "x": "y" * (2 << 20)}
    server.write("org/a", {"tokenizer_config.json": json.dumps(settings).encode()})
    push(drop_code=True)
    found = published(server)
    assert json.loads(found["config.json"]) == {"model_type": "llama"}
    assert json.loads(found["tokenizer_config.json"]) == {k: v for k, v in settings.items() if k != "auto_map"}
    assert not [name for name in found if name.endswith(".py")]


def test_of_an_open_recipe_rights_and_licences_are_seen_before_anything_is_trained(server, monkeypatch):
    monkeypatch.setattr("merger.run.chosen", lambda *_: pytest.fail("began to train"))
    monkeypatch.setattr("merger.run.is_open", lambda _: True)
    monkeypatch.setattr("merger.run.check_installed", lambda _: None)
    server.add_token("hf_read", "me", role="read")
    refused(server, SourceError, "may only read", token="hf_read")
    licensed(server, "unknown")
    refused(server, LicenseRefused, "declares no licence")


def test_fields_of_a_push_need_one():
    access = lambda: Access("http://nowhere")  # noqa: E731
    assert destination_of(Output(path="out"), access) is None
    for output in (Output(branch="v2"), Output(create_pr=True)):
        with pytest.raises(RecipeError, match=r"output\.push: is missing"):
            destination_of(output, access)
    for text in ("hf://me", "ftp://bucket/x", "hf://me/x/../y"):
        assert is_destination(text)
        with pytest.raises(SourceError):
            destination_of(Output(push=text), access)
    for output in (Output(push="s3://bucket/x", branch="v2"), Output(push="s3://bucket/x", create_pr=True)):
        with pytest.raises(RecipeError, match="no branches"):
            destination_of(output, access)


# ---- what others make of it ---------------------------------------------------------------------------


def test_the_card_is_one_that_the_hub_reads(server):
    push()
    card = ModelCard(published(server)["README.md"].decode())
    assert card.data.base_model == ["org/a", "org/b"]
    assert card.data.to_dict()["base_model_relation"] == "merge"
    assert card.data.license == "mit"
    assert "merge" in card.data.tags


@pytest.mark.slow
def test_transformers_loads_what_was_pushed(server, llama_run, tmp_path):
    from transformers import AutoModelForCausalLM

    run_folder = llama_run("bfloat16")
    for step in (100, 200):
        server.add_model(f"org/llama-{step}", run_folder / f"step-{step}")
    push(
        {"method": "average", "checkpoints": ["org/llama-100", "org/llama-200"]}, shard_size=20_000, accept_license=True
    )
    folder = snapshot_download("me/x", endpoint=server.endpoint, token=server.token, local_dir=tmp_path / "snapshot")
    assert len(list(Path(folder).glob("*.safetensors"))) > 1
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.model_type == "llama"

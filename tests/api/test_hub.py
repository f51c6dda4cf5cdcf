"""Jobs whose models, or results, are on the Hub: what is taken, and what is refused before anything moves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.fernet import Fernet
from fastapi.testclient import TestClient
from pydantic import SecretStr

from api.app import create_app
from api.settings import Settings
from api.store.migrate import migrate
from api.store.sql import SqlStore
from merger.storage import ranges
from merger.storage.hub import library
from tests.api.ray import ScriptedRay
from tests.checkpoints import write_model
from tests.hub_server.fixtures import hub
from tests.hub_server.server import HubServer

KEY = "mk_test"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with models under several licences; this process's own token opens everything."""
    constants = library().constants
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ranges, "ADDRESSES", ranges.Addresses())
    with hub(tmp_path) as one:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, one.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", one.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_service")
        one.add_token("hf_service", "operator", orgs=("me", "org", "team"))
        one.add_token("hf_stranger", "stranger")
        for i, (name, terms) in enumerate({"free": "apache-2.0", "closed": "cc-by-nc-nd-4.0", "silent": None}.items()):
            card = f"---\nlicense: {terms}\n---\n" if terms else "A model.\n"
            tensors = {"model.layers.0.mlp.weight": np.full((8, 8), i, np.float32)}
            one.add_model(f"org/{name}", write_model(tmp_path / name, tensors, side_files={"README.md": card}))
        yield one


@pytest.fixture
def client(server: HubServer, tmp_path: Path) -> Iterator[TestClient]:
    """An API that keeps the tokens of two people: `mine` and `stranger`."""
    (tmp_path / "work").mkdir()
    roots = {"source_roots": (tmp_path,), "output_roots": (tmp_path / "work",), "working_folder": tmp_path / "work"}
    keys = (SecretStr(Fernet.generate_key().decode()),)
    settings = Settings(api_key=SecretStr(KEY), secret_keys=keys, **roots)
    store = SqlStore(f"sqlite:///{tmp_path / 'jobs.db'}")
    migrate(store.engine)
    cluster = ScriptedRay().client()
    app = create_app(settings, store, cluster, dispatching=False)
    with TestClient(app, headers={"Authorization": f"Bearer {KEY}"}) as one:
        for name, value in {"mine": HubServer.token, "stranger": "hf_stranger"}.items():
            one.put(f"/v1/secrets/{name}", json={"value": value})
        yield one
    cluster.__exit__(None, None, None)
    store.close()


def request(parents: str = "free", secret: str | None = "mine", **output: Any) -> dict[str, Any]:
    """A job that averages some of the models."""
    checkpoints = [f"hf://org/{name}" for name in parents.split()]
    recipe = {"method": "average", "checkpoints": checkpoints, "output": {"push": "hf://me/x", **output}}
    return {"recipe": recipe, "secrets": {"hub_token": secret} if secret else {}}


def submit(client: TestClient, *arguments: Any, **more: Any) -> Any:
    """The answer to such a job."""
    return client.post("/v1/jobs", json=request(*arguments, **more))


def refusal(answer: Any) -> tuple[str, str]:
    """The kind of a problem and what it says."""
    assert answer.status_code == 422, answer.text
    return answer.json()["type"].removeprefix("/problems/"), answer.json()["detail"]


def test_a_result_may_be_pushed_only(client: TestClient, server: HubServer, tmp_path: Path) -> None:
    answer = submit(client)
    assert answer.status_code == 201, answer.text
    assert answer.json()["output"] == "hf://me/x"
    assert answer.json()["recipe"]["output"]["push"] == "hf://me/x"
    assert "me/x" not in server.repos(), "nothing is made before the job runs"
    assert list((tmp_path / "work").iterdir()) == []
    assert client.get(f"/v1/jobs/{answer.json()['id']}").json() == answer.json()
    assert client.post("/v1/jobs:validate", json=request()).json()["output"] == "hf://me/x"


def test_a_result_may_be_kept_and_pushed(client: TestClient, tmp_path: Path) -> None:
    answer = submit(client, path="both")
    assert (answer.status_code, answer.json()["output"]) == (201, str(tmp_path / "work" / "both"))


def test_a_repository_that_holds_something_else_is_refused(client: TestClient, server: HubServer) -> None:
    server.write("me/x", {"config.json": b"{}"})
    kind, detail = refusal(submit(client))
    assert kind == "output-occupied"
    assert detail.startswith("hf://me/x: holds something else: config.json")
    assert submit(client, branch="new").status_code == 201
    assert submit(client, create_pr=True).status_code == 201


def test_a_folder_that_holds_something_else_is_refused_for_a_pushed_result_too(
    client: TestClient, tmp_path: Path
) -> None:
    (tmp_path / "work" / "both").mkdir()
    (tmp_path / "work" / "both" / "mine").touch()
    assert refusal(submit(client, path="both"))[0] == "output-occupied"


def test_licences_that_forbid_to_pass_the_result_on_are_refused(client: TestClient) -> None:
    kind, detail = refusal(submit(client, "free closed", accept_license=True))
    assert kind == "license-refused"
    assert "org/closed is under cc-by-nc-nd-4.0" in detail


def test_a_doubt_about_licences_is_refused_until_somebody_accepts_it(client: TestClient) -> None:
    answer = submit(client, "free silent")
    assert refusal(answer) == ("license-refused", "license: org/silent declares no licence")
    assert "accept_license" in answer.json()["remedy"]
    assert submit(client, "free silent", accept_license=True).status_code == 201
    assert submit(client, "free silent", push=None, path="kept").status_code == 201, "it is passed on to nobody"


@pytest.mark.parametrize("secret", [None, "stranger"])
def test_a_target_needs_a_token_that_may_write_there(client: TestClient, server: HubServer, secret: str | None) -> None:
    kind, detail = refusal(submit(client, secret=secret))
    assert kind == "source-error"
    assert detail.startswith("hf://me/x: ")
    assert {entry.token for entry in server.log("api")} == {"hf_stranger" if secret else None}


@pytest.mark.parametrize("secret", [None, "stranger"])
def test_private_models_need_a_token_that_may_read_them(
    client: TestClient, server: HubServer, secret: str | None
) -> None:
    server.protect("org/free", private=True)
    assert submit(client).status_code == 201
    server.clear_log()
    kind, detail = refusal(submit(client, secret=secret))
    assert (kind, detail.startswith("hf://org/free: is not on the Hub, or is private")) == ("source-error", True)
    assert {entry.token for entry in server.log("api")} == {"hf_stranger" if secret else None}


@pytest.mark.parametrize("secret", [None, "stranger"])
def test_a_gated_model_that_one_token_has_opened_is_closed_to_another(
    client: TestClient, server: HubServer, secret: str | None
) -> None:
    server.protect("org/free", gated=True)
    assert submit(client).status_code == 201
    kind, detail = refusal(submit(client, secret=secret))
    assert (kind, "gated" in detail) == ("source-error", True), detail


@pytest.mark.parametrize(
    "output", [{"push": "hf://me/x/folder"}, {"push": "hf://me"}, {"push": None, "path": "x", "branch": "b"}]
)
def test_a_bad_target_is_refused_with_its_field(client: TestClient, output: dict[str, Any]) -> None:
    answer = submit(client, **output)
    assert refusal(answer)[0] in ("recipe-error", "source-error")
    assert answer.json()["errors"][0]["pointer"] == "/recipe/output/push"

"""Named secrets through HTTP, and what becomes of a token: a value goes in, reaches one runner, and is nowhere else."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from cryptography.fernet import Fernet
from fastapi.testclient import TestClient
from pydantic import SecretStr

from api import machine
from api.app import create_app
from api.context import new_key
from api.dispatcher import Dispatcher, digest
from api.settings import Settings
from api.store.migrate import migrate
from api.store.sql import SqlStore
from merger.secret import Token
from tests.api.ray import ScriptedRay
from tests.service.processes import write_run
from workers import runner
from workers.reports import Api as RunnersApi

KEY = "mk_test"
TOKEN = "hf_AbC0123456789xyz"
STORED = {"hub_token": "team-hub"}


@dataclass
class World:
    """An API over SQLite, a scripted Ray, and the dispatcher between them."""

    folder: Path
    keys: tuple[SecretStr, ...] = field(default_factory=lambda: (SecretStr(Fernet.generate_key().decode()),))

    def __post_init__(self) -> None:
        roots = {"source_roots": (self.folder,), "output_roots": (self.folder,), "working_folder": self.folder}
        settings = Settings(
            api_key=SecretStr(KEY), secret_keys=self.keys, url="http://api.test", heartbeat_seconds=0.01, **roots
        )
        self.store = SqlStore(f"sqlite:///{self.folder / 'db' / 'jobs.db'}")
        migrate(self.store.engine)
        self.ray = ScriptedRay()
        self.cluster = self.ray.client()
        self.dispatcher = Dispatcher(self.store, self.cluster, settings)
        app = create_app(settings, self.store, self.cluster, dispatching=False)
        headers = {"Authorization": f"Bearer {KEY}"}
        self.client = TestClient(app, headers=headers, raise_server_exceptions=False)

    def put(self, name: str = "team-hub", value: object = TOKEN, **headers: str) -> Any:
        return self.client.put(f"/v1/secrets/{name}", json={"value": value}, headers=headers)

    def submit(self, secrets: object = STORED, headers: dict[str, str] | None = None, path: str = "/v1/jobs") -> Any:
        output = {"path": "out", "shard_size": "1MiB"}
        recipe = {"method": "average", "checkpoints": "run/step-*", "output": output}
        return self.client.post(path, json={"recipe": recipe, "secrets": secrets}, headers=headers)

    def started(self) -> str:
        """The id of a job that uses the secret and was handed to Ray."""
        job: str = self.submit().json()["id"]
        self.dispatcher.round()
        assert f"{job}-1" in self.ray.entrypoints
        return job

    def claim(self, job: str) -> Any:
        body = {"claim": self.ray.claim(f"{job}-1"), "nonce": "me"}
        return self.client.post(f"/v1/internal/jobs/{job}/attempts/1/claim", json=body)

    def api(self, job: str) -> RunnersApi:
        """The API as a runner of this job sees it: its requests go into the application."""

        def forward(request: httpx2.Request) -> httpx2.Response:
            headers = {key: request.headers.get(key, "") for key in ("Authorization", "Content-Type")}
            answer = self.client.request(request.method, request.url.path, content=request.content, headers=headers)
            return httpx2.Response(answer.status_code, content=answer.content)

        return RunnersApi("http://api.test", job, 1, httpx2.MockTransport(forward))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    yield from _running(World(_folder(tmp_path, monkeypatch)))


@pytest.fixture
def keyless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    yield from _running(World(_folder(tmp_path, monkeypatch), ()))


def _folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    write_run(folder / "run", shards=2, megabytes=1)
    (folder / "db").mkdir()
    return folder


def _running(world: World) -> Iterator[World]:
    with world.client:
        yield world
    world.cluster.__exit__(None, None, None)
    world.store.close()


# ---- the routes ---------------------------------------------------------------------------------------


def test_a_secret_is_stored_replaced_listed_and_removed_and_never_shown(world: World) -> None:
    first = world.put()
    assert (first.status_code, first.content) == (201, b"")
    [listed] = world.client.get("/v1/secrets").json()["secrets"]
    assert (listed["name"], set(listed)) == ("team-hub", {"name", "created_at", "updated_at"})
    again = world.put(value="another")
    assert (again.status_code, again.content) == (204, b"")
    [changed] = world.client.get("/v1/secrets").json()["secrets"]
    assert changed["created_at"] == listed["created_at"]
    assert changed["updated_at"] > listed["updated_at"]
    assert world.client.delete("/v1/secrets/team-hub").status_code == 204
    gone = world.client.delete("/v1/secrets/team-hub")
    assert (gone.status_code, gone.json()["detail"]) == (404, "there is no secret team-hub")
    assert world.client.get("/v1/secrets").json() == {"secrets": []}


@pytest.mark.parametrize("name", ["Team", "-x", "a_b", "x" * 64, "ü", "a%0a", "a%2Fb"])
def test_a_bad_name_is_refused(world: World, name: str) -> None:
    answer = world.put(name)
    assert answer.status_code in (404, 422)
    assert answer.headers["content-type"] == "application/problem+json"
    assert world.client.get("/v1/secrets").json() == {"secrets": []}


@pytest.mark.parametrize(
    "body",
    [
        {"value": f"{TOKEN}\n"},
        {"value": f"{TOKEN}\0"},
        {"value": f"{TOKEN}\x7f"},
        {"value": f"{TOKEN}\u2028"},
        {"value": TOKEN * 500},
        {"value": [TOKEN]},
        {"value": {TOKEN: TOKEN}},
        {"value": TOKEN, "more": TOKEN},
        {"valeu": TOKEN},
        TOKEN,
        [TOKEN],
    ],
)
def test_a_bad_value_is_refused_without_saying_it_again(world: World, body: object) -> None:
    answer = world.client.put("/v1/secrets/team-hub", json=body)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert "hf_" not in answer.text
    broken = world.client.put("/v1/secrets/team-hub", content=f'{{"value": "{TOKEN}', headers={})
    assert (broken.status_code, "hf_" in broken.text) == (422, False)
    assert world.put(value="").status_code == 422


def test_the_longest_value_is_kept(world: World) -> None:
    assert world.put(value="ü" * 4096).status_code == 201


def test_projects_and_strangers_see_nothing_of_each_other(world: World) -> None:
    world.put()
    key = new_key()
    world.store.add_key(digest(key), "other", 0.0)
    other = {"Authorization": f"Bearer {key}"}
    assert world.client.get("/v1/secrets", headers=other).json() == {"secrets": []}
    assert world.client.delete("/v1/secrets/team-hub", headers=other).status_code == 404
    assert world.submit(headers=other).status_code == 422
    for call in (world.client.get, world.client.delete):
        assert call("/v1/secrets/team-hub", headers={"Authorization": "Bearer x"}).status_code in (401, 405)
    assert world.put(Authorization="Bearer x").status_code == 401


def test_without_keys_everything_about_secrets_says_what_to_set(keyless: World) -> None:
    answers = [
        keyless.put(),
        keyless.client.get("/v1/secrets"),
        keyless.client.delete("/v1/secrets/team-hub"),
        keyless.submit(),
        keyless.submit(path="/v1/jobs:validate"),
    ]
    for answer in answers:
        assert (answer.status_code, answer.json()["type"]) == (409, "/problems/no-secret-keys")
        assert "MERGER_SECRET_KEYS" in answer.json()["remedy"]
        assert "Fernet.generate_key()" in answer.json()["remedy"]
    assert keyless.submit({}).status_code == 201, "jobs without secrets need no key"


# ---- jobs ---------------------------------------------------------------------------------------------


def test_a_job_shows_the_names_of_its_secrets(world: World) -> None:
    world.put()
    assert world.submit(path="/v1/jobs:validate").status_code == 200
    job = world.submit().json()
    assert job["secrets"] == STORED
    assert world.client.get(f"/v1/jobs/{job['id']}").json() == job
    assert world.submit({}).json()["secrets"] == {"hub_token": None}


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs:validate"])
def test_a_secret_that_is_not_there_is_refused_with_the_place(world: World, path: str) -> None:
    answer = world.submit(path=path)
    assert answer.status_code == 422
    problem = answer.json()
    assert problem["type"] == "/problems/no-secret"
    assert problem["errors"] == [{"pointer": "/secrets/hub_token", "detail": "the secret 'team-hub' is not there"}]
    assert problem["remedy"] == "Store it: merger secret set team-hub"
    assert world.client.get("/v1/jobs").json()["jobs"] == []


@pytest.mark.parametrize(
    ("secrets", "pointer"),
    [
        ({"hub": "x"}, "/secrets/hub"),
        ({"hub_token": "No Name"}, "/secrets/hub_token"),
        ({"hub_token": 1}, "/secrets/hub_token"),
        ("team-hub", "/secrets"),
    ],
)
def test_bad_references_are_refused(world: World, secrets: object, pointer: str) -> None:
    answer = world.submit(secrets)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, pointer)


def test_the_same_key_with_another_secret_is_another_request(world: World) -> None:
    for name in ("team-hub", "mine"):
        world.put(name)
    headers = {"Idempotency-Key": "k"}
    first = world.submit(headers=headers)
    assert world.submit(headers=headers).json() == first.json()
    other = world.submit({"hub_token": "mine"}, headers)
    assert (other.status_code, other.json()["type"]) == (422, "/problems/key-reused")


def test_the_same_request_gives_its_job_even_when_the_secret_is_gone(world: World) -> None:
    world.put()
    headers = {"Idempotency-Key": "k"}
    first = world.submit(headers=headers)
    world.client.delete("/v1/secrets/team-hub")
    assert world.submit(headers=headers).json() == first.json()


# ---- runners ------------------------------------------------------------------------------------------


def test_the_claim_gives_the_value_as_it_is_now(world: World) -> None:
    world.put()
    job = world.started()
    world.put(value="newer")
    answer = world.claim(job)
    assert answer.json()["order"]["hub_token"] == "newer"
    assert answer.headers["Cache-Control"] == "no-store"
    assert world.claim(job).json()["order"]["hub_token"] == "newer", "the answer was lost: the same runner asks again"


def test_a_wrong_claim_gets_nothing_and_changes_nothing(world: World) -> None:
    world.put()
    job = world.started()
    world.client.delete("/v1/secrets/team-hub")
    body = {"claim": "wrong", "nonce": "me"}
    answer = world.client.post(f"/v1/internal/jobs/{job}/attempts/1/claim", json=body)
    assert answer.status_code == 409
    assert world.client.get(f"/v1/jobs/{job}").json()["state"] == "starting"


def test_a_job_without_secrets_gets_none(world: World) -> None:
    world.put()
    job = world.submit({}).json()["id"]
    world.dispatcher.round()
    assert world.claim(job).json()["order"]["hub_token"] is None


def _remove(world: World) -> None:
    world.client.delete("/v1/secrets/team-hub")


def _damage(world: World) -> None:
    other = Fernet(Fernet.generate_key()).encrypt(b"{}").decode()
    world.store.put_secret("default", "team-hub", other, time.time())


@pytest.mark.parametrize(("change", "reason"), [(_remove, "is not there"), (_damage, "is not readable")])
def test_a_secret_that_is_gone_by_the_claim_fails_the_job_for_good_and_a_retry_may_succeed(
    world: World, change: Callable[[World], None], reason: str
) -> None:
    world.put()
    job = world.started()
    change(world)
    for _ in range(2):  # the answer was lost
        assert world.claim(job).status_code == 409
    found = world.client.get(f"/v1/jobs/{job}").json()
    assert (found["state"], found["error"]["kind"], found["error"]["where"]) == (
        "failed",
        "NoSecret",
        "secrets.hub_token",
    )
    assert found["error"]["message"].startswith(f"the secret 'team-hub' {reason}")
    assert found["error"]["remedy"]
    assert [event["kind"] for event in world.client.get(f"/v1/jobs/{job}/events").json()["events"]][-1] == "failed"
    world.put()
    assert world.client.post(f"/v1/jobs/{job}:retry").json()["state"] == "queued"
    world.store.change(job, machine.Dispatched(time.time() + 60, "code"))
    body = {"claim": "code", "nonce": "me"}
    answer = world.client.post(f"/v1/internal/jobs/{job}/attempts/2/claim", json=body)
    assert answer.json()["order"]["hub_token"] == TOKEN


# ---- nothing is left behind ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["succeeds", "fails", "breaks"])
def test_a_run_leaves_no_trace_of_its_token(
    world: World, how: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: Any
) -> None:
    """A runner that holds the token, and says it wherever it can: what is stored and printed afterwards is searched."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    world.put()
    job = world.started()
    api = world.api(job)
    order = api.claim(world.ray.claim(f"{job}-1"))
    assert order.hub_token == Token(TOKEN)
    attempt = runner.Attempt(api, order, job, 1)

    def make(_self: runner.Attempt) -> dict[str, Any]:
        attempt._reporter.event("shard", file=f"model-{TOKEN}", nested={"list": [TOKEN, 1]}, adopted=False)
        attempt._say(f"reading https://hub.test/x?token={TOKEN}\nand {TOKEN!r}")
        if how == "fails":
            raise runner.JobError(f"401: {TOKEN}", where=f"hf://{TOKEN}", remedy=f"Is {TOKEN} right?")
        if how == "breaks":
            raise RuntimeError(f"Authorization: Bearer {TOKEN}")
        attempt._api.ask_to_publish()
        return {"files": [], "warnings": [f"the Hub warns of {TOKEN}"]}

    monkeypatch.setattr(runner.Attempt, "_make", make)
    attempt.run()
    found = world.client.get(f"/v1/jobs/{job}")
    assert found.json()["state"] == ("succeeded" if how == "succeeds" else "queued")
    told = [found.text, *(world.client.get(f"/v1/jobs/{job}/{what}").text for what in ("events", "logs"))]
    told += [world.client.get(path).text for path in ("/v1/jobs", "/v1/secrets", "/metrics", "/openapi.json")]
    told += [str(world.ray.entrypoints), *capfd.readouterr(), caplog.text, repr(order), repr(attempt.__dict__)]
    assert [text for text in told if TOKEN in text] == []
    assert all("***" in text for text in told[:3]), "it was there to be hidden"
    kept = [path for path in world.folder.rglob("*") if path.is_file()]
    assert {"jobs.db", "jobs.db-wal"} <= {path.name for path in kept}
    assert [path for path in kept if TOKEN.encode() in path.read_bytes()] == []

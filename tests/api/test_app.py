"""The API through HTTP: what clients and runners send and get. Real application, real planning, no Ray."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from api import machine
from api.app import create_app
from api.context import new_key
from api.dispatcher import digest
from api.settings import Settings
from api.store.memory import MemoryStore
from api.store.store import Unavailable
from tests.api.ray import ScriptedRay
from tests.service.processes import write_run

KEY = "mk_test"


class BrokenStore(MemoryStore):
    """A store that can be made to fail, as a database does."""

    broken = False

    def get(self, job: str) -> Any:
        if self.broken:
            raise Unavailable("connection refused")
        return super().get(job)

    def check(self) -> None:
        if self.broken:
            raise Unavailable("connection refused")


@dataclass
class Api:
    client: TestClient
    store: BrokenStore
    ray: ScriptedRay
    folder: Path

    def recipe(self, **fields: object) -> dict[str, Any]:
        own = {"method": "average", "checkpoints": "run/step-*", "output": {"path": "out", "shard_size": "1MiB"}}
        return {**own, **fields}

    def submit(self, headers: dict[str, str] | None = None, **more: object) -> Any:
        return self.client.post("/v1/jobs", json={"recipe": self.recipe(), **more}, headers=headers)

    def running(self) -> tuple[str, str, str]:
        """A job that a runner has claimed: its id, the path of its attempt, the runner's token."""
        job = self.submit().json()["id"]
        self.store.change(job, machine.Dispatched(time.time(), "code"))
        path = f"/v1/internal/jobs/{job}/attempts/1"
        answer = self.client.post(f"{path}/claim", json={"claim": "code", "nonce": "me"})
        return job, path, answer.json()["token"]


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", shards=2, megabytes=1)
    roots = {"source_roots": (tmp_path,), "output_roots": (tmp_path,), "working_folder": tmp_path}
    settings = Settings(api_key=SecretStr(KEY), max_body=20_000, **roots)
    store, ray = BrokenStore(), ScriptedRay()
    with ray.client() as jobs:
        app = create_app(settings, store, jobs, dispatching=False)
        client = TestClient(app, headers={"Authorization": f"Bearer {KEY}"}, raise_server_exceptions=False)
        with client:
            yield Api(client, store, ray, tmp_path)


# ---- jobs ---------------------------------------------------------------------------------------------


def test_a_job_is_queued_with_its_plan_checked(api: Api) -> None:
    answer = api.submit(labels={"team": "a"}, priority=3)
    assert answer.status_code == 201
    job = answer.json()
    assert job["state"] == "queued"
    assert job["output"] == str(api.folder / "out")
    assert (job["labels"], job["priority"], job["error"], job["method"]) == ({"team": "a"}, 3, None, "average")
    assert answer.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert api.client.get(answer.headers["Location"]).json() == job


def test_a_recipe_may_be_a_yaml_text(api: Api) -> None:
    text = "method: average\ncheckpoints: run/step-*\noutput: {path: out}\n"
    assert api.client.post("/v1/jobs", json={"recipe": text}).status_code == 201


@pytest.mark.parametrize(
    ("change", "pointer", "detail"),
    [
        ({"metod": 1}, "/recipe/metod", "is not a field"),
        ({"weights": [1, 2, 3]}, "/recipe", "weights"),
        ({"checkpoints": ["run/step-1", "run/step-9"]}, "/recipe/checkpoints/1", "is not a folder here"),
        ({"checkpoints": "nowhere/*"}, "/recipe/checkpoints", "matches no folder"),
        ({"checkpoints": "/etc/*"}, "/recipe/checkpoints", "outside of the folders"),
        ({"checkpoints": ["/root/x"]}, "/recipe/checkpoints/0", "outside of the folders"),
        ({"checkpoints": ["s3://team/x"]}, "/recipe/checkpoints/0", "outside of the object stores"),
        ({"checkpoints": "gs://team/step-*"}, "/recipe/checkpoints", "outside of the object stores"),
        ({"output": {"push": "s3://team/x"}}, "/recipe/output/push", "outside of the object stores"),
        ({"output": {"path": "/etc/out"}}, "/recipe/output/path", "outside of the folders"),
        ({"output": {"path": "../out"}}, "/recipe/output/path", "outside of the folders"),
        ({"output": {"path": "run/../out"}}, "/recipe/output/path", "plain path"),
        ({"output": {}}, "/recipe/output/path", "is missing"),
        ({"output": {"path": "run"}}, "/recipe", "holds something else"),
        ({"output": {"path": "out", "dtype": "float8"}}, "/recipe/output/dtype", "input should be"),
        ({"method": "lawaa"}, "/recipe/method", "is no method"),
        ({"evaluate": {"task": "text", "data": "rows.jsonl"}}, "/recipe/evaluate/data", "is not there"),
        (
            {"evaluate": {"task": "text", "data": "r", "require": {"loss": "low"}}},
            "/recipe/evaluate/require",
            "is not a",
        ),
    ],
)
def test_a_bad_recipe_is_refused_with_the_place(api: Api, change: dict[str, Any], pointer: str, detail: str) -> None:
    answer = api.client.post("/v1/jobs", json={"recipe": api.recipe(**change)})
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["errors"][0]["pointer"].startswith(pointer), problem
    assert detail in problem["detail"]
    assert api.client.get("/v1/jobs").json()["jobs"] == [], "nothing was queued"


def test_a_link_out_of_the_roots_is_followed_and_refused(api: Api) -> None:
    (api.folder / "link").symlink_to("/etc")
    (api.folder / "model").mkdir()
    (api.folder / "model" / "config.json").symlink_to("/etc/passwd")
    for source in ("link", "model"):
        answer = api.client.post("/v1/jobs:validate", json={"recipe": api.recipe(checkpoints=[source])})
        assert "outside of the folders" in answer.json()["detail"], source


def test_validate_gives_the_plan_and_queues_nothing(api: Api) -> None:
    plan = api.client.post("/v1/jobs:validate", json={"recipe": api.recipe()}).json()
    assert (plan["shards"], plan["tensors"]) == (2, 2)
    assert plan["bytes_read"] == 4 << 20
    assert plan["needs"]["cpus"] == 1
    assert api.client.get("/v1/jobs").json()["jobs"] == []
    assert not (api.folder / "out").exists()


def test_what_is_measured_or_trained_needs_memory_by_the_size_of_the_model(api: Api) -> None:
    (api.folder / "rows.txt").write_text("It was the best of times.")
    text = {"task": "text", "data": "rows.txt"}
    training = {"task": "text", "target": "rows.txt", "folder": "stages", "runs": 1}
    ratatouille = {"method": "ratatouille", "base": "run/step-1", "training": training, "output": {"path": "out"}}

    def memory(recipe: dict[str, Any]) -> int:
        needs = api.client.post("/v1/jobs:validate", json={"recipe": recipe}).json()["needs"]
        return int(needs["memory"])

    parameters = 2 * 512 * 1024
    assert memory(api.recipe()) < memory(api.recipe(evaluate=text))
    assert memory(ratatouille) - memory(api.recipe(evaluate=text)) == 20 * parameters


def test_the_same_key_gives_the_same_job_and_another_body_is_refused(api: Api) -> None:
    first = api.submit({"Idempotency-Key": "k1"})
    again = api.submit({"Idempotency-Key": "k1"})
    assert (again.status_code, again.json()) == (201, first.json())
    assert again.headers["Idempotent-Replayed"] == "true"
    other = api.submit({"Idempotency-Key": "k1"}, priority=1)
    assert (other.status_code, other.json()["type"]) == (422, "/problems/key-reused")
    assert len(api.client.get("/v1/jobs").json()["jobs"]) == 1


def test_the_same_key_gives_the_first_answer_even_when_the_output_is_there_by_now(api: Api) -> None:
    first = api.submit({"Idempotency-Key": "k1"})
    (api.folder / "out").mkdir()
    (api.folder / "out" / "x").touch()
    assert api.submit({"Idempotency-Key": "k1"}).json() == first.json()


def test_pages_walk_through_all_jobs_once(api: Api) -> None:
    made = [api.submit(labels={"n": str(i % 2)}).json()["id"] for i in range(7)]
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page = api.client.get("/v1/jobs", params={"limit": 3, **({"cursor": cursor} if cursor else {})})
        seen += [job["id"] for job in page.json()["jobs"]]
        cursor = page.json()["next"]
        assert ("Link" in page.headers) == bool(cursor)
        if not cursor:
            break
    assert seen == made[::-1]
    odd = api.client.get("/v1/jobs", params={"label": "n=1"}).json()["jobs"]
    assert [job["id"] for job in odd] == made[1::2][::-1]
    assert api.client.get("/v1/jobs", params={"state": "running"}).json()["jobs"] == []
    assert len(api.client.get("/v1/jobs", params={"method": "average"}).json()["jobs"]) == 7
    assert api.client.get("/v1/jobs", params={"cursor": "???"}).status_code == 422


def test_cancel_and_retry(api: Api) -> None:
    job = api.submit().json()["id"]
    assert api.client.post(f"/v1/jobs/{job}:cancel").json()["state"] == "canceled"
    assert api.client.post(f"/v1/jobs/{job}:cancel").status_code == 409
    assert api.client.post(f"/v1/jobs/{job}:retry").json()["state"] == "queued"
    assert api.client.post(f"/v1/jobs/{job}:retry").status_code == 409


# ---- who may ask --------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", "Basic bWtfdGVzdA=="])
def test_a_key_is_required(api: Api, header: str) -> None:
    answer = api.client.get("/v1/jobs", headers={"Authorization": header})
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_key_opens_its_own_project_only(api: Api) -> None:
    key = new_key()
    api.store.add_key(digest(key), "other", 0.0)
    job = api.submit().json()["id"]
    headers = {"Authorization": f"Bearer {key}"}
    assert api.client.get(f"/v1/jobs/{job}", headers=headers).status_code == 404
    assert api.client.get("/v1/jobs", headers=headers).json()["jobs"] == []


def test_a_runner_needs_the_token_of_its_attempt(api: Api) -> None:
    _, path, token = api.running()
    for wrong in ("", "x", KEY):
        answer = api.client.post(f"{path}/grant", json={}, headers={"Authorization": f"Bearer {wrong}"})
        assert answer.status_code == 401
    assert api.client.get("/v1/jobs", headers={"Authorization": f"Bearer {token}"}).status_code == 401


# ---- runners ------------------------------------------------------------------------------------------


def test_an_attempt_from_claim_to_success(api: Api) -> None:
    job, path, token = api.running()
    headers = {"Authorization": f"Bearer {token}"}
    assert api.client.post(f"{path}/claim", json={"claim": "code", "nonce": "other"}).status_code == 409
    progress = {"phase": "writing", "done": 5, "total": 10, "shards_done": 1, "shards": 2, "read": 7}
    shard = {"kind": "shard", "data": {"file": "a", "size": 5, "adopted": False}}
    report = {"report": 1, "progress": progress, "events": [shard], "lines": ["one", "two"]}
    for _ in range(2):  # the answer was lost: sent again, it counts once
        assert api.client.post(f"{path}/report", json=report, headers=headers).json() == {"word": "go on"}
    assert api.client.get(f"/v1/jobs/{job}").json()["progress"]["bytes_done"] == 5
    assert api.client.get(f"/v1/jobs/{job}/logs").text == "one\ntwo\n"
    result = {"result": {"files": [], "warnings": []}}
    assert api.client.post(f"{path}/succeeded", json=result, headers=headers).status_code == 409, "not granted"
    assert api.client.post(f"{path}/grant", json={}, headers=headers).json() == {"word": "go on"}
    assert api.client.post(f"/v1/jobs/{job}:cancel").status_code == 409, "too late"
    for _ in range(2):
        assert api.client.post(f"{path}/succeeded", json=result, headers=headers).status_code == 200
    events = api.client.get(f"/v1/jobs/{job}/events").json()["events"]
    assert [e["kind"] for e in events] == ["queued", "starting", "running", "shard", "publishing", "succeeded"]
    assert [e["id"] for e in events] == [1, 2, 3, 4, 5, 6]
    metrics = api.client.get("/metrics").text
    assert 'merger_jobs{state="succeeded"} 1.0' in metrics
    assert "merger_bytes_written_total 5.0" in metrics
    assert "merger_bytes_read_total 7.0" in metrics


def test_a_canceled_job_tells_its_runner(api: Api) -> None:
    job, path, token = api.running()
    headers = {"Authorization": f"Bearer {token}"}
    api.client.post(f"/v1/jobs/{job}:cancel")
    report = {"report": 1, "progress": {}, "events": [], "lines": []}
    assert api.client.post(f"{path}/report", json=report, headers=headers).json() == {"word": "cancel"}
    assert api.client.post(f"{path}/grant", json={}, headers=headers).json() == {"word": "cancel"}
    assert api.client.post(f"{path}/canceled", json={}, headers=headers).status_code == 200
    assert api.client.get(f"/v1/jobs/{job}").json()["state"] == "canceled"


def test_a_failed_attempt_is_tried_again_only_where_that_may_help(api: Api) -> None:
    error = {"kind": "ReadFailed", "message": "ends early", "where": "a.safetensors", "remedy": ""}
    for again, state in ((True, "queued"), (False, "failed")):
        job, path, token = api.running()
        headers = {"Authorization": f"Bearer {token}"}
        api.client.post(f"{path}/failed", json={"error": error, "again": again}, headers=headers)
        found = api.client.get(f"/v1/jobs/{job}").json()
        assert (found["state"], found["error"]) == (state, error)


# ---- streams and files --------------------------------------------------------------------------------


def test_a_stream_of_events_is_taken_up_where_it_broke_off(api: Api) -> None:
    job = api.submit().json()["id"]
    api.client.post(f"/v1/jobs/{job}:cancel")
    headers = {"Accept": "text/event-stream", "Last-Event-ID": "1"}
    answer = api.client.get(f"/v1/jobs/{job}/events", headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in answer.text.strip().split("\n\n")]
    assert [line for block in blocks for line in block if line.startswith("id: ")] == ["id: 2", "id: 3"]
    last = dict(line.split(": ", 1) for line in blocks[-1])
    assert last["event"] == json.loads(last["data"])["kind"] == "canceled"


def test_artifacts_are_listed_and_downloaded_in_parts(api: Api) -> None:
    job, path, token = api.running()
    assert api.client.get(f"/v1/jobs/{job}/artifacts").status_code == 409
    headers = {"Authorization": f"Bearer {token}"}
    api.client.post(f"{path}/grant", json={}, headers=headers)
    result = {"files": [{"name": "model.safetensors", "size": 10, "xxh3": "abc"}], "warnings": []}
    api.client.post(f"{path}/succeeded", json={"result": result}, headers=headers)
    assert api.client.get(f"/v1/jobs/{job}/artifacts").status_code == 404, "the folder is gone"
    (api.folder / "out").mkdir()
    (api.folder / "out" / "model.safetensors").write_bytes(b"0123456789")
    (api.folder / "out" / "secret").symlink_to("/etc/passwd")
    [found] = api.client.get(f"/v1/jobs/{job}/artifacts").json()["artifacts"]
    assert (found["name"], found["size"], found["xxh3"]) == ("model.safetensors", 10, "abc")
    part = api.client.get(found["url"], headers={"Range": "bytes=2-4"})
    assert (part.status_code, part.content) == (206, b"234")
    for name in ("secret", "..%2f..%2fetc%2fpasswd", "nothing"):
        assert api.client.get(f"/v1/jobs/{job}/artifacts/{name}").status_code == 404


# ---- the service --------------------------------------------------------------------------------------


def test_methods_come_with_their_schemas(api: Api) -> None:
    methods = {method["name"]: method for method in api.client.get("/v1/methods").json()["methods"]}
    assert "k" in methods["lawa"]["fields"]["properties"]
    assert methods["lawa"]["paper"]


def test_ready_tells_of_ray_and_fails_without_the_database(api: Api) -> None:
    assert api.client.get("/livez").text == "ok"
    assert api.client.get("/readyz").json() == {"database": "ok", "ray": "ok"}
    api.ray.down = True
    assert api.client.get("/readyz").json() == {"database": "ok", "ray": "unreachable"}
    api.store.broken = True
    assert api.client.get("/readyz").status_code == 503
    assert api.client.get("/livez").status_code == 200


def test_without_the_database_every_answer_is_a_503_problem(api: Api) -> None:
    job = api.submit().json()["id"]
    api.store.broken = True
    answer = api.client.get(f"/v1/jobs/{job}")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
    assert answer.json()["type"] == "/problems/unavailable"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("DELETE", "/v1/jobs", 405), ("GET", "/v1/jobs/1", 404), ("PUT", "/metrics", 405)],
)
def test_what_is_not_there_is_a_problem_too(api: Api, method: str, path: str, status: int) -> None:
    answer = api.client.request(method, path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert ("allow" in answer.headers) == (status == 405)


def test_large_and_broken_bodies_are_refused(api: Api) -> None:
    large = api.client.post("/v1/jobs", json={"recipe": "x" * 30_000})
    assert (large.status_code, large.json()["type"]) == (413, "/problems/too-large")
    broken = api.client.post("/v1/jobs", content=b"{", headers={"Content-Type": "application/json"})
    assert broken.status_code == 422
    assert broken.headers["content-type"] == "application/problem+json"

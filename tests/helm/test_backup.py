"""What the operator's guide says of backups: its own commands, on a real PostgreSQL; and what an older backup means.

Needs a server (MERGER_TEST_DATABASE_URL) in which databases can be made, and its tools pg_dump and pg_restore.
"""

import os
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import inspect, text
from sqlalchemy.engine import make_url

from api.app import create_app
from api.dispatcher import Dispatcher
from api.settings import Settings
from api.store.connections import open_engine
from api.store.migrate import migrate
from api.store.sql import SqlStore
from api.store.tables import Base
from api.vault import NoSecret, Vault
from merger.cli.terminal import Silent
from merger.recipe import make_document
from merger.run import Options, run
from merger.staging import JOBS
from tests.api.ray import ScriptedRay
from tests.service.processes import KEY, Service, recipe, write_run

GUIDE = Path(__file__).parents[2] / "docs" / "operating.md"
SERVER = os.environ.get("MERGER_TEST_DATABASE_URL", "")
pytestmark = [
    pytest.mark.skipif(not SERVER, reason="MERGER_TEST_DATABASE_URL names no PostgreSQL"),
    pytest.mark.skipif(not (shutil.which("pg_dump") and shutil.which("pg_restore")), reason="no pg_dump, pg_restore"),
]


@dataclass
class Database:
    """A database of its own on the server, with the guide's commands for it."""

    folder: Path
    name: str = field(default_factory=lambda: f"backup_{uuid.uuid4().hex}")

    @property
    def url(self) -> str:
        return make_url(SERVER).set(database=self.name).render_as_string(hide_password=False)

    def make(self) -> None:
        self._tell(f"CREATE DATABASE {self.name}")

    def drop(self) -> None:
        self._tell(f"DROP DATABASE IF EXISTS {self.name} WITH (FORCE)")

    def back_up(self) -> None:
        self._run("pg_dump")

    def restore(self) -> None:
        """The whole loss: the database goes, an empty one comes, the backup is read."""
        self.drop()
        self.make()
        self._run("pg_restore")

    def rows(self) -> dict[str, list[Any]]:
        """Everything that is in it, by table."""
        engine = open_engine(self.url)
        with engine.connect() as connection:
            tables = inspect(connection).get_table_names()
            found = {name: list(connection.execute(text(f"SELECT t::text FROM {name} t"))) for name in tables}
        engine.dispose()
        return {name: sorted(map(str, rows)) for name, rows in found.items()}

    def _tell(self, statement: str) -> None:
        engine = open_engine(SERVER).execution_options(isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(statement))
        engine.dispose()

    def _run(self, command: str) -> None:
        """The one line of the guide that begins with this command."""
        [line] = re.findall(rf"^    ({command} .*)$", GUIDE.read_text(), flags=re.MULTILINE)
        environment = {**os.environ, "DATABASE_URL": self.url}
        done = subprocess.run(
            ["bash", "-ec", line], cwd=self.folder, env=environment, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path)
    database.make()
    try:
        yield database
    finally:
        database.drop()


class World:
    """The API over a database, Ray scripted; a dispatcher whose clock the tests turn."""

    def __init__(self, database: Database, folder: Path, ray: ScriptedRay, keys: tuple[str, ...] = ()) -> None:
        self.ray, self.now = ray, time.time()
        roots = {"source_roots": (folder,), "output_roots": (folder,), "working_folder": folder}
        secret_keys = tuple(map(SecretStr, keys))
        self.settings = Settings(api_key=SecretStr(KEY), lease_seconds=15, secret_keys=secret_keys, **roots)
        self.store = SqlStore(database.url)
        migrate(self.store.engine)
        self.jobs = ray.client()
        app = create_app(self.settings, self.store, self.jobs, dispatching=False)
        self.client = TestClient(app, headers={"Authorization": f"Bearer {KEY}"})
        self.vault = Vault(self.store, secret_keys)
        self.dispatcher = Dispatcher(self.store, self.jobs, self.settings, lambda: self.now)

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: object) -> None:
        self.dispatcher.stop()
        self.jobs.__exit__(None, None, None)
        self.store.close()

    def round(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.dispatcher.round()

    def submit(self, folder: Path, output: str) -> str:
        answer = self.client.post("/v1/jobs", json={"recipe": recipe(folder / "run", output, 1)})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def claim(self, job: str, number: int) -> str:
        """A runner's token for an attempt, got with the code in its command line."""
        body = {"claim": self.ray.claim(f"{job}-{number}"), "nonce": uuid.uuid4().hex}
        answer = self.client.post(f"/v1/internal/jobs/{job}/attempts/{number}/claim", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["token"])

    def say(self, job: str, number: int, token: str, what: str, body: dict[str, Any]) -> int:
        headers = {"Authorization": f"Bearer {token}"}
        path = f"/v1/internal/jobs/{job}/attempts/{number}/{what}"
        return self.client.post(path, json=body, headers=headers).status_code

    def report(self, job: str, number: int, token: str, report: int) -> int:
        return self.say(job, number, token, "report", {"report": report, "progress": {}, "events": [], "lines": ["x"]})


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    write_run(tmp_path / "run", shards=2, megabytes=1)
    return tmp_path


def test_every_row_of_every_table_comes_back_and_secrets_open_with_their_key_alone(
    database: Database, run_folder: Path
) -> None:
    key, other = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    with World(database, run_folder, ScriptedRay(), (key,)) as world:
        job = world.submit(run_folder, "a")
        headers = {"Idempotency-Key": "once"}
        again = {"recipe": recipe(run_folder / "run", "b", 1)}
        first = world.client.post("/v1/jobs", json=again, headers=headers)
        assert world.client.put("/v1/secrets/team-hub", json={"value": "hf_wörd"}).status_code == 201
        world.store.add_key("0" * 64, "other", 1.5)
        world.round()
        world.report(job, 1, world.claim(job, 1), 1)
        before = database.rows()
        database.back_up()
    assert before.keys() >= Base.metadata.tables.keys()
    assert all(before[table] for table in Base.metadata.tables), "a table that is empty proves nothing"
    database.restore()
    assert database.rows() == before
    with World(database, run_folder, ScriptedRay(), (other, key)) as world:
        world.store.check()
        assert world.vault.reveal("default", "team-hub").reveal() == "hf_wörd"
        answer = world.client.post("/v1/jobs", json=again, headers=headers)
        assert answer.json()["id"] == first.json()["id"], "the same request, one job"
    with World(database, run_folder, ScriptedRay(), (other,)) as world:
        assert [each["name"] for each in world.client.get("/v1/secrets").json()["secrets"]] == ["team-hub"]
        with pytest.raises(NoSecret, match="not readable with the keys"):
            world.vault.reveal("default", "team-hub")


def test_old_jobs_go_with_all_that_is_theirs_by_the_statement_of_the_guide(
    database: Database, run_folder: Path
) -> None:
    [statement] = re.findall(r"^    (delete from jobs .*?;)", GUIDE.read_text(), flags=re.MULTILINE | re.DOTALL)
    with World(database, run_folder, ScriptedRay()) as world:
        old, waiting, young = (world.submit(run_folder, name) for name in "abc")
        for job in (old, young):
            world.store.log(job, 0, ["said"], 1.0)
            assert world.client.post(f"/v1/jobs/{job}:cancel").status_code == 200
        with world.store.engine.begin() as connection:
            year = {"ids": [old, waiting], "then": time.time() - 400 * 86400}
            connection.execute(text("update jobs set created_at = :then where id = any(:ids)"), year)
            assert connection.execute(text(statement)).rowcount == 1
        left = [job["id"] for job in world.client.get("/v1/jobs").json()["jobs"]]
        assert sorted(left) == sorted([waiting, young])
        with world.store.engine.begin() as connection:
            for table in ("events", "logs"):
                found = {row[0] for row in connection.execute(text(f"select distinct job from {table}"))}
                assert old not in found
                assert young in found


def test_a_runner_that_the_backup_knows_goes_on(database: Database, run_folder: Path) -> None:
    ray = ScriptedRay()
    with World(database, run_folder, ray) as world:
        job = world.submit(run_folder, "a")
        world.round()
        token = world.claim(job, 1)
        database.back_up()
        assert world.report(job, 1, token, 1) == 200
    database.restore()
    with World(database, run_folder, ray) as world:
        assert world.store.get(job).attempt.reports == 0, "the backup is older"
        world.round(10)
        assert world.report(job, 1, token, 2) == 200
        assert world.say(job, 1, token, "grant", {}) == 200
        assert world.say(job, 1, token, "succeeded", {"result": {"files": []}}) == 200
        assert world.store.get(job).state == "succeeded"


def test_a_runner_of_after_the_backup_can_do_nothing_and_its_job_goes_on(database: Database, run_folder: Path) -> None:
    ray = ScriptedRay()
    with World(database, run_folder, ray) as world:
        job = world.submit(run_folder, "a")
        world.round()
        world.claim(job, 1)
        database.back_up()
        world.round(16)  # the first runner falls silent, and the backup does not know of the second
        world.round(2)
        orphan = world.claim(job, 2)
        assert world.report(job, 2, orphan, 1) == 200
    database.restore()
    with World(database, run_folder, ray) as world:
        for what, body in (("grant", {}), ("succeeded", {"result": {"files": []}})):
            assert world.say(job, 2, orphan, what, body) == 401
        assert not world.dispatcher.round(), "the dispatcher of the backup leads, until its lease runs out"
        world.round(16)
        world.round(16)
        assert world.store.get(job).attempts[0].error, "the first attempt is lost once more"
        world.round(2)
        assert [attempt.claimed_at is None for attempt in world.store.get(job).attempts] == [False, True]
        assert world.report(job, 2, orphan, 2) == 401, "the same number is not the same attempt"
        ray.statuses[f"{job}-2"] = "FAILED"  # the orphan has heard that it does not count, and left
        world.round(1)
        world.round(4)
        assert world.store.get(job).submission == f"{job}-3"
        assert world.report(job, 3, world.claim(job, 3), 1) == 200


@pytest.mark.slow
def test_after_a_restore_the_service_goes_on(database: Database, run_folder: Path) -> None:
    """With a real service: jobs that were finished, that wait, and whose results came after the backup."""
    key = Fernet.generate_key().decode()
    with World(database, run_folder, ScriptedRay(), (key,)) as world:
        finished = world.submit(run_folder, "finished")
        world.round()
        token = world.claim(finished, 1)
        assert world.report(finished, 1, token, 1) == 200
        assert world.say(finished, 1, token, "grant", {}) == 200
        assert world.say(finished, 1, token, "succeeded", {"result": {"files": [], "warnings": ["w"]}}) == 200
        queued, later = world.submit(run_folder, "queued"), world.submit(run_folder, "later")
        assert world.client.put("/v1/secrets/team-hub", json={"value": "hf_word"}).status_code == 201
        paths = [f"/v1/jobs/{finished}{path}" for path in ("", "/events", "/logs")]
        shown = [world.client.get(path).text for path in paths]
        database.back_up()
    for name in ("later", "unknown"):
        run(make_document(recipe(run_folder / "run", str(run_folder / name), 1)), Options(), Silent())
    made = {path: path.stat().st_mtime_ns for path in (run_folder / "later").iterdir()}
    database.restore()
    service = Service(run_folder, MERGER_DATABASE_URL=database.url, MERGER_SECRET_KEYS=key)
    try:
        service.start()
        assert [service.http.get(path).text for path in paths] == shown
        assert service.ended(queued)["state"] == "succeeded"
        weights = sorted((run_folder / "later").glob("*.safetensors"))
        assert len(weights) == 2
        for path in weights:
            assert (run_folder / "queued" / path.name).read_bytes() == path.read_bytes()
        assert service.ended(later)["state"] == "succeeded"
        assert "the result is there already" in service.http.get(f"/v1/jobs/{later}/logs").text
        assert {path: path.stat().st_mtime_ns for path in (run_folder / "later").iterdir()} == made
        again = service.submit(recipe(run_folder / "run", "unknown", 1))
        assert service.ended(again)["state"] == "succeeded", "a job that the backup does not know, submitted again"
        assert "the result is there already" in service.http.get(f"/v1/jobs/{again}/logs").text
        assert not (run_folder / JOBS).exists()
        assert [each["name"] for each in service.http.get("/v1/secrets").json()["secrets"]] == ["team-hub"]
    finally:
        service.stop()

"""The keys of clients by the command: printed once, kept as digests, revoked for good; secrets get the newest key."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography.fernet import Fernet
from fastapi.testclient import TestClient
from pydantic import SecretStr

from api import keys, vault
from api.app import create_app
from api.settings import Settings
from api.store.migrate import migrate
from api.store.sql import SqlStore
from api.vault import Vault
from merger.secret import Token
from tests.api.ray import ScriptedRay


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SqlStore]:
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    monkeypatch.setenv("MERGER_DATABASE_URL", url)
    monkeypatch.setattr(keys, "begin", Settings)  # which would set the log and the signals of this very process
    monkeypatch.setattr(vault, "begin", Settings)
    store = SqlStore(url)
    migrate(store.engine)
    yield store
    store.close()


def run(*words: str) -> Result:
    return CliRunner().invoke(keys.main, words)


def status(store: SqlStore, key: str) -> int:
    with ScriptedRay().client() as ray:
        app = create_app(Settings(), store, ray, dispatching=False)
        return TestClient(app).get("/v1/jobs", headers={"Authorization": f"Bearer {key}"}).status_code


def test_a_key_opens_from_when_it_is_added_until_it_is_revoked(store: SqlStore) -> None:
    key = run("add", "alice").stdout.strip()
    assert re.fullmatch(r"mk_[0-9a-f]{8}_[\w-]{43}", key)
    assert status(store, key) == 200
    [line] = run("list").stdout.splitlines()
    id_, project, day, name = line.split("\t")
    assert (project, name) == ("default", "alice")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", day)
    assert run("revoke", id_).exit_code == 0
    assert status(store, key) == 401
    assert run("list").stdout == ""


def test_the_key_itself_is_kept_nowhere(store: SqlStore, tmp_path: Path) -> None:
    key = run("add", "alice", "--project", "vision").stdout.strip()
    assert "vision" in run("list").stdout
    files = [path.read_bytes() for path in tmp_path.iterdir()]
    assert files
    assert not any(key.rsplit("_", 1)[1].encode() in content for content in files)


@pytest.mark.parametrize("wrong", ["nothing", "", "abc"])
def test_an_id_that_names_no_key_revokes_none(store: SqlStore, wrong: str) -> None:
    run("add", "alice")
    done = run("revoke", wrong)
    assert done.exit_code == 1
    assert "list" in done.stderr
    assert len(store.client_keys()) == 1


@pytest.mark.parametrize("name", ["", "x" * 64])
def test_a_name_that_is_none_is_refused(store: SqlStore, name: str) -> None:
    assert run("add", name).exit_code == 2
    assert store.client_keys() == []


def test_a_database_without_tables_is_told_of(tmp_path: Path) -> None:
    environment = {**os.environ, "MERGER_DATABASE_URL": f"sqlite:///{tmp_path / 'empty.db'}"}
    command = [sys.executable, "-m", "api.keys", "list"]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


# ---- the keys of secrets ------------------------------------------------------------------------------


def fresh() -> str:
    return Fernet.generate_key().decode()


def rotate() -> Result:
    return CliRunner().invoke(vault.main, ["rotate"])


def test_after_a_rotation_the_old_key_can_go(store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = fresh(), fresh()
    value = Token("hf_AbC0123456789xyz")
    for project in ("a", "b"):
        Vault(store, [SecretStr(old)]).put(project, "hub", value, 1.0)
    monkeypatch.setenv("MERGER_SECRET_KEYS", f"{new},{old}")
    for _ in range(2):
        done = rotate()
        assert done.exit_code == 0
        assert "2 of 2" in done.stdout
    for project in ("a", "b"):
        assert Vault(store, [SecretStr(new)]).reveal(project, "hub") == value
        [secret] = store.secrets(project)
        assert (secret.created_at, secret.updated_at) == (1.0, 1.0), "the value is the same"


def test_what_no_key_opens_is_named_and_left(store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    Vault(store, [SecretStr(fresh())]).put("a", "lost", Token("x" * 20), 1.0)
    before = store.all_secrets()
    key = fresh()
    Vault(store, [SecretStr(key)]).put("b", "known", Token("y" * 20), 1.0)
    monkeypatch.setenv("MERGER_SECRET_KEYS", key)
    done = rotate()
    assert done.exit_code == 1
    assert "a/lost" in done.stderr
    assert "1 of 2" in done.stdout
    assert store.all_secrets()[:1] == before


def test_without_keys_there_is_nothing_to_rotate(store: SqlStore) -> None:
    done = rotate()
    assert done.exit_code == 1
    assert "MERGER_SECRET_KEYS" in done.stderr


def test_a_value_that_came_meanwhile_stays(store: SqlStore) -> None:
    old, new = fresh(), fresh()
    Vault(store, [SecretStr(old)]).put("a", "hub", Token("before" * 4), 1.0)

    class Late(SqlStore):
        def all_secrets(self) -> object:
            found = super().all_secrets()
            Vault(store, [SecretStr(new)]).put("a", "hub", Token("after" * 4), 2.0)
            return found

    late = Late(str(store.engine.url))
    assert Vault(late, [SecretStr(new), SecretStr(old)]).rotate() == (1, [])
    late.close()
    assert Vault(store, [SecretStr(new)]).reveal("a", "hub") == Token("after" * 4)

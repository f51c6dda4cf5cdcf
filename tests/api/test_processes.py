"""The API and the dispatcher as processes of their own: what they say while they cannot work, and how they end."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from api.dispatcher import Dispatcher
from api.dispatching import create_watched
from api.settings import Settings
from api.store.memory import MemoryStore
from api.store.migrate import migrate
from api.store.sql import SqlStore
from tests.api.ray import ScriptedRay
from tests.api.store.databases import database
from tests.service.processes import Process, until


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for one in started:
        one.process.kill()
        one.process.wait()


MODULES = ("api.web", "api.dispatching")


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_they_wait_for_the_tables_and_end_in_order(tmp_path: Path, processes: list[Process], kind: str) -> None:
    with database(kind, tmp_path) as url:
        own = {"MERGER_DATABASE_URL": url, "MERGER_API_KEY": "mk_x", "MERGER_LEASE_SECS": "3"}
        processes += [Process(tmp_path, module, **own) for module in MODULES]
        for one in processes:
            assert one.up().get("/readyz").status_code == 503
        store = SqlStore(url)
        migrate(store.engine)
        for one in processes:
            until(lambda one=one: one.get("/readyz").is_success)  # type: ignore[misc]
            assert "merger_jobs{" in one.get("/metrics").text
        web, dispatching = processes
        until(lambda: dispatching.get("/readyz").json()["leads"])
        assert not store.hold("dispatcher", "another", 0.0, 1.0)
        assert web.get("/v1/jobs").status_code == 401
        assert [one.end() for one in processes] == [0, 0]
        assert store.hold("dispatcher", "another", 0.0, 1.0), "the lease was given back"
        store.close()
        for one in processes:
            assert any("MERGER_LEASE_SECONDS meant" in str(line["message"]) for line in one.lines())
        assert any(line.get("route") == "/v1/jobs" and line["status"] == 401 for line in web.lines())


def test_they_live_without_a_database(tmp_path: Path, processes: list[Process]) -> None:
    own = {"MERGER_DATABASE_URL": "postgresql://nobody:hidden@127.0.0.1:9/nothing"}
    processes += [Process(tmp_path, module, **own) for module in MODULES]
    for one in processes:
        assert one.up().get("/readyz").status_code == 503
    dispatching = processes[1]
    until(lambda: any("cut short" in str(line["message"]) for line in dispatching.lines()))
    assert [one.end() for one in processes] == [0, 0]
    assert not any("hidden" in one.log.read_text() for one in processes)


@pytest.mark.parametrize("module", [*MODULES, "api.store.migrate"])
def test_a_wrong_setting_is_refused_with_its_name(tmp_path: Path, module: str) -> None:
    environment = {**os.environ, "MERGER_MAX_RUNNING": "none"}
    done = subprocess.run(
        [sys.executable, "-m", module], env=environment, cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "MERGER_MAX_RUNNING" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_refused(tmp_path: Path, processes: list[Process]) -> None:
    processes.append(Process(tmp_path, "api.web").up())
    command = [sys.executable, "-m", "api.web", "--port", str(processes[0].port)]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "cannot listen" in done.stderr


def test_a_dispatcher_that_does_nothing_any_more_is_not_alive() -> None:
    store = MemoryStore()
    with ScriptedRay().client() as ray:
        dispatcher = Dispatcher(store, ray, Settings())
        with TestClient(create_watched(dispatcher, store, stuck=60)) as client:
            assert client.get("/livez").status_code == 200
        with TestClient(create_watched(dispatcher, store, stuck=-1)) as client:
            assert client.get("/livez").status_code == 503

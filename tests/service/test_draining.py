"""An upgrade loses no job: the API and the dispatcher are replaced, nodes of the cluster are emptied and go.

Real processes, as in `test_faults.py`; but everything that ends here is asked to.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.service.conftest import Postgres
from tests.service.halfway import Halfway
from tests.service.processes import KEY, Cluster, Process, Service, lives, until
from workers.drain import runners


class Balancer:
    """What a Service of Kubernetes is: one address, connections to any of the pods that are ready."""

    def __init__(self) -> None:
        self.targets: list[int] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed: the end of the test
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._join, args=(client,), daemon=True).start()

    def _join(self, client: socket.socket) -> None:
        target = ("127.0.0.1", random.choice(self.targets))
        with suppress(OSError), client, socket.create_connection(target) as server:
            back = threading.Thread(target=self._copy, args=(server, client), daemon=True)
            back.start()
            self._copy(client, server)
            back.join()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    try:
        cluster.start_head()
        cluster.start_node(2)
        cluster.start_node(3)
        yield cluster
    finally:
        cluster.stop()


@pytest.mark.slow
def test_a_rolling_upgrade_loses_no_attempt(
    postgres: Postgres, cluster: Cluster, expected: Path, tmp_path: Path
) -> None:
    balancer = Balancer()
    service = Service(tmp_path, **cluster.settings)
    service.url, service.port = f"http://127.0.0.1:{balancer.port}", balancer.port
    service.http.base_url = service.url
    settings = {
        **{"MERGER_DATABASE_URL": postgres.url, "MERGER_API_KEY": KEY, "MERGER_URL": service.url},
        **{"MERGER_HEARTBEAT_SECONDS": "0.2", "MERGER_LEASE_SECONDS": "15", "MERGER_TASK_CPUS": "1.5"},
        **{"MERGER_SOURCE_ROOTS": str(expected), "MERGER_OUTPUT_ROOTS": str(tmp_path)},
        **{"MERGER_WORKING_FOLDER": str(tmp_path), "MERGER_PYTHON": sys.executable, **cluster.settings},
    }
    subprocess.run([sys.executable, "-m", "api.store.migrate"], env={**os.environ, **settings}, check=True)
    running: list[Process] = []

    def start(version: str) -> list[Process]:
        (tmp_path / version).mkdir()
        modules = ("api.web", "api.web", "api.dispatching", "api.dispatching")
        started = []
        for i, module in enumerate(modules):
            folder = tmp_path / version / str(i)
            folder.mkdir()
            started.append(Process(folder, module, **settings))
        running.extend(started)
        for one in started:
            until(lambda one=one: one.up().get("/readyz").is_success)  # type: ignore[misc]
        return started

    try:
        old = start("old")
        balancer.targets = [one.port for one in old[:2]]
        halfway = Halfway(service, expected)
        new = start("new")
        balancer.targets = [one.port for one in new[:2]]
        for one in old:
            one.process.send_signal(signal.SIGTERM)
        assert [one.process.wait(60) for one in old] == [0] * 4
        until(lambda: any(one.get("/readyz").json()["leads"] for one in new[2:]))
        halfway.go_on()
        halfway.check()
        assert len(service.job(halfway.job)["attempts"]) == 1
        kinds = [event["kind"] for event in service.events(halfway.job)]
        assert kinds.count("starting") == kinds.count("running") == 1
    finally:
        for one in running:
            one.process.kill()
            one.process.wait()
        service.stop()
        balancer.close()


# ---- nodes --------------------------------------------------------------------------------------------


@pytest.fixture
def service(cluster: Cluster, expected: Path, tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path, MERGER_TASK_CPUS="1.5", MERGER_SOURCE_ROOTS=str(expected), **cluster.settings)
    try:
        yield service.start()
    finally:
        service.stop()


def raylet_of(node: "subprocess.Popen[bytes]") -> psutil.Process:
    [raylet] = [child for child in psutil.Process(node.pid).children() if child.name() == "raylet"]
    return raylet


def drain(cluster: Cluster, raylet: psutil.Process, log: Path, seconds: int) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.token}
    command = [sys.executable, "-m", "workers.drain", "--raylet", str(raylet.pid), "--seconds", str(seconds)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    until(lambda: "takes no more tasks" in log.read_text() or process.poll() is not None)
    assert "takes no more tasks" in log.read_text()  # it may have ended by now: an empty node is gone at once
    return process


def with_runner(cluster: Cluster, *, wanted: bool) -> psutil.Process:
    [raylet] = [raylet for raylet in map(raylet_of, cluster.nodes) if bool(runners(raylet)) is wanted]
    return raylet


@pytest.mark.slow
def test_a_node_that_is_drained_finishes_its_shard_and_takes_no_other(
    service: Service, cluster: Cluster, expected: Path, tmp_path: Path
) -> None:
    halfway = Halfway(service, expected)
    raylet = with_runner(cluster, wanted=False)
    draining = drain(cluster, raylet, tmp_path / "drain.log", 60)
    halfway.go_on()
    assert draining.wait(90) == 0
    assert "the node is empty" in (tmp_path / "drain.log").read_text()
    assert not lives(raylet), "Ray ends a node that is drained and empty"
    halfway.check()
    assert len(service.job(halfway.job)["attempts"]) == 1
    assert "its process died" not in service.http.get(f"/v1/jobs/{halfway.job}/logs").text


@pytest.mark.slow
def test_a_runner_on_a_node_that_is_drained_makes_room_in_the_end(
    service: Service, cluster: Cluster, expected: Path, tmp_path: Path
) -> None:
    halfway = Halfway(service, expected)
    raylet = with_runner(cluster, wanted=True)
    draining = drain(cluster, raylet, tmp_path / "drain.log", 1)  # what stands still cannot end in time
    assert draining.wait(60) == 0
    assert "1 runners are asked to stop" in (tmp_path / "drain.log").read_text()
    halfway.go_on()
    halfway.check()
    first, second = service.job(halfway.job)["attempts"]
    assert "asked to stop" in first["error"]["message"], "it said so itself, and no lease had to run out"
    assert second["error"] is None

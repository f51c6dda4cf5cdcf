"""Real servers and real Ray clusters for tests: started, watched, stopped and killed by process id.

Nothing here ends a process that the tests did not start.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import numpy as np
import psutil

from tests.checkpoints import write_model

T = TypeVar("T")
KEY = "mk_test_key"
# `ray start`, without its look at this machine's processes: a head that comes back would take the nodes that it left
# for another cluster in its place. A real head has a machine of its own.
_RAY = (
    "from ray._private import services; services.find_gcs_addresses = set; from ray.scripts.scripts import main; main()"
)
ENDED = {"succeeded", "failed", "canceled", "timed_out"}


def until(look: Callable[[], T | None], seconds: float = 60.0, pause: float = 0.02) -> T:
    """What `look` gives once it gives something. Fails after some time: that nothing came is the failure."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(pause)
    raise AssertionError(f"nothing came in {seconds} s")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def kill_tree(pid: int) -> None:
    """SIGKILL a process and everything below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def lives(process: psutil.Process) -> bool:
    """Whether a process has not ended, though nobody may have asked how it did."""
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


class Service:
    """`merger serve` in a folder, with a client that has its key."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        own = {"MERGER_API_KEY": KEY, "MERGER_HEARTBEAT_SECONDS": "0.2", "MERGER_LEASE_SECONDS": "3"}
        theirs = {name: value for name, value in os.environ.items() if not name.startswith("MERGER_TEST_")}
        self.environment = {**theirs, **own, **settings}  # variables of the tests are no settings
        self.http = httpx2.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Service":
        command = [sys.executable, "-m", "merger", "serve", "--port", str(self.port), "--data", "data"]
        log = self.folder / "serve.log"
        with log.open("w") as file:
            process = subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=file, stderr=file)
        self.process = process
        until(lambda: "ready http://" in log.read_text() or process.poll() is not None, 60)
        assert process.poll() is None, log.read_text()
        return self

    def kill(self) -> None:
        """SIGKILL the server alone; its cluster lives on."""
        assert self.process
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)
        self.http.close()
        cluster = self.folder / "data" / "ray.json"
        if cluster.exists():  # the server was killed and not started again
            os.kill(json.loads(cluster.read_text())["pid"], signal.SIGTERM)
            until(lambda: not cluster.exists())

    def submit(self, recipe: object, **more: object) -> str:
        response = self.http.post("/v1/jobs", json={"recipe": recipe, **more})
        assert response.status_code == 201, response.text
        return str(response.json()["id"])

    def job(self, job: str) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get(f"/v1/jobs/{job}").raise_for_status().json()
        return found

    def ended(self, job: str, seconds: float = 120.0) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            with contextlib.suppress(httpx2.HTTPError):
                found = self.job(job)
                return found if found["state"] in ENDED else None
            return None

        return until(look, seconds, 0.1)

    def events(self, job: str) -> list[dict[str, Any]]:
        answer = self.http.get(f"/v1/jobs/{job}/events", params={"limit": 1000}).raise_for_status()
        events: list[dict[str, Any]] = answer.json()["events"]
        return events

    def processes(self, part: str) -> list[psutil.Process]:
        """The living processes of this service's jobs whose command line holds `part`."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if part in line and process.status() != psutil.STATUS_ZOMBIE and self._is_ours(process, line):
                    found.append(process)
        return found

    def _is_ours(self, process: psutil.Process, line: str) -> bool:
        if self.url in line:
            return True
        token = self.environment.get("MERGER_RAY_TOKEN") or self._token()
        return bool(token) and process.environ().get("RAY_AUTH_TOKEN") == token

    def _token(self) -> str:
        cluster = self.folder / "data" / "ray.json"
        return str(json.loads(cluster.read_text())["token"]) if cluster.exists() else ""


class Process:
    """A process of the service, `python -m MODULE --port ...`, with these settings and its log line by line."""

    def __init__(self, folder: Path, module: str, **settings: str) -> None:
        self.port, self.log = free_port(), folder / f"{module}.log"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MERGER_")}
        command = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(command, env={**environment, **settings}, stderr=file, cwd=folder)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(f"http://127.0.0.1:{self.port}{path}", trust_env=False, timeout=30)

    def up(self) -> "Process":
        def look() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            try:
                return self.get("/livez").is_success
            except httpx2.HTTPError:
                return False

        until(look)
        return self

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


class Cluster:
    """A real Ray cluster on this machine: a head without processors for tasks, and nodes."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mt-", dir="/tmp"))
        self.token = secrets.token_hex(32)
        self.gcs, self.dashboard = free_port(), free_port()
        self.head: subprocess.Popen[bytes] | None = None
        self.nodes: list[subprocess.Popen[bytes]] = []

    @property
    def settings(self) -> dict[str, str]:
        return {"MERGER_RAY_URL": f"http://127.0.0.1:{self.dashboard}", "MERGER_RAY_TOKEN": self.token}

    def start_head(self) -> None:
        ports = [f"--port={self.gcs}", f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={free_port()}"]
        self.head = self._started("head", 1, "--head", "--num-cpus=0", f"--temp-dir={self.folder}", *ports)

    def start_node(self, alive: int) -> None:
        """Start a node and wait until so many are alive: two that start at once on one machine confuse each other."""
        name = f"node-{len(self.nodes)}"
        self.nodes.append(self._started(name, alive, f"--address=127.0.0.1:{self.gcs}", "--num-cpus=2"))

    def _started(self, name: str, alive: int, *options: str) -> subprocess.Popen[bytes]:
        """A process of the cluster, once so many nodes are alive. One that does not come up (another program was faster
        to take a port) is started once more.
        """
        for seconds in (30, 60):
            process = self._start(name, *options)
            with contextlib.suppress(AssertionError):
                until(lambda: self._alive() >= alive, seconds, 0.2)
                return process
            kill_tree(process.pid)
            process.wait()
        raise AssertionError((self.folder / f"{name}.log").read_text()[-4000:])

    def _alive(self) -> int:
        """How many living nodes the head tells of."""
        headers = {"Authorization": f"Bearer {self.token}"}
        url = f"http://127.0.0.1:{self.dashboard}/api/v0/nodes?detail=1"
        with contextlib.suppress(httpx2.HTTPError, ValueError, KeyError):
            found = httpx2.get(url, headers=headers).json()["data"]["result"]["result"]
            return sum(node["state"] == "ALIVE" for node in found)
        return 0

    def _start(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        command = [
            *(sys.executable, "-c", _RAY, "start", "--block", "--disable-usage-stats"),
            *("--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0"),
            *(f"--dashboard-agent-listen-port={free_port()}", "--object-store-memory=100000000", *options),
        ]
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def ours(self) -> Iterator[psutil.Process]:
        """Every process that carries this cluster's token, orphans too."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RAY_AUTH_TOKEN") == self.token:
                    yield process

    def stop(self) -> None:
        for process in [*self.ours()]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        for process in [self.head, *self.nodes]:
            if process:
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def write_run(folder: Path, shards: int = 12, megabytes: int = 16, checkpoints: int = 2) -> None:
    """The folder of a run whose average makes so many shards (of 1.05 * `megabytes`), from random numbers."""
    for step in range(1, checkpoints + 1):
        random = np.random.default_rng(step)
        rows = megabytes * 1024 * 1024 // 2 // 1024
        tensors = {
            f"model.layers.{i}.mlp.up_proj.weight": (
                "BF16",
                (rows, 1024),
                random.integers(0x3C00, 0x3F80, (rows, 1024), np.uint16).tobytes(),
            )
            for i in range(shards)
        }
        write_model(folder / f"step-{step}", tensors)


def recipe(folder: Path, output: str, megabytes: int = 16) -> dict[str, Any]:
    """A uniform average of that run, a shard for each of its tensors."""
    return {
        "method": "average",
        "checkpoints": str(folder / "step-*"),
        "output": {"path": output, "shard_size": f"{megabytes}MiB"},
    }

"""Keeps a Ray cluster of one node for `merger serve`, as a process of its own: `python -m api.keeper FOLDER`.

Knows processes, ports and locks; knows nothing of jobs. The cluster outlives a server that was killed, so that its
jobs go on and the next server finds them; it is started again when it dies; and it ends when no server has held the
folder's lock for a while.
"""

import ctypes
import fcntl
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
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import psutil

from merger.host import processors

LOCK = "serve.lock"
_CLUSTER = "ray.json"
_ALONE = 60.0  # seconds that the cluster outlives its server
_NICENESS = 10  # below the API, which has to answer while jobs compute
_OBJECT_STORE = 100 << 20  # bytes; tensors never go through it
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Cluster:
    """A running cluster: its keeper's process, the address of its dashboard, its token, its temporary folder."""

    pid: int
    url: str
    token: str
    folder: str


def ensure(data: Path) -> Cluster:
    """The cluster that belongs to a data folder, started where there is none. It may take seconds to answer."""
    running = _running(data)
    if running:
        return running
    _end_remains(data)
    command = [sys.executable, "-m", "api.keeper", str(data)]
    # Neither clients' keys nor the database's password go where jobs run.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MERGER_", "RAY_"))}
    with (data / "ray.log").open("ab") as log:
        keeper = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    while keeper.poll() is None:
        running = _running(data)
        if running:
            return running
        time.sleep(0.02)
    raise RuntimeError(f"Ray could not be started; {data / 'ray.log'} says why")


def end(data: Path) -> None:
    """End the cluster of a data folder with everything in it, and wait until it is gone."""
    running = _running(data)
    if running:
        with suppress(psutil.NoSuchProcess):
            keeper = psutil.Process(running.pid)
            keeper.terminate()
            keeper.wait(30)
    _end_remains(data)


def _running(data: Path) -> Cluster | None:
    """The cluster that the folder tells of, where its keeper lives."""
    cluster = _known(data)
    try:
        keeper = psutil.Process(cluster.pid) if cluster else None
        return cluster if keeper and "api.keeper" in keeper.cmdline() else None  # a zombie has no command line
    except psutil.Error:
        return None


def _known(data: Path) -> Cluster | None:
    try:
        return Cluster(**json.loads((data / _CLUSTER).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _end_remains(data: Path) -> None:
    """Kill what a killed keeper has left behind: the processes that carry its cluster's token."""
    cluster = _known(data)
    if cluster:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("RAY_AUTH_TOKEN") == cluster.token:
                    process.kill()
        shutil.rmtree(cluster.folder, ignore_errors=True)
        (data / _CLUSTER).unlink(missing_ok=True)


# ---- the process --------------------------------------------------------------------------------------


class _Keeper:
    """Starts Ray, starts it again when it dies, and ends it."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self._ports = _free_ports(4)
        folder = tempfile.mkdtemp(prefix="merger-ray-", dir="/tmp")  # short: Ray's sockets lie in it
        url = f"http://127.0.0.1:{self._ports[0]}"
        self._cluster = Cluster(os.getpid(), url, secrets.token_hex(32), folder)
        self._stopped = False

    def run(self) -> None:
        """Until a signal comes, or nobody has needed the cluster for a while."""
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of Ray become children, and can be ended
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        os.nice(_NICENESS)
        write_secret(self._data / _CLUSTER, json.dumps(asdict(self._cluster)))
        head = self._start()
        needed = time.monotonic()
        try:
            while not self._stopped and time.monotonic() - needed < _ALONE:
                if _is_held(self._data / LOCK):
                    needed = time.monotonic()
                if head in _reaped():
                    _end_children()
                    head = self._start()
                time.sleep(0.2)
        finally:
            _end_children()
            shutil.rmtree(self._cluster.folder, ignore_errors=True)
            (self._data / _CLUSTER).unlink(missing_ok=True)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stopped = True

    def _start(self) -> int:
        dashboard, gcs, client, agent = self._ports
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
            *("--node-ip-address=127.0.0.1", f"--port={gcs}", f"--ray-client-server-port={client}"),
            *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
            *("--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={self._cluster.folder}"),
            f"--num-cpus={processors() + 1}",  # one for the runners, which mostly wait
            f"--object-store-memory={_OBJECT_STORE}",
        ]
        environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._cluster.token,
            "PYTHONUNBUFFERED": "1",
        }
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment).pid


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def write_secret(path: Path, text: str) -> None:
    """Make or replace a file that only its owner reads, whole or not at all."""
    temporary = path.with_suffix(".new")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _is_held(lock: Path) -> bool:
    """Whether a server holds the lock; a killed one does not."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _reaped() -> set[int]:
    """The children that have ended."""
    ended = set()
    try:
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            ended.add(pid)
    except ChildProcessError:
        pass
    return ended


def _end_children() -> None:
    """Ask every descendant to end, then make them."""
    for ask in (psutil.Process.terminate, psutil.Process.kill):
        children = psutil.Process().children(recursive=True)
        for child in children:
            try:
                ask(child)
            except psutil.NoSuchProcess:
                continue
        deadline = time.monotonic() + 3
        while psutil.Process().children(recursive=True) and time.monotonic() < deadline:
            _reaped()
            time.sleep(0.05)
    _reaped()


if __name__ == "__main__":
    _Keeper(Path(sys.argv[1])).run()

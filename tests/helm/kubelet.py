"""Runs pods as processes of this machine: init containers, containers, probes, restarts, an orderly end.

Differs from a real kubelet in what `containers.py` says, in that probes are asked more often, and in that images are
this interpreter and this source tree: no file system, user or limit is a container's own. A container's command `ray`
is `ray_shim.py`, which gives every node ports of its own. Knows nothing of Deployments and of helm.
"""

import contextlib
import itertools
import math
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import psutil

from tests.helm import containers
from tests.helm.api_server.store import Object, Store
from tests.helm.pods import missing
from tests.helm.services import PORTS, Services, port_of
from tests.service.processes import free_port

ROOT = Path(__file__).parents[2]
RAY = Path(__file__).with_name("ray_shim.py")
# How often a kubelet looks at its processes and asks their probes.
PERIOD = 0.1
MARK = "LOOPBACK_POD"


class Kubelet:
    """A node that really runs pods, with a log of each container in `folder`."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.folder = Path(tempfile.mkdtemp(prefix="mk-", dir="/tmp"))  # short: Ray's sockets have long paths
        self.services = Services(store)
        self._lives: dict[str, _Life] = {}
        self._addresses = (f"127.{store.networks[1]}.{i}.{j}" for i, j in itertools.product(range(256), range(1, 255)))
        self._write_ray()

    def _write_ray(self) -> None:
        (self.folder / "bin").mkdir()
        ray = self.folder / "bin" / "ray"
        ray.write_text(f'#!/bin/sh\nexec {sys.executable} {RAY} "$@"\n')
        ray.chmod(ray.stat().st_mode | stat.S_IXUSR)

    @property
    def path(self) -> str:
        """Where containers find programs: this machine's, this interpreter's first."""
        return f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def start(self, pod: Object) -> None:
        self.services.listen()
        address = "127.0.0.1" if is_ray(pod) else next(self._addresses)
        life = self._lives[pod["metadata"]["uid"]] = _Life(self, pod, address)
        life.start()

    def stop(self, pod: Object) -> None:
        self._lives[pod["metadata"]["uid"]].ending.set()

    def log(self, name: str) -> str:
        """What the containers of a pod have printed."""
        return "\n".join(path.read_text(errors="replace") for path in sorted((self.folder / name).glob("*/*.log")))

    def logs(self) -> str:
        """What every container has printed, for the message of a test that failed."""
        found = sorted(self.folder.glob("*/*/*.log"))
        return "\n".join(f"--- {path.parent.parent.name}\n{path.read_text(errors='replace')[-3000:]}" for path in found)

    def close(self) -> None:
        """End every process of every pod at once. The folder stays until `forget`."""
        for life in self._lives.values():
            life.cut()
        for life in self._lives.values():
            life.join()
        self.services.close()


def is_ray(pod: Object) -> bool:
    return "ray.io/cluster" in (pod["metadata"].get("labels") or {})


class _Life(threading.Thread):
    """The life of one pod."""

    def __init__(self, kubelet: Kubelet, pod: Object, address: str) -> None:
        super().__init__(daemon=True, name=pod["metadata"]["name"])
        self._kubelet, self._store, self._pod = kubelet, kubelet.store, pod
        self._name, self._namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        # Members of sets and Jobs that are made anew bear the names of earlier ones.
        self._folder = kubelet.folder / self._name / pod["metadata"]["uid"][:4]
        self._folder.mkdir(parents=True)
        self._address = address
        self.ending = threading.Event()
        self._cut = threading.Event()
        self._running: list[_Container] = []
        self._ready = False

    def cut(self) -> None:
        """End without grace."""
        self._cut.set()
        self.ending.set()

    def run(self) -> None:
        try:
            self._place()
            if self._wait_for_references() and self._initialise():
                self._live()
        finally:
            self._end()

    def _place(self) -> None:
        """Give the pod its address, and a Ray node its ports."""
        ports = {str(port): free_port() for port in _RAY_PORTS} if is_ray(self._pod) else {}

        def change(pod: Object) -> None:
            pod["status"] = {"phase": "Pending", "podIP": self._address}
            notes = {f"{PORTS}{port}": str(number) for port, number in ports.items()}
            pod["metadata"]["annotations"] = (pod["metadata"].get("annotations") or {}) | notes

        self._store.change("Pod", self._namespace, self._name, change)
        self._pod = self._store.get("Pod", self._namespace, self._name) or self._pod

    def _wait_for_references(self) -> bool:
        while not self.ending.is_set():
            seen = self._store.version
            lacks = [*missing(self._store, self._pod)]
            if not lacks:
                return True
            waiting = {"reason": "CreateContainerConfigError", "message": "; ".join(lacks)}
            self._write(containerStatuses=[{"state": {"waiting": waiting}}])
            self._store.wait(seen, 1)
        return False

    def _initialise(self) -> bool:
        self._folders = containers.volumes(self._store, self._pod, self._folder / "volumes", self._kubelet.folder)
        for spec in self._pod["spec"].get("initContainers") or []:
            container = self._container(spec)
            while container.code is None and not self.ending.wait(PERIOD):
                pass
            if container.code != 0:
                self._write(phase="Failed")
                return False
        return True

    def _container(self, spec: Object) -> "_Container":
        container = _Container(self._kubelet, self._pod, spec, self._folders, self._folder)
        self._running.append(container)
        return container

    def _live(self) -> None:
        policy = self._pod["spec"].get("restartPolicy", "Always")
        main = [self._container(spec) for spec in self._pod["spec"]["containers"]]
        deadline = time.monotonic() + self._pod["spec"].get("activeDeadlineSeconds", math.inf)
        while not self.ending.wait(PERIOD):
            if time.monotonic() > deadline:
                self._write(phase="Failed", reason="DeadlineExceeded")
                for container in main:
                    container.kill()
                return
            codes = [container.code for container in main]
            for container, code in zip(main, codes, strict=True):
                if code is not None and (policy == "Always" or (policy == "OnFailure" and code)):
                    container.restart(self.ending)
            if policy != "Always" and None not in codes and (policy == "Never" or not any(codes)):
                self._write(phase="Failed" if any(codes) else "Succeeded", containerStatuses=_ended(codes))
                return
            answers = [container.probe() for container in main]
            self._set_ready(all(answers))
            self._write(phase="Running", containerStatuses=[{"restartCount": each.restarts} for each in main])

    def _set_ready(self, ready: bool) -> None:
        if ready != self._ready:
            self._ready = ready
            self._write(conditions=[{"type": "Ready", "status": str(ready)}])

    def _write(self, **fields: Any) -> None:
        def change(pod: Object) -> None:
            pod["status"] = (pod.get("status") or {}) | fields

        self._store.change("Pod", self._namespace, self._name, change)

    def _end(self) -> None:
        """Wait until somebody removes the pod, then end what still runs."""
        while not self.ending.wait(60):
            pass
        grace = 0.0 if self._cut.is_set() else float(self._pod["spec"].get("terminationGracePeriodSeconds", 30))
        for container in self._running:
            container.end(grace)
        if not self._cut.is_set():
            self._store.remove("Pod", self._namespace, self._name)


def _ended(codes: list[int | None]) -> list[Object]:
    return [{"state": {"terminated": {"exitCode": code}}} for code in codes]


# What a Ray node listens on: its own ports, so that several nodes fit on one machine.
_RAY_PORTS = (6379, 8265, 10001, 8080, 52365)


class _Container:
    """One process with its probes."""

    def __init__(self, kubelet: Kubelet, pod: Object, spec: Object, folders: Mapping[str, Path], folder: Path) -> None:
        self._kubelet, self._pod, self._spec, self._folder = kubelet, pod, spec, folder
        self.restarts = 0
        self._mounts = containers.mounts(spec, folders)
        self._start()

    def _start(self) -> None:
        namespace = self._pod["metadata"]["namespace"]
        paths = containers.shared(self._kubelet.store, namespace, self._kubelet.folder) | self._mounts
        put = containers.Substitution(self._kubelet.store, namespace, paths, self._pod["status"]["podIP"])
        known = containers.environment(self._kubelet.store, self._pod, self._spec)
        self.environment = {key: put(value) for key, value in known.items()} | self._own()
        words = containers.command(self._spec, known, put)
        with (self._folder / f"{self._spec['name']}.log").open("ab") as log:
            options: dict[str, Any] = {"cwd": self._folder, "env": self.environment, "start_new_session": True}
            self._process = subprocess.Popen(words, stdout=log, stderr=log, **options)
        self._started = not self._spec.get("startupProbe")
        self._failures = {"startupProbe": 0, "livenessProbe": 0}

    def _own(self) -> dict[str, str]:
        """What the image's environment would be, and the mark by which the pod's processes are found."""
        ports = {key: value for key, value in (self._pod["metadata"].get("annotations") or {}).items() if PORTS in key}
        found = {"PATH": self._kubelet.path, "PYTHONPATH": str(ROOT), MARK: self._pod["metadata"]["uid"]}
        found |= {key.replace(PORTS, "LOOPBACK_PORT_"): value for key, value in ports.items()}
        home = self._mounts.get("/home/merger", self._folder)
        # No Hub but that of the test, no bytecode beside the sources, no threads beyond this machine's.
        found |= {"LOOPBACK_RAY": str(self._kubelet.folder / "ray")}
        return found | {"HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONDONTWRITEBYTECODE": "1"}

    @property
    def code(self) -> int | None:
        return self._process.poll()

    def restart(self, ending: threading.Event) -> None:
        self.restarts += 1
        self.kill()
        if not ending.wait(min(0.2 * 2**self.restarts, 5.0)):
            self._start()

    def probe(self) -> bool:
        """Whether the container is ready. Kills one that does not live: it is started again."""
        if self.code is not None:
            return False
        if not self._started:
            self._started = self._asked("startupProbe", fatal=True)
            return False
        if self._spec.get("livenessProbe"):
            self._asked("livenessProbe", fatal=True)
        return self._asked("readinessProbe") if self._spec.get("readinessProbe") else True

    def _asked(self, name: str, fatal: bool = False) -> bool:
        probe = self._spec[name]
        met = self._http(probe["httpGet"]) if "httpGet" in probe else self._exec(probe["exec"])
        if fatal:
            self._failures[name] = 0 if met else self._failures[name] + 1
            # Asked more often than said, so the patience in seconds is kept.
            patience = probe.get("failureThreshold", 3) * probe.get("periodSeconds", 10) / PERIOD
            if self._failures[name] > patience:
                self.kill()
        return met

    def _http(self, probe: Object) -> bool:
        port = port_of(self._pod, probe["port"])
        with contextlib.suppress(httpx2.HTTPError):
            url = f"http://{self._pod['status']['podIP']}:{port}{probe.get('path', '/')}"
            return httpx2.get(url, timeout=5).status_code < 400
        return False

    def _exec(self, action: Object, seconds: float = 30) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            options: dict[str, Any] = {"cwd": self._folder, "env": self.environment, "timeout": seconds}
            return subprocess.run(action["command"], check=False, capture_output=True, **options).returncode == 0
        return False

    def end(self, grace: float) -> None:
        """preStop, SIGTERM to the first process, then, when it is gone or its time is over, SIGKILL to all."""
        if grace and self.code is None:
            action = ((self._spec.get("lifecycle") or {}).get("preStop") or {}).get("exec")
            if action:
                self._exec(action, grace)
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
        self.kill()

    def kill(self) -> None:
        for process in [*self._processes()]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait()

    def _processes(self) -> Iterator[psutil.Process]:
        """Every process of the pod: those that left their parents carry its mark."""
        uid = self._pod["metadata"]["uid"]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid == self._process.pid or process.environ().get(MARK) == uid:
                    yield process

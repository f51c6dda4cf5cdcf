"""Services of the loopback cluster: what comes to a Service's address goes on to a ready pod. Knows no HTTP."""

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Mapping

from tests.helm.api_server.store import Object, Store
from tests.helm.pods import is_ready

PORTS = "loopback/port-"


def port_of(pod: Object, port: int | str) -> int:
    """Where a pod really listens: a named port's number, and what its node put in the number's place."""
    if isinstance(port, str):
        named = [each for c in pod["spec"]["containers"] for each in c.get("ports") or [] if each.get("name") == port]
        port = int(named[0]["containerPort"])
    return int((pod["metadata"].get("annotations") or {}).get(f"{PORTS}{port}", port))


class Services:
    """Listens at every port of every Service, in threads, until `close`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._turns = itertools.count()
        self._listeners: dict[tuple[str, int], socket.socket] = {}
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False

    def listen(self) -> None:
        """Listen where Services have come since the last call."""
        for service in self._store.all("Service"):
            address = service["spec"]["clusterIP"]
            for port in service["spec"].get("ports") or []:
                if address != "None" and (address, port["port"]) not in self._listeners:
                    listener = self._listeners[address, port["port"]] = socket.create_server((address, port["port"]))
                    self._run(self._accept, listener, service, port)

    def _run(self, target: Callable[..., None], *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads = [each for each in self._threads if each.is_alive() or each.ident is None] + [thread]
        thread.start()
        return thread

    def _accept(self, listener: socket.socket, service: Object, port: Object) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                connection, _ = listener.accept()
                self._run(self._serve, connection, service, port)

    def _serve(self, here: socket.socket, service: Object, port: Object) -> None:
        pods = self._ready(service["metadata"]["namespace"], service["spec"]["selector"])
        with here, contextlib.suppress(OSError):
            if pods:
                pod = pods[next(self._turns) % len(pods)]
                target = port_of(pod, port.get("targetPort", port["port"]))
                with socket.create_connection((pod["status"]["podIP"], target), 10) as there:
                    there.settimeout(None)
                    self._join(here, there)

    def _join(self, here: socket.socket, there: socket.socket) -> None:
        """Copy both ways until both have ended."""
        with self._lock:
            self._open |= {here, there}
            if self._closed:
                return
        back = self._run(_copy, there, here)
        _copy(here, there)
        back.join()
        with self._lock:
            self._open -= {here, there}

    def _ready(self, namespace: str, selector: Mapping[str, str]) -> list[Object]:
        every = self._store.all("Pod", namespace)
        return [each for each in every if is_ready(each) and selector.items() <= each["metadata"]["labels"].items()]

    def close(self) -> None:
        """Cut every connection and wait until the threads have ended."""
        with self._lock:
            self._closed = True
            for each in [*self._listeners.values(), *self._open]:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for listener in self._listeners.values():
            listener.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)

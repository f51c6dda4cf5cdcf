"""The server in a process of its own, and the object that a test holds of it.

A test of speed, or one that kills and stops things, shall not share an interpreter with the server.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2

from tests.hub_server.admin import CALLS, packed, unpacked
from tests.hub_server.log import Entry
from tests.hub_server.server import HubServer, Mode


class _Faults:
    def __init__(self, http: httpx2.Client) -> None:
        self._http = http

    def add(self, **rule: Any) -> None:
        self._http.post("/__faults", content=packed(rule)).raise_for_status()

    def random(self, **rule: Any) -> None:
        self.add(random=rule)

    def clear(self) -> None:
        self._http.delete("/__faults").raise_for_status()


class HubProcess:
    """`python -m tests.hub_server` with the methods of `HubServer` (those named in `admin.CALLS`), by HTTP."""

    user, token = HubServer.user, HubServer.token

    def __init__(self, folder: Path, mode: Mode = "lfs", port: int = 0) -> None:
        command = [
            sys.executable,
            "-m",
            "tests.hub_server",
            "--root",
            str(folder.absolute()),
            "--mode",
            mode,
            "--port",
            str(port),
        ]
        pipe, root = subprocess.PIPE, Path(__file__).parents[2]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=root)
        assert self.process.stdout is not None
        word, _, self.endpoint = self.process.stdout.readline().strip().partition(" ")
        assert word == "ready", "the server did not start: see the standard error"
        self._http = httpx2.Client(base_url=self.endpoint, timeout=600)
        self.faults = _Faults(self._http)

    def log(self, origin: str | None = None, method: str | None = None, path: str = "") -> list[Entry]:
        known = [Entry(**one) for one in self._http.get("/__log").raise_for_status().json()]
        return [one for one in known if one.matches(origin, method, path)]

    def clear_log(self) -> None:
        self._http.delete("/__log").raise_for_status()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in CALLS:
            raise AttributeError(name)

        def call(*positional: Any, **named: Any) -> Any:
            content = packed({"method": name, "positional": positional, "named": named})
            response = self._http.post("/__call", content=content)
            assert response.status_code == 200, response.text
            return unpacked(response.content)

        return call

    def close(self) -> None:
        """The server ends when its standard input does, so that it does not outlive a killed test either."""
        self._http.close()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()

    def __enter__(self) -> "HubProcess":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

"""The store in a process of its own, and the object that a test holds of it."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2

from tests.object_server.watch import Entry


class ObjectServer:
    """A store with nothing in it. `owner` and `reader` are pairs of key and secret: one may do all, one only read."""

    def __init__(self) -> None:
        pipe, root = subprocess.PIPE, Path(__file__).parents[2]
        command = [sys.executable, "-m", "tests.object_server"]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=root)
        assert self.process.stdout is not None
        told = json.loads(self.process.stdout.readline())
        self.endpoint: str = told["endpoint"]
        self.owner, self.reader = tuple(told["owner"]), tuple(told["reader"])
        self._http = httpx2.Client(base_url=self.endpoint, timeout=60, trust_env=False)

    def environment(self, keys: tuple[str, str] | None = None) -> Mapping[str, str]:
        """The variables for a process that uses this store."""
        identity, secret = keys or self.owner
        named = {"AWS_ENDPOINT_URL": self.endpoint, "AWS_REGION": "us-east-1"}
        return {**named, "AWS_ACCESS_KEY_ID": identity, "AWS_SECRET_ACCESS_KEY": secret}

    def make_bucket(self, name: str) -> str:
        """A new bucket; returns its name."""
        self._http.post(f"/__buckets/{name}").raise_for_status()
        return name

    def log(self, method: str | None = None, path: str = "") -> list[Entry]:
        """The requests so far."""
        found = [Entry(**one) for one in self._http.get("/__log").raise_for_status().json()]
        return [one for one in found if method in (None, one.method) and path in one.path]

    def clear(self) -> None:
        """Forget requests and faults; requests that are held go on."""
        self._http.delete("/__log").raise_for_status()
        self._http.delete("/__faults").raise_for_status()

    def fault(self, **rule: Any) -> None:
        """Make a fault: see `watch.Watch`."""
        self._http.post("/__faults", json=rule).raise_for_status()

    def close(self) -> None:
        """The server ends when its standard input does, so that it does not outlive a killed test either."""
        self._http.close()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()

"""A bucket for a test, the environment pointing to it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from merger.storage import patience, stores
from tests.object_server.process import ObjectServer

_ROOT = Path(__file__).parents[2]


@dataclass
class Bucket:
    """An empty bucket of a server; `variables` are what a process of its own needs to use it."""

    server: ObjectServer
    name: str
    variables: dict[str, str] = field(default_factory=dict)

    def url(self, key: str = "") -> str:
        return f"s3://{self.name}/{key}"

    @property
    def store(self) -> Any:
        return stores.store_for(f"s3://{self.name}", writing=True)

    def put(self, folder: Path, key: str) -> str:
        """A folder's files as objects; returns the address."""
        for path in sorted(folder.iterdir()):
            self.store.put(f"{key}/{path.name}", path.read_bytes())
        return self.url(key)

    def content(self, key: str) -> dict[str, bytes]:
        """The objects below a key, by what follows it."""
        found = self.store.list(key).collect()
        return {one["path"].removeprefix(f"{key}/"): bytes(self.store.get(one["path"]).bytes()) for one in found}

    def process(self, program: str, *arguments: object) -> subprocess.Popen[str]:
        """A Python program that uses the bucket, from the root of the repository."""
        command = [sys.executable, "-c", program, *map(str, arguments)]
        pipe = subprocess.PIPE
        variables = {**os.environ, **self.variables}
        return subprocess.Popen(command, cwd=_ROOT, env=variables, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture(scope="session")
def object_server() -> Iterator[ObjectServer]:
    """A store for the whole session."""
    server = ObjectServer()
    yield server
    server.close()


@pytest.fixture
def bucket(
    object_server: ObjectServer, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bucket]:
    """A bucket of its own, faults and log cleared, short patience, and a cache below `tmp_path`."""
    object_server.clear()
    name = f"bucket-{abs(hash(request.node.nodeid)):x}"[:40]
    variables = {**object_server.environment(), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(patience, "_FIRST", 0.01)
    stores.store_for.cache_clear()
    yield Bucket(object_server, object_server.make_bucket(name), variables)
    object_server.clear()
    stores.store_for.cache_clear()

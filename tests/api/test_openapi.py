"""The OpenAPI document against the application: schemathesis sends what the document allows, and what it does not."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from cryptography.fernet import Fernet
from pydantic import SecretStr

from api.app import create_app
from api.settings import Settings
from api.store.memory import MemoryStore
from tests.api.ray import ScriptedRay
from tests.service.processes import until, write_run

KEY = "mk_test"


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server over the real application, in a folder that has what the document's example recipe names."""
    write_run(tmp_path / "runs" / "tiny", shards=1, megabytes=1, checkpoints=6)
    monkeypatch.chdir(tmp_path)
    roots = {"source_roots": (tmp_path,), "output_roots": (tmp_path,), "working_folder": tmp_path}
    keys = (SecretStr(Fernet.generate_key().decode()),)
    settings = Settings(api_key=SecretStr(KEY), secret_keys=keys, queue_seconds=0.5, **roots)
    scripted = ScriptedRay()
    scripted.nodes = []  # no job can start, so each is soon timed out, and streams of it end
    with scripted.client() as ray:
        app = create_app(settings, MemoryStore(), ray)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        server.should_exit = True
        thread.join()


def test_schemathesis_finds_nothing(url: str, tmp_path: Path) -> None:
    command = [
        *(
            sys.executable,
            "-m",
            "schemathesis.cli",
            "--config-file",
            str(Path(__file__).with_name("schemathesis.toml")),
        ),
        *("run", f"{url}/openapi.json", "--max-examples", "25", "--seed", "1", "--no-color"),
        *("--header", f"Authorization: Bearer {KEY}"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

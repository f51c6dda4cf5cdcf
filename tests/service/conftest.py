"""What tests of the service share: a run with its average, and a PostgreSQL server of their own."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from merger.cli.terminal import Silent
from merger.recipe import make_document
from merger.run import Options, run
from tests.service.halfway import SHARDS
from tests.service.processes import free_port, recipe, write_run


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run, and in `expected` what `merger run` makes of it."""
    folder = tmp_path_factory.mktemp("faults")
    write_run(folder / "run", SHARDS)
    run(make_document(recipe(folder / "run", str(folder / "expected"))), Options(), Silent())
    return folder


_BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


class Postgres:
    """A PostgreSQL server of the test's own, which it may stop."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.folder.mkdir()
        shutil.chown(folder, "postgres", "postgres")
        self._run("initdb", "--auth=trust", "--username=postgres")

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        self._run("pg_ctl", "start", "--wait", "-o", f"-p {self.port} -c unix_socket_directories=", "-l", "log")

    def stop(self) -> None:
        self._run("pg_ctl", "stop", "--mode=immediate")

    def _run(self, program: str, *arguments: str) -> None:
        command = ["runuser", "-u", "postgres", "--", str(_BINARIES[-1] / program), "-D", str(self.folder), *arguments]
        subprocess.run(command, cwd=self.folder, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    if not _BINARIES or os.geteuid() != 0:
        pytest.skip("needs PostgreSQL's programs and the right to start a server as another user")
    with tempfile.TemporaryDirectory() as name:  # not below pytest's folder, which only root may enter
        Path(name).chmod(0o755)
        server = Postgres(Path(name) / "database")
        server.start()
        yield server
        server.stop()

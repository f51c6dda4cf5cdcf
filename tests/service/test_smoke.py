"""The smoke test against a real service: `merger serve`, and its own processes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.smoke import check_bytes
from tests.object_server.fixtures import Bucket
from tests.service.processes import KEY, Service


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path, MERGER_SOURCE_ROOTS=str(tmp_path / "models"))
    try:
        yield service.start()
    finally:
        service.stop()


def smoke(service: Service, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MERGER_URL": service.url, "MERGER_API_KEY": KEY}
    command = [sys.executable, "-m", "api.smoke", "--seconds", "120", *words]
    return subprocess.run(command, env=environment, cwd="/", check=False, capture_output=True, text=True)


@pytest.mark.slow
def test_it_passes_on_a_service_that_works(service: Service) -> None:
    done = smoke(service, "--output", str(service.folder))
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("succeeded", "is that of the average in float64", "bytes of the file are right"):
        assert text in done.stdout
    assert not list(service.folder.glob("merger-smoke-*")), "it leaves nothing"
    assert smoke(service, "--plan-only").returncode == 0
    jobs = service.http.get("/v1/jobs", params={"label": "merger=smoke"}).json()["jobs"]
    assert [job["state"] for job in jobs] == ["succeeded"]


@pytest.mark.slow
def test_it_fails_where_the_service_may_not_write(service: Service) -> None:
    done = smoke(service, "--output", "/elsewhere")
    assert done.returncode == 1
    assert "is outside of the folders" in json.loads(done.stderr[done.stderr.index("{") :])["detail"]


@pytest.mark.slow
def test_it_passes_where_results_go_to_an_object_store(bucket: Bucket, tmp_path: Path) -> None:
    own = {"MERGER_OBJECT_ROOTS": bucket.url(), "MERGER_SHARED_FOLDERS": "false"}
    service = Service(tmp_path, **own, **bucket.variables)
    try:
        service.start()
        environment = {**os.environ, **own, "MERGER_URL": service.url, "MERGER_API_KEY": KEY}
        command = [sys.executable, "-m", "api.smoke", "--seconds", "120"]
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "is that of the average in float64" in done.stdout
        [pushed] = [name for name in bucket.content("") if name.endswith("model.safetensors")]
        check_bytes(bucket.content("")[pushed])
    finally:
        service.stop()

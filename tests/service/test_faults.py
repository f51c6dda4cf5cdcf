"""Whatever is killed while a job runs, the job succeeds, with the right bytes, and computes no finished shard twice.

Real servers, real Ray clusters, SIGKILL. The processes that work are stopped (SIGSTOP) in the middle of a job, so that
there is time to kill; nothing depends on how fast a machine is.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil
import pytest

from merger.staging import JOBS
from tests.service.conftest import Postgres
from tests.service.halfway import SHARDS, Halfway
from tests.service.processes import Cluster, Service, kill_tree, lives, recipe, until, write_run


@pytest.fixture
def service(expected: Path, tmp_path: Path) -> Iterator[Service]:
    """A server with a Ray of its own; one shard at a time."""
    service = Service(tmp_path, MERGER_TASK_CPUS="2", MERGER_SOURCE_ROOTS=str(expected))
    try:
        yield service.start()
    finally:
        service.stop()


@pytest.fixture
def cluster(expected: Path, tmp_path: Path) -> Iterator[tuple[Service, Cluster]]:
    """A server over a real cluster of a head and two nodes."""
    cluster = Cluster()
    service = Service(tmp_path, MERGER_TASK_CPUS="1.5", MERGER_SOURCE_ROOTS=str(expected), **cluster.settings)
    try:
        cluster.start_head()
        cluster.start_node(2)
        cluster.start_node(3)
        yield service.start(), cluster
    finally:
        service.stop()
        cluster.stop()


@pytest.mark.slow
def test_a_shard_worker_is_killed(service: Service, expected: Path) -> None:
    halfway = Halfway(service, expected)
    for process in halfway.stopped:
        process.kill()
    halfway.check()
    assert len(service.job(halfway.job)["attempts"]) == 1
    assert "its process died" in service.http.get(f"/v1/jobs/{halfway.job}/logs").text


@pytest.mark.slow
def test_the_runner_is_killed(service: Service, expected: Path) -> None:
    halfway = Halfway(service, expected)
    for process in service.processes("workers.runner"):
        process.kill()
    halfway.go_on()
    halfway.check()
    assert len(service.job(halfway.job)["attempts"]) == 2


@pytest.mark.slow
def test_the_api_is_killed(service: Service, expected: Path) -> None:
    halfway = Halfway(service, expected)
    service.kill()
    halfway.go_on()
    service.start()
    halfway.check()
    assert len(service.job(halfway.job)["attempts"]) == 1, "the job went on by itself"


@pytest.mark.slow
def test_a_node_is_killed(cluster: tuple[Service, Cluster], expected: Path) -> None:
    service, ray = cluster
    halfway = Halfway(service, expected)
    [raylet] = [p for p in psutil.Process(ray.nodes[0].pid).children() if p.name() == "raylet"]
    raylet.kill()
    halfway.go_on()
    halfway.check()


@pytest.mark.slow
def test_the_head_is_killed_and_comes_back(cluster: tuple[Service, Cluster], expected: Path) -> None:
    service, ray = cluster
    halfway = Halfway(service, expected)
    assert ray.head
    kill_tree(ray.head.pid)
    ray.head.wait()
    halfway.go_on()
    ray.start_head()
    ray.start_node(2)  # as an operator of the cluster does; the old ones do not join the new head
    halfway.check()


@pytest.mark.slow
def test_an_orphan_cannot_change_the_result(cluster: tuple[Service, Cluster], expected: Path) -> None:
    service, ray = cluster
    halfway = Halfway(service, expected)
    orphans = [*service.processes("workers.runner"), *halfway.stopped]
    supervisors = service.processes("JobSupervisor")
    assert len(orphans) >= 2
    assert supervisors
    for process in [*orphans, *supervisors]:  # the attempt stands still, and so does what Ray would kill it with
        process.suspend()
    ray.start_node(4)  # for the next attempt: the orphan holds on to what it has
    halfway.check()
    assert all(process.is_running() for process in orphans)
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in halfway.output.iterdir()}
    for process in orphans:
        process.resume()
    until(lambda: not any(map(lives, orphans)))  # they find out by themselves that they no longer count
    for process in supervisors:
        process.resume()
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in halfway.output.iterdir()} == before
    assert not (service.folder / JOBS).exists()


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["planning", "running", "publishing", "standing still"])
def test_cancel_leaves_nothing(service: Service, expected: Path, phase: str) -> None:
    if phase == "planning":
        job = service.submit(recipe(expected / "run", "out"))
        runners = until(lambda: service.processes("workers.runner"), 60, 0.002)
    else:
        halfway = Halfway(service, expected)
        job = halfway.job
        if phase == "publishing":
            halfway.go_on()
            until(lambda: len(halfway.receipts()) == SHARDS, 60, 0.001)
        runners = service.processes("workers.runner")
    for runner in runners:
        runner.suspend()
    assert service.http.post(f"/v1/jobs/{job}:cancel").status_code == 200
    for runner in runners if phase != "standing still" else ():
        runner.resume()
    assert service.ended(job)["state"] == "canceled"
    until(lambda: not service.processes("workers.runner") and not service.processes("write_shard"))
    assert not (service.folder / "out").exists()
    assert not (service.folder / JOBS).exists()


# ---- the database -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_database_is_away_for_ten_seconds(postgres: Postgres, expected: Path, tmp_path: Path) -> None:
    own = {"MERGER_TASK_CPUS": "2", "MERGER_SOURCE_ROOTS": str(expected), "MERGER_DATABASE_URL": postgres.url}
    service = Service(tmp_path, **own)
    try:
        service.start()
        halfway = Halfway(service, expected)
        postgres.stop()
        began = time.monotonic()
        answers = [service.http.get("/v1/jobs"), service.http.get("/readyz")]
        answers.append(service.http.post("/v1/jobs", json={"recipe": recipe(expected / "run", "other")}))
        for answer in answers:
            assert answer.status_code == 503
            assert answer.headers["content-type"] == "application/problem+json"
        assert service.http.get("/livez").status_code == 200
        halfway.go_on()
        until(lambda: len(halfway.receipts()) == SHARDS)  # the work goes on without the database
        until(lambda: time.monotonic() - began > 10)
        assert not halfway.output.exists(), "only the database can let it be published"
        postgres.start()
        halfway.check()
        assert len(service.job(halfway.job)["attempts"]) == 1
    finally:
        service.stop()


@pytest.mark.slow
def test_two_replicas_share_the_work_and_start_no_attempt_twice(postgres: Postgres, tmp_path: Path) -> None:
    write_run(tmp_path / "run", shards=2, megabytes=1)
    cluster, replicas = Cluster(), list[Service]()
    own = {"MERGER_DATABASE_URL": postgres.url, "MERGER_SOURCE_ROOTS": str(tmp_path), "MERGER_LEASE_SECONDS": "15"}
    try:
        cluster.start_head()
        cluster.start_node(2)
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            replicas.append(
                Service(tmp_path / name, MERGER_OUTPUT_ROOTS=str(tmp_path), **own, **cluster.settings).start()
            )
        jobs = [
            replica.submit(recipe(tmp_path / "run", str(tmp_path / f"out-{name}-{i}"), 1))
            for i in range(4)
            for name, replica in zip("ab", replicas, strict=True)
        ]
        for job in jobs:
            ended = replicas[0].ended(job)
            assert (ended["state"], len(ended["attempts"])) == ("succeeded", 1)
            assert replicas[1].job(job) == ended
            kinds = [event["kind"] for event in replicas[1].events(job)]
            assert kinds.count("starting") == kinds.count("running") == 1
        known = httpx2.get(
            f"http://127.0.0.1:{cluster.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {cluster.token}"}
        )
        assert sorted(one["submission_id"] for one in known.json()) == sorted(f"{job}-1" for job in jobs)
    finally:
        for replica in replicas:
            replica.stop()
        cluster.stop()


# ---- the embedded Ray ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_runner_is_asked_to_stop(service: Service, expected: Path) -> None:
    halfway = Halfway(service, expected)
    for process in service.processes("workers.runner"):
        process.terminate()
    halfway.go_on()
    halfway.check()
    first, *_ = service.job(halfway.job)["attempts"]
    assert "asked to stop" in first["error"]["message"], "it said so itself, and no lease had to run out"


@pytest.mark.slow
def test_the_embedded_ray_dies_and_comes_back(service: Service, expected: Path) -> None:
    halfway = Halfway(service, expected)
    for process in service.processes("gcs_server"):
        process.kill()
    halfway.go_on()
    halfway.check()


@pytest.mark.slow
def test_jobs_survive_a_stop_of_everything(service: Service, expected: Path) -> None:
    halfway = Halfway(service, expected)
    halfway.go_on()
    service.process.terminate()  # type: ignore[union-attr]  (as Ctrl-C does: Ray ends too)
    service.process.wait(60)  # type: ignore[union-attr]
    assert not (service.folder / "data" / "ray.json").exists()
    halfway.finished = {path.name.removesuffix(".json"): halfway.identity(path) for path in halfway.receipts()}
    service.start()
    halfway.check()


@pytest.mark.slow
def test_a_killed_keeper_leaves_nothing_running(service: Service) -> None:
    cluster = json.loads((service.folder / "data" / "ray.json").read_text())
    psutil.Process(cluster["pid"]).kill()
    assert service.processes("raylet"), "Ray goes on without its keeper"
    service.stop()
    until(lambda: not [p for p in psutil.process_iter() if carries(p, cluster["token"])])


def carries(process: psutil.Process, token: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.environ().get("RAY_AUTH_TOKEN") == token)
    return False

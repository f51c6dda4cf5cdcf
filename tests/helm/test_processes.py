"""What the chart renders runs for real: helm installs it, a kubelet runs its pods as processes of this machine.

A fresh PostgreSQL database, migrations, two API processes, two dispatchers, a Ray head and two workers with KubeRay's
flags and the token on, then `helm test`; and an upgrade in the middle of a job. What is put in place of what would
stand in a cluster is said in `containers.py`, `kubelet.py` and `ray_shim.py`.
"""

import base64
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from tests.api.store.databases import database
from tests.helm.chart import CHART
from tests.helm.kubelet import MARK, Kubelet
from tests.helm.loopback import NAMESPACE, Cluster
from tests.service.processes import ENDED, recipe, until, write_run

SHARDS = 6
VALUES = {
    "database": {"existingSecret": "merger-database"},
    "settings": {"task_memory": 64 << 20},
    "ray": {"groups": {"cpu": {"minReplicas": 2, "maxReplicas": 2}}},
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with database("postgresql", tmp_path_factory.mktemp("database")) as found:
        yield found


class Release:
    """The installed chart, with a client of its API."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.kubelet = cluster, cluster.node
        service = cluster.get("Service", "demo-merger-api")
        keys = cluster.get("Secret", "demo-merger-keys")
        assert service
        assert keys
        key = base64.b64decode(keys["data"]["api-key"]).decode()
        url = f"http://{service['spec']['clusterIP']}:{service['spec']['ports'][0]['port']}"
        self.http = httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=30)

    def submit(self, recipe: object) -> str:
        answer = self.http.post("/v1/jobs", json={"recipe": recipe})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def job(self, job: str) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get(f"/v1/jobs/{job}").raise_for_status().json()
        return found

    def ended(self, job: str) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            found = self.job(job)
            return found if found["state"] in ENDED else None

        return until(look, 240, 0.2)

    def events(self, job: str) -> str:
        """What the service and its pods tell of a job, for the message of a test that failed."""
        return f"{self.http.get(f'/v1/jobs/{job}/events').text}\n{self.kubelet.logs()}"

    @property
    def models(self) -> Path:
        """The folder that stands for the shared volume."""
        return Path(self.kubelet.folder) / "demo-merger-models"

    def pods(self) -> dict[str, set[str]]:
        """The pods of each component, by what is never used again."""
        found: dict[str, set[str]] = {}
        for pod in self.cluster.all("Pod"):
            component = pod["metadata"]["labels"]["app.kubernetes.io/component"]
            found.setdefault(component, set()).add(pod["metadata"]["uid"])
        return found

    def halted_tasks(self) -> list[psutil.Process]:
        """The tasks that write shards now, halted: the job stays in its middle as long as they are."""
        found = []
        uids = self.pods()["ray"]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if "write_shard" in " ".join(process.cmdline()) and process.environ().get(MARK) in uids:
                    process.suspend()
                    found.append(process)
        return found

    def upgrade(self, *arguments: str) -> None:
        self.cluster.helm("upgrade", "demo", str(CHART), *arguments, values=VALUES)


@pytest.fixture(scope="module")
def release(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), Kubelet)
    cluster.put("Secret", "merger-database", stringData={"url": url})
    try:
        cluster.helm("install", "demo", str(CHART), "--wait", "--timeout", "240s", values=VALUES)
        cluster.settle(240)
        found = Release(cluster)
        with found.http:
            yield found
    except AssertionError as error:
        raise AssertionError(f"{error}\n{cluster.node.logs()}") from error
    finally:
        cluster.node.close()
        cluster.close()
        shutil.rmtree(cluster.node.folder, ignore_errors=True)


def test_migrations_api_dispatcher_and_ray_run(release: Release) -> None:
    assert release.http.get("/readyz").json() == {"database": "ok", "ray": "ok"}
    components = [each["metadata"]["labels"]["app.kubernetes.io/component"] for each in release.cluster.all("Pod")]
    assert sorted(components) == ["api", "api", "dispatcher", "dispatcher", "ray", "ray", "ray"]


def test_helm_test_passes(release: Release) -> None:
    assert "Succeeded" in release.cluster.helm("test", "demo", "--timeout", "240s")
    log = release.kubelet.log("demo-merger-smoke")
    assert "is that of the average in float64" in log
    assert "bytes of the file are right" in log


def test_an_upgrade_in_the_middle_of_a_job_loses_nothing(release: Release) -> None:
    """Every pod of the service is replaced while the tasks of a job stand still; then it goes on.

    Its paths are relative: they begin in the shared volume, in every pod.
    """
    write_run(release.models / "run", SHARDS, 4)
    job = release.submit(recipe(Path("run"), "averaged", 4))
    stopped = until(release.halted_tasks, 120)
    before = release.pods()
    release.upgrade("--set", "settings.max_running=3", "--wait", "--timeout", "240s")
    release.cluster.settle(240)
    after = release.pods()
    assert not before["api"] & after["api"]
    assert not before["dispatcher"] & after["dispatcher"]
    assert before["ray"] == after["ray"]
    now = release.job(job)
    assert (now["state"], len(now["attempts"])) == ("running", 1), release.events(job)

    for process in stopped:
        process.resume()
    ended = release.ended(job)
    assert (ended["state"], len(ended["attempts"])) == ("succeeded", 1), release.events(job)
    assert len(ended["result"]["files"]) == SHARDS
    assert len([*(release.models / "averaged").glob("*.safetensors")]) == SHARDS


def test_helm_test_fails_where_nothing_is_dispatched(release: Release) -> None:
    """The last test: it leaves the release without dispatchers."""
    release.upgrade("--set", "smoke.activeDeadlineSeconds=70")  # a minute of them for the pod's start
    name = "demo-merger-dispatcher"
    release.cluster.store.change("Deployment", NAMESPACE, name, lambda each: each["spec"].update(replicas=0))
    release.cluster.settle()
    assert "demo-merger-smoke failed" in release.cluster.refused("test", "demo", "--timeout", "240s")
    log = release.kubelet.log("demo-merger-smoke")
    assert "queued" in log.splitlines()
    assert "the job is still queued; it was cancelled" in log

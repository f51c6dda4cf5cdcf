"""The real helm installs, upgrades, rolls back, tests and uninstalls the chart on a loopback cluster.

Pods are pretended here: they are ready when all that they refer to is there. `test_processes.py` runs them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helm.api_server.schemas import RAY_CLUSTERS
from tests.helm.api_server.store import Object
from tests.helm.chart import CHART, render
from tests.helm.loopback import NAMESPACE, Cluster

SCENARIOS = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))
MINIMAL = ("--values", str(CHART / "ci/minimal-values.yaml"))
INSTALL = ("install", "demo", str(CHART), *MINIMAL)
UPGRADE = ("upgrade", "demo", str(CHART), *MINIMAL)
WAIT = ("--wait", "--timeout", "60s")
COMPONENT = "app.kubernetes.io/component"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    found = Cluster(tmp_path / "cluster")
    found.put("Secret", "merger-database", stringData={"url": "postgresql://nobody@nowhere/none"})
    yield found
    found.close()


@pytest.fixture
def installed(cluster: Cluster) -> Cluster:
    cluster.helm(*INSTALL)
    cluster.settle()
    return cluster


def pods(cluster: Cluster, component: str) -> dict[str, Object]:
    every = cluster.all("Pod")
    return {each["metadata"]["name"]: each for each in every if each["metadata"]["labels"].get(COMPONENT) == component}


def status(cluster: Cluster) -> str:
    return cluster.helm("status", "demo", "--output", "yaml").split("status: ")[1].split()[0]


def place(cluster: Cluster, verb: str, ending: str) -> int:
    """Which of the requests first was this one."""
    return [(v, path.rpartition("/")[2]) for v, path, code in cluster.server.requests if code < 300].index(
        (verb, ending)
    )


def setting(cluster: Cluster, name: str) -> str | None:
    """A setting as the API's newest pods get it."""
    data = (cluster.get("ConfigMap", "demo-merger-settings") or {})["data"]
    value: str | None = data.get(name)
    return value


def test_an_installation_that_waits_brings_up_every_component(cluster: Cluster) -> None:
    cluster.helm(*INSTALL, *WAIT)
    cluster.settle()  # helm does not wait for Ray clusters
    installed = cluster
    assert status(installed) == "deployed"
    assert len(pods(installed, "api")) == 2
    assert len(pods(installed, "dispatcher")) == 2
    heads = [
        each for each in pods(installed, "ray").values() if each["metadata"]["labels"]["ray.io/node-type"] == "head"
    ]
    assert len(heads) == 1
    for each in installed.all("Deployment"):
        assert each["status"]["readyReplicas"] == each["spec"]["replicas"]


def test_migrations_end_before_the_first_deployment_begins(installed: Cluster) -> None:
    assert place(installed, "POST", "jobs") < place(installed, "POST", "deployments")
    assert [each["metadata"]["labels"][COMPONENT] for each in installed.node.ended] == ["migrations"]
    assert installed.all("Job") == []


def test_an_upgrade_changes_what_was_asked_and_keeps_every_secret(installed: Cluster) -> None:
    before = {each["metadata"]["name"]: each["data"] for each in installed.all("Secret") if "helm" not in each["type"]}
    old = set(pods(installed, "api"))
    installed.helm(*UPGRADE, "--set", "settings.max_running=3")
    installed.settle()
    assert setting(installed, "MERGER_MAX_RUNNING") == "3"
    assert len(pods(installed, "api")) == 2
    assert not old & set(pods(installed, "api"))  # they read settings at their start
    after = {each["metadata"]["name"]: each["data"] for each in installed.all("Secret") if "helm" not in each["type"]}
    assert after == before
    assert {"demo-merger-keys", "demo-merger-ray-token", "merger-database"} <= set(after)


def test_an_upgrade_that_changes_nothing_replaces_no_pod(installed: Cluster) -> None:
    before = {each["metadata"]["uid"] for each in installed.all("Pod")}
    installed.helm(*UPGRADE)
    installed.settle()
    after = {each["metadata"]["uid"] for each in installed.all("Pod")}
    assert after == before


def test_each_installation_makes_keys_of_its_own(installed: Cluster) -> None:
    installed.helm("install", "other", str(CHART), *MINIMAL)
    ours, others = installed.get("Secret", "demo-merger-keys"), installed.get("Secret", "other-merger-keys")
    assert ours
    assert others
    assert not set(ours["data"].values()) & set(others["data"].values())


def test_a_rollback_brings_the_settings_back(installed: Cluster) -> None:
    before = (installed.get("ConfigMap", "demo-merger-settings") or {})["data"]
    installed.helm(*UPGRADE, "--set", "settings.max_running=3", "--set", "api.replicas=4")
    installed.settle()
    assert len(pods(installed, "api")) == 4
    installed.helm("rollback", "demo", "1")
    installed.settle()
    assert (installed.get("ConfigMap", "demo-merger-settings") or {})["data"] == before
    assert len(pods(installed, "api")) == 2
    history = installed.helm("history", "demo")
    assert [line.split("\t")[2].strip() for line in history.splitlines()[1:]] == [
        "superseded",
        "superseded",
        "deployed",
    ]


def test_helm_test_tells_whether_the_smoke_test_passed(installed: Cluster) -> None:
    assert "Succeeded" in installed.helm("test", "demo")
    assert installed.node.ended[-1]["metadata"]["labels"][COMPONENT] == "smoke"
    installed.node.outcomes["smoke"] = "Failed"
    assert "demo-merger-smoke failed" in installed.refused("test", "demo")


def test_a_failed_migration_stops_an_installation(cluster: Cluster) -> None:
    cluster.node.outcomes["migrations"] = "Failed"
    assert "demo-merger-migrations failed: BackoffLimitExceeded" in cluster.refused(*INSTALL, *WAIT)
    assert cluster.all("Deployment") == []
    assert cluster.all("RayCluster") == []


def test_a_failed_migration_stops_an_upgrade_and_the_old_pods_go_on(installed: Cluster) -> None:
    before = {each["metadata"]["uid"] for each in installed.all("Pod") if each["status"]["phase"] == "Running"}
    installed.node.outcomes["migrations"] = "Failed"
    said = installed.refused(*UPGRADE, "--set", "settings.max_running=3")
    assert "pre-upgrade hooks failed" in said
    assert status(installed) == "failed"
    assert setting(installed, "MERGER_MAX_RUNNING") is None
    assert {each["metadata"]["uid"] for each in installed.all("Pod") if each["status"]["phase"] == "Running"} == before

    installed.node.outcomes.clear()
    installed.helm(*UPGRADE, "--set", "settings.max_running=3")
    installed.settle()
    assert status(installed) == "deployed"
    assert setting(installed, "MERGER_MAX_RUNNING") == "3"


def test_without_the_database_secret_nothing_starts_and_the_pod_says_why(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster")
    try:
        said = cluster.refused(*INSTALL, "--create-namespace", "--wait", "--timeout", "3s")
        assert "timed out" in said
        waiting = [each["status"]["containerStatuses"][0]["state"]["waiting"] for each in cluster.all("Pod")]
        assert [each["message"] for each in waiting] == ['secret "merger-database" not found']
        assert cluster.all("Deployment") == []
    finally:
        cluster.close()


def test_the_server_refuses_a_field_that_is_none(installed: Cluster) -> None:
    odd = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "odd"}, "dat": {}}
    assert 'unknown field "dat"' in installed.refused(*UPGRADE, values={"extraObjects": [odd]})
    assert installed.get("ConfigMap", "odd") is None


@pytest.mark.skipif(not RAY_CLUSTERS.exists(), reason="KubeRay's definitions are not beside the project")
def test_the_server_refuses_a_ray_cluster_with_a_misspelt_field(installed: Cluster) -> None:
    cluster = installed.get("RayCluster", "demo-merger-ray")
    assert cluster
    spec: dict[str, Any] = cluster["spec"] | {"autoscalerOption": {}}
    odd = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "odd"}, "spec": spec}
    assert 'unknown field "spec.autoscalerOption"' in installed.refused(*UPGRADE, values={"extraObjects": [odd]})


def test_the_server_refuses_another_selector(cluster: Cluster) -> None:
    named = ("--set", "fullnameOverride=demo-merger")
    cluster.helm(*INSTALL, *named)
    said = cluster.refused(*UPGRADE, *named, "--set", "nameOverride=other")
    assert "spec.selector" in said
    assert "field is immutable" in said


def test_an_uninstallation_leaves_what_is_to_be_kept_and_nothing_else(cluster: Cluster) -> None:
    before = {(each["kind"], each["metadata"]["name"]) for each in cluster.store.everything(NAMESPACE)}
    cluster.helm(*INSTALL)
    cluster.helm("test", "demo")
    manifest = [*cluster.store.everything(NAMESPACE)]
    keep = {
        (each["kind"], each["metadata"]["name"])
        for each in manifest
        if (each["metadata"].get("annotations") or {}).get("helm.sh/resource-policy") == "keep"
    }
    # Models are people's, and without its keys no secret of the database can be read again.
    assert keep == {("PersistentVolumeClaim", "demo-merger-models"), ("Secret", "demo-merger-keys")}
    cluster.helm("uninstall", "demo", "--wait")

    def left() -> set[tuple[str, str]]:
        return {(each["kind"], each["metadata"]["name"]) for each in cluster.store.everything(NAMESPACE)} - before

    # helm leaves hooks alone: the last test's pod, with its log, until the next one.
    assert cluster.store.until(lambda: left() == keep | {("Pod", "demo-merger-smoke")} or None, 20), left()


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_scenario_is_installed_upgraded_and_uninstalled(scenario: str, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster")
    try:
        cluster.prepare(render(scenario=scenario))
        values = ("--values", str(CHART / "ci" / f"{scenario}-values.yaml"))
        cluster.helm("install", "demo", str(CHART), *values)
        cluster.settle()
        kept = {each["metadata"]["uid"] for each in cluster.all("Pod") if each["status"]["phase"] == "Running"}
        assert kept
        cluster.helm("upgrade", "demo", str(CHART), *values)
        cluster.settle()
        still = {each["metadata"]["uid"] for each in cluster.all("Pod") if each["status"]["phase"] == "Running"}
        assert still == kept
        cluster.helm("uninstall", "demo", "--wait")
        assert cluster.all("Deployment") == []
    finally:
        cluster.close()

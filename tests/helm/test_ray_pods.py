"""Ray's pods: where they write, where they go, what they may, and what values add to them."""

from pathlib import Path
from typing import Any

import pytest

from tests.helm.chart import CHART, Object, every, find, render
from tests.helm.cluster import cluster_of, group_of, pods_of, with_group

SCENARIOS = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))
WITH_CLUSTER = [name for name in SCENARIOS if name != "external-ray"]


@pytest.mark.parametrize("scenario", WITH_CLUSTER)
def test_every_place_that_is_written_to_is_a_volume(scenario: str) -> None:
    cluster = cluster_of(scenario=scenario)
    for name, pod in pods_of(cluster).items():
        container = pod["containers"][0]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        values = {variable["name"]: variable.get("value", "") for variable in container["env"]}
        for variable in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "TMPDIR", "RAY_TMPDIR"):
            places = {values[variable], *map(str, Path(values[variable]).parents)} - {"/"}
            assert places & mounts, f"{name}: {variable}={values[variable]}"
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert all(volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if "emptyDir" in volume)
    options = cluster["spec"]["autoscalerOptions"]
    assert options["securityContext"]["readOnlyRootFilesystem"] is True
    assert {mount["name"] for mount in options["volumeMounts"]} <= {
        v["name"] for v in pods_of(cluster)["head"]["volumes"]
    }


def test_workers_may_do_nothing_in_kubernetes() -> None:
    objects = render(scenario="minimal")
    worker = pods_of(find(objects, "RayCluster"))["cpu"]
    assert worker["automountServiceAccountToken"] is False
    account = find(objects, "ServiceAccount", "-ray-worker")
    assert worker["serviceAccountName"] == account["metadata"]["name"]
    assert account["automountServiceAccountToken"] is False
    # The operator makes an account by the cluster's own name, for the head.
    assert account["metadata"]["name"] != find(objects, "RayCluster")["metadata"]["name"]
    assert every(objects, "Role") == every(objects, "ClusterRole") == every(objects, "RoleBinding") == []


def test_an_account_of_ones_own_is_used() -> None:
    annotated = render({"ray": {"serviceAccount": {"annotations": {"role": "buckets"}}}}, scenario="minimal")
    assert find(annotated, "ServiceAccount", "-ray-worker")["metadata"]["annotations"] == {"role": "buckets"}
    assert "annotations" not in find(render(scenario="minimal"), "ServiceAccount", "-ray-worker")["metadata"]
    own = render({"ray": {"serviceAccount": {"name": "ours"}}}, scenario="minimal")
    assert every(own, "ServiceAccount", "-ray-worker") == []
    assert pods_of(find(own, "RayCluster"))["cpu"]["serviceAccountName"] == "ours"


def _annotations(cluster: Object) -> dict[str, Any]:
    return group_of(cluster)["template"]["metadata"].get("annotations", {})


def test_busy_workers_are_not_evicted() -> None:
    key = "cluster-autoscaler.kubernetes.io/safe-to-evict"
    assert _annotations(cluster_of())[key] == "false"
    assert key not in _annotations(cluster_of(with_group({"safeToEvict": True})))
    assert _annotations(cluster_of(with_group({"podAnnotations": {key: "true", "a": "b"}}))) == {key: "true", "a": "b"}


def test_workers_stand_apart() -> None:
    def apart(**group: Any) -> Object:
        found: Object = pods_of(cluster_of(with_group(group)))["cpu"].get("affinity", {})
        return found.get("podAntiAffinity", found)

    [term] = apart()["preferredDuringSchedulingIgnoredDuringExecution"]
    [required] = apart(spread="required")["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["podAffinityTerm"] == required
    assert required["labelSelector"]["matchLabels"] == {
        "ray.io/cluster": "demo-merger-ray",
        "ray.io/node-type": "worker",
    }
    assert apart(spread="none") == {}
    assert apart(affinity={"nodeAffinity": {}}) == {"nodeAffinity": {}}


_PLACED: Object = {
    "priorityClassName": "batch",
    "runtimeClassName": "nvidia",
    "nodeSelector": {"disk": "fast"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}],
}


@pytest.mark.parametrize("field", _PLACED)
def test_where_pods_go(field: str) -> None:
    assert pods_of(cluster_of(with_group({field: _PLACED[field]})))["cpu"][field] == _PLACED[field]
    assert field not in pods_of(cluster_of())["cpu"]
    if field != "runtimeClassName":
        assert pods_of(cluster_of({"ray": {"head": {field: _PLACED[field]}}}))["head"][field] == _PLACED[field]
        assert field not in pods_of(cluster_of())["head"]


def test_the_heads_affinity() -> None:
    affinity = {"nodeAffinity": {}}
    assert pods_of(cluster_of({"ray": {"head": {"affinity": affinity}}}))["head"]["affinity"] == affinity
    assert "affinity" not in pods_of(cluster_of())["head"]


_EXTRA: Object = {
    "extraEnv": [{"name": "A", "value": "{{ .Release.Name }}"}],
    "extraVolumes": [{"name": "more", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "more", "mountPath": "/{{ .Release.Name }}"}],
    "extraInitContainers": [{"name": "first", "image": "{{ .Release.Name }}"}],
    "extraContainers": [{"name": "beside", "image": "{{ .Release.Name }}"}],
}


@pytest.mark.parametrize("node", ["head", "cpu"])
def test_pods_take_more(node: str) -> None:
    pod = pods_of(cluster_of({"ray": {"head": _EXTRA}} if node == "head" else with_group(_EXTRA)))[node]
    container = pod["containers"][0]
    assert container["env"][-1] == {"name": "A", "value": "demo"}
    assert container["volumeMounts"][-1]["mountPath"] == "/demo"
    assert pod["volumes"][-1]["name"] == "more"
    assert (
        [each["image"] for each in pod["initContainers"]]
        == [each["image"] for each in pod["containers"][1:]]
        == ["demo"]
    )
    plain = pods_of(cluster_of())[node]
    assert "initContainers" not in plain
    assert len(plain["containers"]) == 1


def test_variables_of_every_pod() -> None:
    values = {
        "extraEnv": [{"name": "B", "value": "1"}],
        "extraEnvFrom": [{"secretRef": {"name": "{{ .Release.Name }}"}}],
    }
    for pod in pods_of(cluster_of({"ray": values})).values():
        assert pod["containers"][0]["env"][-1]["name"] == "B"
        assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "demo"}}]
    assert all("envFrom" not in pod["containers"][0] for pod in pods_of(cluster_of()).values())


def test_what_runs_before_a_worker_ends() -> None:
    command = ["python", "-c", "pass"]
    values = with_group({"preStop": command, "terminationGracePeriodSeconds": 77})
    pod = pods_of(cluster_of(values))["cpu"]
    assert pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == command
    assert pod["terminationGracePeriodSeconds"] == 77
    assert "lifecycle" not in pods_of(cluster_of(with_group({"preStop": []})))["cpu"]["containers"][0]


def test_a_release_of_another_version_leaves_the_pods_as_they_are() -> None:
    """The operator replaces pods whose template changes, a label of the chart's version included."""
    templates = [group["template"]["metadata"]["labels"] for group in cluster_of()["spec"]["workerGroupSpecs"]]
    assert all("helm.sh/chart" not in labels and "app.kubernetes.io/version" not in labels for labels in templates)


def test_labels_and_secrets_of_pods() -> None:
    values = {
        "commonLabels": {"team": "a"},
        "image": {"pullSecrets": ["r"]},
        **with_group({"podLabels": {"tier": "b"}}),
    }
    cluster = cluster_of(values)
    labels = group_of(cluster)["template"]["metadata"]["labels"]
    assert (labels["team"], labels["tier"], labels["app.kubernetes.io/component"]) == ("a", "b", "ray")
    assert all(pod["imagePullSecrets"] == [{"name": "r"}] for pod in pods_of(cluster).values())
    assert all("imagePullSecrets" not in pod for pod in pods_of(cluster_of()).values())

"""The Ray cluster of the chart: what KubeRay takes, and what the service learns of it."""

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from tests.helm import kuberay
from tests.helm.chart import CHART, Object, Refused, every, find, render
from tests.helm.cluster import cluster_of, fixed, group_of, pods_of, settings_of, with_group

SCENARIOS = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))
WITH_CLUSTER = [name for name in SCENARIOS if name != "external-ray"]
CONSTRAINTS = (CHART.parent / "constraints.txt").read_text()

needs_crd = pytest.mark.skipif(not kuberay.CRD.exists(), reason="KubeRay's resource definition is not here")


# ---- what KubeRay takes -------------------------------------------------------------------------------


@needs_crd
@pytest.mark.parametrize("scenario", WITH_CLUSTER)
def test_the_cluster_has_only_fields_of_its_kind(scenario: str) -> None:
    kuberay.check_schema(cluster_of(scenario=scenario), kuberay.schema())


@needs_crd
@pytest.mark.parametrize("path", [("spec",), ("spec", "headGroupSpec", "template", "spec", "containers", 0)])
def test_a_misspelt_field_is_seen(path: tuple[str | int, ...]) -> None:
    cluster = copy.deepcopy(cluster_of())
    place: Any = cluster
    for part in path:
        place = place[part]
    place["enabledInTreeAutoscaling"] = True
    with pytest.raises(jsonschema.ValidationError, match="enabledInTreeAutoscaling"):
        kuberay.check_schema(cluster, kuberay.schema())


@needs_crd
@pytest.mark.parametrize("tolerance", [{"backend": "redis", "redis": {"address": "r:6379"}}, {"backend": "rocksdb"}])
def test_fault_tolerance_has_only_fields_of_its_kind(tolerance: Object) -> None:
    cluster = cluster_of({"ray": {"gcsFaultTolerance": tolerance}})
    assert cluster["spec"]["gcsFaultToleranceOptions"]["backend"] == tolerance["backend"]
    kuberay.check_schema(cluster, kuberay.schema())
    assert kuberay.problems(cluster) == []


@pytest.mark.parametrize("scenario", WITH_CLUSTER)
def test_the_operator_has_nothing_against_it(scenario: str) -> None:
    assert kuberay.problems(cluster_of(scenario=scenario)) == []


def _set(path: str, value: Any) -> Callable[[Object], None]:
    def change(cluster: Object) -> None:
        place: Any = cluster
        *parts, last = path.split(".")
        for part in parts:
            place = place[int(part)] if part.isdigit() else place.setdefault(part, {})
        place[last] = value

    return change


_HEAD, _WORKER = "spec.headGroupSpec", "spec.workerGroupSpecs.0"
_REDIS = {"backend": "redis", "redisAddress": "r:6379"}
_ROCKS = {"backend": "rocksdb", "storage": {"size": "1Gi"}}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_set("metadata.name", "a" * 54), "more than 53"),
        (_set("metadata.name", "1ray"), "no name of a Service"),
        (_set("spec.rayVersion", "2.51.0"), "2.52"),
        (_set(f"{_HEAD}.template.spec.restartPolicy", "Always"), "restartPolicy"),
        (_set(f"{_WORKER}.template.spec.restartPolicy", "OnFailure"), "restartPolicy"),
        (_set(f"{_WORKER}.suspend", True), "suspended"),
        (_set(f"{_WORKER}.rayStartParams.labels", "a=b"), "labels"),
        (_set(f"{_WORKER}.rayStartParams.num-cpus", "4"), "CPU"),
        (_set(f"{_WORKER}.rayStartParams.memory", "4"), "memory"),
        (_set(f"{_HEAD}.rayStartParams.num-cpus", "0"), "CPU"),
        (_set(f"{_WORKER}.minReplicas", 9), "above"),
        (_set(f"{_WORKER}.maxReplicas", None), "missing"),
        (_set(f"{_WORKER}.replicas", 99), "outside"),
        (_set("spec.gcsFaultToleranceOptions", {"backend": "redis"}), "no address"),
        (_set("spec.gcsFaultToleranceOptions", {**_REDIS, "storage": {"size": "1Gi"}}), "rocksdb"),
        (_set("spec.gcsFaultToleranceOptions", {"backend": "rocksdb"}), "no storage"),
        (
            _set(
                "spec.gcsFaultToleranceOptions", {"backend": "rocksdb", "redisAddress": "r", "storage": {"size": "1Gi"}}
            ),
            "beside",
        ),
        (_set("spec.authOptions.enableK8sTokenAuth", True), "exclude"),
        (_set("spec.authOptions.mode", "disabled"), "disabled"),
    ],
)
def test_what_the_operator_refuses_is_seen(change: Callable[[Object], None], told: str) -> None:
    cluster = copy.deepcopy(cluster_of())
    assert kuberay.problems(cluster) == []
    change(cluster)
    found = kuberay.problems(cluster)
    assert len(found) == 1, found
    assert told in found[0]


def test_more_of_what_the_operator_refuses_is_seen() -> None:
    cluster = copy.deepcopy(cluster_of(with_group({"priority": 1, "idleTimeoutSeconds": 9})))
    cluster["spec"]["rayVersion"] = "2.55.0"
    assert kuberay.problems(cluster) == ["priorities of groups need Ray 2.56"]
    cluster["spec"] |= {"rayVersion": "2.60.0", "autoscalerOptions": {"version": "v1"}}
    assert kuberay.problems(cluster) == ["cpu: idleTimeoutSeconds is of the autoscaler's second version"]
    cluster = copy.deepcopy(cluster_of())
    cluster["spec"]["gcsFaultToleranceOptions"] = _REDIS
    cluster["spec"]["workerGroupSpecs"] *= 2
    cluster["spec"]["headGroupSpec"]["rayStartParams"]["redis-password"] = "x"
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"].append({"name": "REDIS_PASSWORD"})
    assert len(kuberay.problems(cluster)) == 3


def test_the_longest_name_fits() -> None:
    cluster = cluster_of({"fullnameOverride": "a" * 40})
    assert cluster["metadata"]["name"] == "a" * 40 + "-ray"
    assert kuberay.problems(cluster) == []


# ---- what comes from where ----------------------------------------------------------------------------


def test_the_version_is_that_of_the_image() -> None:
    pinned = re.search(r"(?m)^ray==(.*)$", CONSTRAINTS)
    assert pinned
    assert cluster_of()["spec"]["rayVersion"] == pinned[1]


def test_all_pods_have_one_image_but_those_of_cuda() -> None:
    cluster = cluster_of(scenario="gpu")
    images = {name: pod["containers"][0]["image"] for name, pod in pods_of(cluster).items()}
    plain = find(render(scenario="gpu"), "Deployment", "-api")["spec"]["template"]["spec"]["containers"][0]["image"]
    assert images == {"head": plain, "cpu": plain, "highmem": plain, "gpu": f"{plain}-cuda"}
    assert cluster["spec"]["autoscalerOptions"]["image"] == plain


def test_a_group_has_an_image_of_its_own() -> None:
    digest = f"sha256:{'1' * 64}"
    values = {"image": {"digest": f"sha256:{'0' * 64}"}}
    image = {"repository": "team/ours", "tag": "7"}
    pods = pods_of(cluster_of({**values, **with_group({"image": image})}))
    assert pods["cpu"]["containers"][0]["image"] == "ghcr.io/team/ours:7"
    pods = pods_of(cluster_of({**values, **with_group({"cuda": True, "image": {"digest": digest}})}))
    assert pods["cpu"]["containers"][0]["image"] == f"ghcr.io/merger/merger@{digest}"
    with pytest.raises(Refused, match=re.escape("ray.groups.cpu.image.digest")):
        render({**values, **with_group({"cuda": True})}, scenario="minimal")


def test_the_head_runs_no_tasks() -> None:
    assert cluster_of()["spec"]["headGroupSpec"]["resources"] == {"CPU": "0"}


def test_ray_hands_out_what_its_own_processes_leave() -> None:
    resources = {"requests": {"cpu": "3500m"}, "limits": {"memory": "10Gi", "nvidia.com/gpu": 2}}
    group = group_of(cluster_of(with_group({"resources": resources, "rayResources": {"tier": "2"}})))
    assert group["resources"] == {"CPU": "3", "GPU": "2", "memory": str(8 * 1024**3), "tier": "2"}
    assert group["rayStartParams"] == {"object-store-memory": str(512 * 1024**2)}
    limited = {"requests": {"cpu": "1"}, "limits": {"cpu": 6, "memory": "9G"}}
    group = group_of(cluster_of({"ray": {"reservedMemory": "1.5G", "groups": {"cpu": {"resources": limited}}}}))
    assert group["resources"] == {"CPU": "6", "memory": "7500000000"}


@pytest.mark.parametrize("autoscaling", [True, False])
def test_numbers_of_workers(autoscaling: bool) -> None:
    values = {"ray": {"autoscaling": {"enabled": autoscaling}, "groups": {"cpu": {"minReplicas": 2, "maxReplicas": 5}}}}
    cluster = cluster_of(values)
    group = group_of(cluster)
    numbers = (group["minReplicas"], group["maxReplicas"], group.get("replicas"))
    # Where the autoscaler decides, an upgrade does not set it back.
    assert numbers == ((2, 5, None) if autoscaling else (2, 2, 2))
    assert cluster["spec"]["enableInTreeAutoscaling"] is autoscaling
    assert ("autoscalerOptions" in cluster["spec"]) is autoscaling
    head = pods_of(cluster)["head"]
    assert head["automountServiceAccountToken"] is autoscaling
    assert head.get("serviceAccountName") == (None if autoscaling else "demo-merger-ray-worker")
    assert kuberay.problems(cluster) == []


def test_the_autoscaler_is_told_which_it_is() -> None:
    options = cluster_of({"ray": {"autoscaling": {"idleTimeoutSeconds": 7}}})["spec"]["autoscalerOptions"]
    assert (options["version"], options["idleTimeoutSeconds"]) == ("v2", 7)
    own = cluster_of(with_group({"idleTimeoutSeconds": 9, "priority": 3, "labels": {"tier": "fast"}}))
    assert [group_of(own)[key] for key in ("idleTimeoutSeconds", "priority", "labels")] == [9, 3, {"tier": "fast"}]
    without = group_of(cluster_of({"ray": fixed(priority=3, idleTimeoutSeconds=9)}))
    assert {"idleTimeoutSeconds", "priority", "labels"} & without.keys() == set()


def test_groups_come_and_go() -> None:
    groups = {"cpu": None, "old": {"enabled": False}, "big": {"minReplicas": 1}}
    assert list(pods_of(cluster_of({"ray": {"groups": groups}}))) == ["head", "big"]


def test_defaults_of_groups_lie_below_their_own_values() -> None:
    values = {
        "ray": {
            "groupDefaults": {"maxReplicas": 9, "resources": {"limits": {"memory": "32Gi"}}},
            "groups": {"cpu": {"resources": {"requests": {"cpu": "2"}}}},
        }
    }
    group = group_of(cluster_of(values))
    resources = pods_of(cluster_of(values))["cpu"]["containers"][0]["resources"]
    assert group["maxReplicas"] == 9
    assert resources == {"requests": {"cpu": "2", "memory": "16Gi"}, "limits": {"memory": "32Gi"}}


# ---- what the service learns --------------------------------------------------------------------------


def test_the_service_knows_what_nodes_may_come() -> None:
    shapes = json.loads(settings_of(scenario="gpu")["MERGER_NODE_SHAPES"])
    assert sorted((shape["cpus"], shape["gpus"], shape["memory"] >> 30) for shape in shapes) == [
        (4, 0, 14),
        (8, 1, 62),
        (16, 0, 254),
    ]
    cluster = cluster_of(scenario="gpu")
    assert sorted(shape["count"] for shape in shapes) == [2, 2, 8]
    told = [
        (str(shape["cpus"]), str(shape["memory"]), str(shape["gpus"]) if shape["gpus"] else None) for shape in shapes
    ]
    given = [each["resources"] for each in cluster["spec"]["workerGroupSpecs"]]
    assert sorted(told, key=str) == sorted(((r["CPU"], r["memory"], r.get("GPU")) for r in given), key=str)


def test_without_an_autoscaler_only_living_nodes_count() -> None:
    assert "MERGER_NODE_SHAPES" not in settings_of({"ray": {"autoscaling": {"enabled": False}}})
    assert "MERGER_NODE_SHAPES" not in settings_of(scenario="external-ray")


def test_a_group_that_may_have_no_workers_has_no_shape() -> None:
    values = with_group({"maxReplicas": 0}, "none")
    assert len(json.loads(settings_of(values)["MERGER_NODE_SHAPES"])) == 1


def test_the_service_calls_the_head() -> None:
    cluster = cluster_of()["metadata"]["name"]
    assert settings_of()["MERGER_RAY_URL"] == f"http://{cluster}-head-svc:8265"
    assert settings_of(scenario="external-ray")["MERGER_RAY_URL"] == "http://shared-head-svc.ray.svc:8265"


# ---- the token ----------------------------------------------------------------------------------------


def _token_of(component: str, objects: list[Object]) -> Any:
    [container] = find(objects, "Deployment", component)["spec"]["template"]["spec"]["containers"]
    variables = {variable["name"]: variable for variable in container["env"]}
    return variables.get("MERGER_RAY_TOKEN", {}).get("valueFrom", {}).get("secretKeyRef")


def _modes(cluster: Object) -> set[str | None]:
    """RAY_AUTH_MODE in every container of the cluster."""
    containers = [pod["containers"][0] for pod in pods_of(cluster).values()]
    containers += [cluster["spec"].get("autoscalerOptions", {"env": []})]
    named = [{variable["name"]: variable.get("value") for variable in each["env"]} for each in containers]
    return {variables.get("RAY_AUTH_MODE") for variables in named}


def test_a_token_is_made_and_both_sides_have_it() -> None:
    objects = render(scenario="minimal")
    secret = find(objects, "Secret", "-ray-token")
    assert len(secret["data"]["auth_token"]) == 64
    options = find(objects, "RayCluster")["spec"]["authOptions"]
    assert options == {"mode": "token", "secretName": secret["metadata"]["name"]}
    assert _token_of("-api", objects) == {"name": secret["metadata"]["name"], "key": "auth_token"}
    assert _token_of("-dispatcher", objects) == _token_of("-api", objects)
    assert _modes(find(objects, "RayCluster")) == {None}  # the operator adds mode and token


def test_a_token_of_ones_own_is_used() -> None:
    objects = render({"ray": {"auth": {"existingSecret": "ours"}}}, scenario="minimal")
    assert every(objects, "Secret", "-ray-token") == []
    assert find(objects, "RayCluster")["spec"]["authOptions"]["secretName"] == "ours"
    assert _token_of("-api", objects) == {"name": "ours", "key": "auth_token"}


def test_without_a_token_every_process_is_told_so() -> None:
    objects = render({"ray": {"auth": {"enabled": False}}}, scenario="minimal")
    assert every(objects, "Secret", "-ray-token") == []
    assert find(objects, "RayCluster")["spec"]["authOptions"] == {"mode": "disabled"}
    assert _modes(find(objects, "RayCluster")) == {"disabled"}
    assert _token_of("-api", objects) is None


def test_an_external_cluster_is_used_with_its_token() -> None:
    objects = render(scenario="external-ray")
    assert every(objects, "RayCluster") == []
    assert every(objects, "ServiceAccount", "-ray-worker") == every(objects, "Secret", "-ray-token") == []
    assert _token_of("-dispatcher", objects) == {"name": "shared-ray-token", "key": "auth_token"}
    values = {"ray": {"external": {"url": "http://ray:8265"}, "auth": {"enabled": False}}}
    assert _token_of("-dispatcher", render(values, scenario="minimal")) is None


# ---- upgrades, fault tolerance ------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["Recreate", "None"])
def test_what_an_upgrade_does(strategy: str) -> None:
    assert cluster_of({"ray": {"upgradeStrategy": strategy}})["spec"]["upgradeStrategy"] == {"type": strategy}


def test_fault_tolerance() -> None:
    def options(**tolerance: Any) -> Any:
        return cluster_of({"ray": {"gcsFaultTolerance": tolerance}})["spec"].get("gcsFaultToleranceOptions")

    assert options() is None
    redis = {"address": "r:6379"}
    assert options(backend="redis", redis=redis) == {"backend": "redis", "redisAddress": "r:6379"}
    secret = options(backend="redis", redis={**redis, "existingSecret": "s", "usernameKey": "user"})
    assert secret["redisPassword"]["valueFrom"]["secretKeyRef"] == {"name": "s", "key": "redis-password"}
    assert secret["redisUsername"]["valueFrom"]["secretKeyRef"] == {"name": "s", "key": "user"}
    assert "redisUsername" not in options(backend="redis", redis={**redis, "existingSecret": "s"})
    made = {"size": "10Gi", "deletionPolicy": "DeleteWithCluster"}
    assert options(backend="rocksdb")["storage"] == made
    assert options(backend="rocksdb", storage={"storageClassName": "f"})["storage"] == {**made, "storageClassName": "f"}
    assert options(backend="rocksdb", storage={"existingClaim": "c"})["storage"] == {"claimName": "c"}


# ---- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"ray": {"external": {"url": "http://ray:8265"}}}, "ray.auth.existingSecret"),
        ({"ray": {"groups": {"cpu": None}}}, "no group of workers"),
        ({"ray": {"groups": {"cpu": {"enabled": False}}}}, "no group of workers"),
        (with_group({}, "Big_Memory"), "no name of a group"),
        (with_group({"minReplicas": 5, "maxReplicas": 4}), "above maxReplicas"),
        (with_group({"minReplicas": 0, "maxReplicas": 0}), "no group may have a worker"),
        (
            {"ray": {"autoscaling": {"enabled": False}, "groups": {"cpu": {"minReplicas": 0}}}},
            "no group may have a worker",
        ),
        ({"ray": {"groupDefaults": {"resources": {"limits": None}}}}, "a memory limit"),
        ({"ray": {"groupDefaults": {"resources": {"requests": {"cpu": None}}}}}, "a cpu request"),
        (with_group({"resources": {"limits": {"memory": "2Gi"}}}), "less than 1Gi"),
        (with_group({"resources": {"limits": {"memory": "much"}}}), "no quantity of memory"),
        ({"ray": {"objectStoreMemory": "2Gi"}}, "must be larger"),
        ({"ray": {"gcsFaultTolerance": {"backend": "redis"}}}, "redis.address"),
        ({"ray": {"upgradeStrategy": "Rolling"}}, "upgradeStrategy"),
        ({"ray": {"workers": 3}}, "workers"),
        (with_group({"replicas": 3}), "replicas"),
        (with_group({"rayResources": {"CPU": "3"}}), "rayResources"),
    ],
)
def test_what_cannot_work_is_refused(values: Object, told: str) -> None:
    with pytest.raises(Refused, match=re.escape(told)):
        render(values, scenario="minimal")


def test_a_cluster_without_the_operator_is_refused() -> None:
    with pytest.raises(Refused, match=r"install the KubeRay operator, 1\.7 or newer"):
        render(scenario="minimal", capabilities=())
    assert every(render({"ray": {"skipCRDCheck": True}}, scenario="minimal", capabilities=()), "RayCluster")
    assert every(render(scenario="external-ray", capabilities=()), "Deployment")

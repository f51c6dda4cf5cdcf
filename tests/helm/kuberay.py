"""KubeRay's rules for a RayCluster that no schema says, as its operator 1.7 checks them, and the schema of its resource
made strict. Knows custom resources; knows nothing of our chart.
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

CRD = Path(__file__).parents[3] / "shared/reference/kuberay-crd-1.7.0/ray.io_rayclusters.yaml"

Object = dict[str, Any]

_PARAMS = {"CPU": "num-cpus", "GPU": "num-gpus", "memory": "memory"}
_LONGEST = 53


# ---- the schema ---------------------------------------------------------------------------------------


@functools.cache
def schema(crd: Path = CRD) -> Object:
    """The schema of RayClusters in version v1, which refuses fields that it does not name."""
    versions = yaml.safe_load(crd.read_text())["spec"]["versions"]
    found = next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"]
    strict = _strict(found)
    strict["properties"]["metadata"] = {"type": "object"}
    return strict


def _strict(node: Any) -> Any:
    if isinstance(node, list):
        return [_strict(each) for each in node]
    if not isinstance(node, dict):
        return node
    made = {key: _strict(value) for key, value in node.items()}
    if "properties" in made and isinstance(made["properties"], dict):
        made.setdefault("additionalProperties", bool(made.get("x-kubernetes-preserve-unknown-fields")))
    if made.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    return made


def check_schema(cluster: Object, strict: Object) -> None:
    """Raises jsonschema.ValidationError."""
    jsonschema.Draft7Validator(strict).validate(cluster)


# ---- the rules ----------------------------------------------------------------------------------------


def problems(cluster: Object) -> list[str]:
    """What the operator would refuse; nothing where it would take the cluster."""
    spec = cluster["spec"]
    groups = [("head", spec["headGroupSpec"]), *((group["groupName"], group) for group in spec["workerGroupSpecs"])]
    found = [*_name(cluster["metadata"]["name"]), *_versions(spec), *_autoscaler(spec, groups)]
    for name, group in groups:
        found += _resources(name, group)
    names = [group["groupName"] for group in spec["workerGroupSpecs"]]
    found += [f"two groups are named {name}" for name in sorted(set(names)) if names.count(name) > 1]
    return [*found, *_replicas(spec), *_tolerance(spec, groups), *_auth(spec)]


def _name(name: str) -> Iterator[str]:
    if len(name) > _LONGEST:
        yield f"the name {name} has more than {_LONGEST} characters"
    if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"the name {name} is no name of a Service"


def _version(spec: Object) -> tuple[int, ...]:
    return tuple(int(part) for part in spec.get("rayVersion", "0").split(".")[:2])


def _versions(spec: Object) -> Iterator[str]:
    if spec.get("authOptions", {}).get("mode") == "token" and _version(spec) < (2, 52):
        yield "tokens need Ray 2.52"
    if any("priority" in group for group in spec["workerGroupSpecs"]) and _version(spec) < (2, 56):
        yield "priorities of groups need Ray 2.56"


def _autoscaler(spec: Object, groups: list[tuple[str, Object]]) -> Iterator[str]:
    options = spec.get("autoscalerOptions", {})
    second = spec.get("enableInTreeAutoscaling") and options.get("version", "v2") == "v2"
    for name, group in groups:
        if second and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield f"{name}: the autoscaler's second version takes no restartPolicy but Never"
        if "idleTimeoutSeconds" in group and not second:
            yield f"{name}: idleTimeoutSeconds is of the autoscaler's second version"
        if group.get("suspend") and spec.get("enableInTreeAutoscaling"):
            yield f"{name}: a group cannot be suspended while there is an autoscaler"


def _resources(name: str, group: Object) -> Iterator[str]:
    params, resources = group.get("rayStartParams", {}), group.get("resources", {})
    if "labels" in params:
        yield f"{name}: labels are no start parameter"
    for key in resources:
        if _PARAMS.get(key, "resources") in params:
            yield f"{name}: {key} stands in resources and in the start parameters"


def _replicas(spec: Object) -> Iterator[str]:
    for group in spec["workerGroupSpecs"]:
        name, least, most = group["groupName"], group.get("minReplicas"), group.get("maxReplicas")
        if least is None or most is None:
            yield f"{name}: the numbers of workers are missing"
        elif least > most:
            yield f"{name}: minReplicas is above maxReplicas"
        elif not least <= group.get("replicas", least) <= most:
            yield f"{name}: replicas is outside of minReplicas and maxReplicas"


def _tolerance(spec: Object, groups: list[tuple[str, Object]]) -> Iterator[str]:
    options = spec.get("gcsFaultToleranceOptions")
    if options is None:
        return
    containers = groups[0][1]["template"]["spec"]["containers"]
    names = {variable["name"] for variable in containers[0].get("env", [])}
    for name in sorted(names & {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"}):
        yield f"{name} is set beside the options of fault tolerance"
    if "redis-password" in groups[0][1].get("rayStartParams", {}):
        yield "redis-password is set beside the options of fault tolerance"
    backend = options.get("backend", "redis")
    if backend == "redis" and not options.get("redisAddress"):
        yield "redis has no address"
    if backend == "redis" and "storage" in options:
        yield "storage is of the backend rocksdb"
    if backend == "rocksdb" and any(key.startswith("redis") for key in options):
        yield "an address or password of redis beside the backend rocksdb"
    if backend == "rocksdb" and not {"size", "claimName"} & options.get("storage", {}).keys():
        yield "rocksdb has no storage"


def _auth(spec: Object) -> Iterator[str]:
    options = spec.get("authOptions", {})
    if options.get("enableK8sTokenAuth") and options.get("secretName"):
        yield "tokens of Kubernetes and a Secret exclude each other"
    if options.get("mode") == "disabled" and options.get("secretName"):
        yield "a Secret is named where tokens are disabled"

"""What Kubernetes refuses beyond the form: names, selectors, references inside one object, fields that never change.

Knows one object and the state before it; knows nothing of other objects.
"""

import base64
import binascii
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Object = Mapping[str, Any]
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SERVICE = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9])?")
_PORT = re.compile(r"(?=.*[a-z])[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?")
_UNITS = {"m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
# Names of these become names of hosts or values of labels, so they are short and without dots.
_NAMES = {"Service": _SERVICE, "Namespace": _LABEL, "RayCluster": _SERVICE, "StatefulSet": _LABEL, "Job": _LABEL}
_FREE_IN_STATEFUL_SETS = {
    "replicas",
    "template",
    "updateStrategy",
    "ordinals",
    "persistentVolumeClaimRetentionPolicy",
    "minReadySeconds",
}


def quantity(text: str | int) -> float:
    """A quantity in units: `500m` is 0.5, `1Ki` is 1024."""
    number, unit = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text)).groups()  # type: ignore[union-attr]  # the form was checked
    return float(number) * _UNITS[unit]


def faults(thing: Object) -> Iterator[str]:
    """What is wrong with an object by itself."""
    yield from _metadata_faults(thing)
    yield from {"Secret": _secret_faults, "PodDisruptionBudget": _budget_faults}.get(thing["kind"], _none)(thing)
    for path, template in pod_templates(thing):
        yield from _template_faults(thing, path, template)


def _none(thing: Object) -> Iterator[str]:
    return iter(())


def _metadata_faults(thing: Object) -> Iterator[str]:
    meta = thing["metadata"]
    if not _NAMES.get(thing["kind"], _SUBDOMAIN).fullmatch(meta["name"]):
        yield f'metadata.name: Invalid value: "{meta["name"]}"'
    for value in (meta.get("labels") or {}).values():
        if not _VALUE.fullmatch(value):
            yield f'metadata.labels: Invalid value: "{value}": must be 63 characters or less'


def _secret_faults(thing: Object) -> Iterator[str]:
    for key, value in (thing.get("data") or {}).items():
        try:
            base64.b64decode(value or "", validate=True)
        except binascii.Error:
            yield f"data[{key}]: illegal base64 data"


def _budget_faults(thing: Object) -> Iterator[str]:
    if {"minAvailable", "maxUnavailable"} <= set(thing["spec"]):
        yield "spec: Invalid value: minAvailable and maxUnavailable cannot be both set"


def pod_templates(thing: Object) -> Iterator[tuple[str, Object]]:
    """Where pods are described in an object."""
    spec = thing.get("spec") or {}
    if thing["kind"] == "Pod":
        yield "", thing
    elif thing["kind"] == "RayCluster":
        yield "spec.headGroupSpec.template.", spec["headGroupSpec"]["template"]
        for i, group in enumerate(spec.get("workerGroupSpecs") or []):
            yield f"spec.workerGroupSpecs[{i}].template.", group["template"]
    elif isinstance(spec.get("template"), dict) and "spec" in spec["template"]:
        yield "spec.template.", spec["template"]


def _template_faults(thing: Object, path: str, template: Object) -> Iterator[str]:
    labels = (template.get("metadata") or {}).get("labels") or {}
    wanted = (thing["spec"].get("selector") or {}).get("matchLabels") if thing["kind"] != "Pod" else None
    if wanted and not set(wanted.items()) <= set(labels.items()):
        yield f"{path}metadata.labels: Invalid value: `selector` does not match template `labels`"
    policy = template["spec"].get("restartPolicy", "Always")
    allowed = {"Job": ("Never", "OnFailure"), "Deployment": ("Always",), "StatefulSet": ("Always",)}
    if policy not in allowed.get(thing["kind"], (policy,)):
        yield f'{path}spec.restartPolicy: Unsupported value: "{policy}"'
    claims = [each["metadata"]["name"] for each in thing["spec"].get("volumeClaimTemplates") or []]
    yield from (f"{path}spec.{fault}" for fault in _pod_faults(template["spec"], claims))


def _pod_faults(spec: Object, claims: list[str]) -> Iterator[str]:
    volumes = [*claims, *(each["name"] for each in spec.get("volumes") or [])]
    containers = [*(spec.get("initContainers") or []), *spec["containers"]]
    for name in {each for each in volumes if volumes.count(each) > 1}:
        yield f'volumes: Duplicate value: "{name}"'
    names = [each["name"] for each in containers]
    for name in {each for each in names if names.count(each) > 1}:
        yield f'containers: Duplicate value: "{name}"'
    for container in containers:
        yield from (f"containers[{container['name']}].{fault}" for fault in _container_faults(container, volumes))


def _container_faults(container: Object, volumes: list[str]) -> Iterator[str]:
    paths = [mount["mountPath"] for mount in container.get("volumeMounts") or []]
    for mount in container.get("volumeMounts") or []:
        if mount["name"] not in volumes:
            yield f'volumeMounts.name: Not found: "{mount["name"]}"'
        if paths.count(mount["mountPath"]) > 1:
            yield f'volumeMounts.mountPath: Invalid value: "{mount["mountPath"]}": must be unique'
    for port in container.get("ports") or []:
        if not _PORT.fullmatch(port.get("name", "port")):
            yield f'ports.name: Invalid value: "{port["name"]}"'
    for variable in container.get("env") or []:
        if variable.get("value") and variable.get("valueFrom"):
            yield f"env[{variable['name']}].valueFrom: may not be specified when `value` is not empty"
    limits = (container.get("resources") or {}).get("limits") or {}
    for name, asked in ((container.get("resources") or {}).get("requests") or {}).items():
        if name in limits and quantity(asked) > quantity(limits[name]):
            yield f'resources.requests: Invalid value: "{asked}": must be less than or equal to {name} limit'


def changes(old: Object, new: Object) -> Iterator[str]:
    """What may not change in an object that exists."""
    for path in _NEVER.get(new["kind"], ()):
        if _at(old, path) != _at(new, path):
            yield f"{path}: Invalid value: {_at(new, path)!r}: field is immutable"
    yield from _MORE.get(new["kind"], lambda old, new: iter(()))(old, new)


def _at(thing: Any, path: str) -> Any:
    for part in path.split("."):
        thing = (thing or {}).get(part)
    return thing


def _stateful_set_changes(old: Object, new: Object) -> Iterator[str]:
    fixed = (set(old["spec"]) | set(new["spec"])) - _FREE_IN_STATEFUL_SETS
    if any(old["spec"].get(field) != new["spec"].get(field) for field in fixed):
        free = ", ".join(f"'{each}'" for each in sorted(_FREE_IN_STATEFUL_SETS))
        yield f"spec: Forbidden: updates to statefulset spec for fields other than {free} are forbidden"


def _claim_changes(old: Object, new: Object) -> Iterator[str]:
    def fixed(thing: Object) -> dict[str, Any]:
        return {key: value for key, value in thing["spec"].items() if key not in ("resources", "volumeName")}

    if fixed(old) != fixed(new):
        yield "spec: Forbidden: spec is immutable after creation except resources.requests for bound claims"
    if quantity(_at(new, "spec.resources.requests.storage")) < quantity(_at(old, "spec.resources.requests.storage")):
        yield "spec.resources.requests.storage: Forbidden: field can not be less than status.capacity"


def _frozen_changes(old: Object, new: Object) -> Iterator[str]:
    if old.get("immutable") and (old.get("data"), True) != (new.get("data"), new.get("immutable")):
        yield "data: Forbidden: field is immutable when `immutable` is set"


_NEVER = {
    "Deployment": ("spec.selector",),
    "ReplicaSet": ("spec.selector",),
    "Job": ("spec.selector", "spec.template", "spec.completions", "spec.completionMode"),
    "Service": ("spec.clusterIP",),
    "Secret": ("type",),
    "RoleBinding": ("roleRef",),
    "RayCluster": ("spec.gcsFaultToleranceOptions.backend", "spec.managedBy"),
    "Pod": ("spec.containers", "spec.volumes"),
}
_MORE: Mapping[str, Callable[[Object, Object], Iterator[str]]] = {
    "StatefulSet": _stateful_set_changes,
    "PersistentVolumeClaim": _claim_changes,
    "Secret": _frozen_changes,
    "ConfigMap": _frozen_changes,
}

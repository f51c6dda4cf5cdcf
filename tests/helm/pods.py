"""What a pod is without being run: its phase, what it lacks; and a node that runs nothing. Knows no processes."""

from collections.abc import Iterator
from typing import Any

from tests.helm.api_server.store import Object, Store

_VOLUMES = (
    ("configMap", "ConfigMap", "name"),
    ("secret", "Secret", "secretName"),
    ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
)


def phase(pod: Object) -> str:
    return str((pod.get("status") or {}).get("phase", "Pending"))


def is_ready(pod: Object) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    ready = any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)
    return ready and not pod["metadata"].get("deletionTimestamp")


def missing(store: Store, pod: Object) -> Iterator[str]:
    """What a pod refers to that is not there: it would wait for it for ever."""
    namespace, spec = pod["metadata"]["namespace"], pod["spec"]
    for volume in spec.get("volumes") or []:
        for field, kind, key in _VOLUMES:
            source = volume.get(field) or {}
            if source and not source.get("optional") and not store.get(kind, namespace, source[key]):
                yield f'{kind.lower()} "{source[key]}" not found'
    for container in [*(spec.get("initContainers") or []), *spec["containers"]]:
        for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
            for source in container.get("envFrom") or []:
                if field in source and not source[field].get("optional"):
                    yield from _missing_key(store, kind, namespace, source[field]["name"], None)
        for variable in container.get("env") or []:
            for field, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
                reference = (variable.get("valueFrom") or {}).get(field)
                if reference and not reference.get("optional"):
                    yield from _missing_key(store, kind, namespace, reference["name"], reference["key"])


def _missing_key(store: Store, kind: str, namespace: str, name: str, key: str | None) -> Iterator[str]:
    found = store.get(kind, namespace, name)
    if found is None:
        yield f'{kind.lower()} "{name}" not found'
    elif key is not None and key not in (found.get("data") or {}):
        yield f"couldn't find key {key} in {kind} {namespace}/{name}"


class PretendedNode:
    """A pod is ready at once, or ends as `outcomes` says of its component, if all that it names is there."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.outcomes: dict[str, str] = {}
        self.ended: list[Object] = []

    def start(self, pod: Object) -> None:
        if lacks := [*missing(self._store, pod)]:
            waiting = {"reason": "CreateContainerConfigError", "message": "; ".join(lacks)}
            self._write(pod, phase="Pending", containerStatuses=[{"state": {"waiting": waiting}}])
        elif pod["spec"].get("restartPolicy", "Always") == "Always" or "ray.io/cluster" in str(pod["metadata"]):
            self._write(pod, phase="Running", conditions=[{"type": "Ready", "status": self._outcome(pod, "True")}])
        else:
            self.ended.append(pod)
            self._write(pod, phase=self._outcome(pod, "Succeeded"))

    def stop(self, pod: Object) -> None:
        self._store.remove("Pod", pod["metadata"]["namespace"], pod["metadata"]["name"])

    def _outcome(self, pod: Object, usual: str) -> str:
        return self.outcomes.get((pod["metadata"].get("labels") or {}).get("app.kubernetes.io/component", ""), usual)

    def _write(self, pod: Object, **status: Any) -> None:
        meta = pod["metadata"]
        self._store.change("Pod", meta["namespace"], meta["name"], lambda each: each.update(status=status))

"""What happens to an object before it is stored: defaults, then every refusal. Knows the store; knows no HTTP."""

import base64
import copy
import hashlib
import secrets
from typing import Any

from tests.helm.api_server import rules, schemas
from tests.helm.api_server.kinds import Kind
from tests.helm.api_server.patches import StrategicMerge, merged
from tests.helm.api_server.store import Object, Store


class Refusal(Exception):
    """The server's answer to a request that it will not do."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason, self.message = code, reason, message

    @property
    def status(self) -> Object:
        head: Object = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
        return head | {"message": self.message, "reason": self.reason, "code": self.code}


def address_of(store: Store, namespace: str, name: str) -> str:
    """The address of a Service, on loopback: it follows from the name, so that it is known before the Service is."""
    digest = hashlib.sha256(f"{namespace}/{name}".encode()).digest()
    return f"127.{store.networks[0]}.{digest[0]}.{1 + digest[1] % 254}"


class Admission:
    """Creates, changes and deletes objects as a server of one Kubernetes version would."""

    def __init__(self, store: Store, version: str) -> None:
        self._store, self.version = store, version

    def create(self, kind: Kind, namespace: str, thing: Object, dry: bool = False) -> Object:
        thing = copy.deepcopy(thing)
        meta = thing.setdefault("metadata", {})
        if kind.namespaced:
            meta["namespace"] = namespace
            self._demand_namespace(namespace)
        if "name" not in meta:
            meta["name"] = meta["generateName"] + secrets.token_hex(3)
        if self._store.get(kind.name, meta.get("namespace", ""), meta["name"]):
            raise Refusal(409, "AlreadyExists", f'{kind.plural} "{meta["name"]}" already exists')
        self._check(kind, thing)
        self._fill(kind, thing)
        if kind.name == "Namespace" and not dry:
            account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
            self._store.add(account | {"metadata": {"name": "default", "namespace": meta["name"]}})
        return thing if dry else self._store.add(thing)

    def patch(self, kind: Kind, old: Object, patch: Any, type: str, dry: bool = False) -> Object:
        if "strategic" in type:
            merge = StrategicMerge(schemas.definitions(self.version)["$defs"])
            new = merge(copy.deepcopy(old), patch, schemas.schema_of(kind, self.version))
        else:
            new = merged(copy.deepcopy(old), patch)
        return self.replace(kind, old, new, dry)

    def replace(self, kind: Kind, old: Object, new: Object, dry: bool = False) -> Object:
        new = copy.deepcopy(new)
        if kind.namespaced:
            new["metadata"]["namespace"] = old["metadata"]["namespace"]
        self._check(kind, new)
        self._fill(kind, new, old)
        if found := [*rules.changes(old, new)]:
            raise self._invalid(kind, new, found)
        return new if dry else self._store.replace(new)

    def delete(self, kind: Kind, thing: Object, grace: int | None = None) -> None:
        """Remove an object. A pod that a node has goes when the node says so."""
        name, namespace = thing["metadata"]["name"], thing["metadata"].get("namespace", "")
        if kind.name == "Pod" and thing["spec"].get("nodeName") and grace != 0:
            self._store.change("Pod", namespace, name, lambda pod: pod["metadata"].update(deletionTimestamp="now"))
        else:
            self._store.remove(kind.name, namespace, name)
        if kind.name == "Namespace":
            for each in self._store.everything(name):
                self._store.remove(each["kind"], name, each["metadata"]["name"])

    def _demand_namespace(self, namespace: str) -> None:
        if not self._store.get("Namespace", "", namespace):
            raise Refusal(404, "NotFound", f'namespaces "{namespace}" not found')

    def _check(self, kind: Kind, thing: Object) -> None:
        if found := [*schemas.faults(thing, kind, self.version)]:
            unknown = "; ".join(found)
            message = f'{kind.name} in version "{kind.version}" cannot be handled as a {kind.name}: {unknown}'
            raise Refusal(400, "BadRequest", message)
        if found := [*rules.faults(thing)]:
            raise self._invalid(kind, thing, found)
        if kind.name == "Pod":
            account = thing["spec"].get("serviceAccountName", "default")
            if not self._store.get("ServiceAccount", thing["metadata"]["namespace"], account):
                name = thing["metadata"]["name"]
                message = f'pods "{name}" is forbidden: error looking up service account: "{account}" not found'
                raise Refusal(403, "Forbidden", message)

    def _invalid(self, kind: Kind, thing: Object, found: list[str]) -> Refusal:
        message = f'{kind.full_name} "{thing["metadata"]["name"]}" is invalid: {"; ".join(found)}'
        return Refusal(422, "Invalid", message)

    def _fill(self, kind: Kind, thing: Object, old: Object | None = None) -> None:
        """Set what a server sets where the request is silent."""
        thing["apiVersion"] = kind.api_version
        spec = thing.get("spec", {})
        if kind.name in ("Deployment", "StatefulSet", "ReplicaSet"):
            spec.setdefault("replicas", 1)
        if kind.name == "Deployment":
            strategy = spec.setdefault("strategy", {})
            if strategy.setdefault("type", "RollingUpdate") == "RollingUpdate":
                limits = strategy.setdefault("rollingUpdate", {})
                limits.setdefault("maxSurge", "25%")
                limits.setdefault("maxUnavailable", "25%")
        if kind.name == "StatefulSet":
            spec.setdefault("updateStrategy", {"type": "RollingUpdate", "rollingUpdate": {"partition": 0}})
        if kind.name == "Service" and "clusterIP" not in spec:
            before = (old or {}).get("spec", {}).get("clusterIP")
            spec["clusterIP"] = before or address_of(
                self._store, thing["metadata"]["namespace"], thing["metadata"]["name"]
            )
        if kind.name == "Secret":
            text = thing.pop("stringData", None) or {}
            coded = {key: base64.b64encode(value.encode()).decode() for key, value in text.items()}
            thing["data"] = (thing.get("data") or {}) | coded
            thing.setdefault("type", "Opaque")

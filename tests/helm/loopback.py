"""A loopback cluster and the real helm in it. Knows how both are started and stopped; knows nothing of the chart."""

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.helm import ray_pods
from tests.helm.api_server import ApiServer
from tests.helm.api_server.admission import Admission
from tests.helm.api_server.kinds import BY_NAME
from tests.helm.api_server.store import Object, Store
from tests.helm.chart import HELM
from tests.helm.controllers import Controllers, Node
from tests.helm.pods import PretendedNode, is_ready

NAMESPACE = "models"
# What helm and its plug-ins would read of this machine's own clusters.
_FOREIGN = ("KUBE", "HELM")


class Cluster:
    """An API server, controllers and a node, until `close`. Its helm knows no other cluster."""

    def __init__(self, folder: Path, node: Callable[[Store], Node] = PretendedNode, version: str = "1.34") -> None:
        self.folder = folder
        self.server = ApiServer(version)
        self.store: Store = self.server.store
        self.admission: Admission = self.server.admission
        self.node: Any = node(self.store)
        self.controllers = Controllers(self.store, self.admission, self.node)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "kubeconfig").write_text(yaml.safe_dump(self._kubeconfig()))

    def _kubeconfig(self) -> Object:
        context = {"name": "loopback", "context": {"cluster": "loopback", "user": "nobody", "namespace": NAMESPACE}}
        clusters = [{"name": "loopback", "cluster": {"server": self.server.url}}]
        head = {"apiVersion": "v1", "kind": "Config", "current-context": "loopback", "clusters": clusters}
        return head | {"contexts": [context], "users": [{"name": "nobody", "user": {}}]}

    def run(self, *arguments: str, values: Mapping[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
        """helm with arguments (and values in a file), whatever it says."""
        own = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
        own |= {"HOME": str(self.folder), "KUBECONFIG": str(self.folder / "kubeconfig")}
        own |= {"HELM_QPS": "1000", "HELM_BURST_LIMIT": "1000"}  # it need not spare this server
        command = [str(HELM), *arguments, "--namespace", NAMESPACE]
        if values is not None:
            path = self.folder / "values.yaml"
            path.write_text(yaml.safe_dump(dict(values)))
            command += ["--values", str(path)]
        done = subprocess.run(command, env=own, check=False, capture_output=True, text=True, timeout=300)
        if self.controllers.failure:
            raise self.controllers.failure
        return done

    def helm(self, *arguments: str, values: Mapping[str, Any] | None = None) -> str:
        """What helm prints. It has to succeed."""
        done = self.run(*arguments, values=values)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def refused(self, *arguments: str, values: Mapping[str, Any] | None = None) -> str:
        """What helm says when it fails. It has to fail."""
        done = self.run(*arguments, values=values)
        assert done.returncode, done.stdout
        return done.stderr

    def get(self, kind: str, name: str) -> Object | None:
        return self.store.get(kind, NAMESPACE, name)

    def all(self, kind: str) -> list[Object]:
        return self.store.all(kind, NAMESPACE)

    def close(self) -> None:
        self.server.close()
        self.controllers.join()

    def put(self, kind: str, name: str, namespace: str = NAMESPACE, **fields: Any) -> Object:
        """An object that somebody made before the chart came."""
        self._demand_namespace(namespace)
        return self.admission.create(BY_NAME[kind], namespace, _bare(kind, name) | fields)

    def _demand_namespace(self, name: str = NAMESPACE) -> None:
        if not self.store.get("Namespace", "", name):
            self.admission.create(BY_NAME["Namespace"], "", _bare("Namespace", name))

    def settle(self, seconds: float = 60) -> None:
        """Wait until every Deployment and every Ray cluster has the pods that it wants, ready, and none else."""
        assert self.store.until(lambda: not self.waits_for(), seconds), self.waits_for()

    def waits_for(self) -> list[str]:
        """What is not as it should become."""
        found = [each["metadata"]["name"] for each in self.all("Deployment") if not _rolled_out(each)]
        found += [each["metadata"]["name"] for each in self.all("StatefulSet") if not _rolled_out(each)]
        for each in self.all("RayCluster"):
            found += [name for name in ray_pods.pods(each) if not is_ready(self.get("Pod", name) or _NO_POD)]
        return found + [each["metadata"]["name"] for each in self.all("Pod") if "deletionTimestamp" in each["metadata"]]

    def prepare(self, objects: Sequence[Object]) -> None:
        """Make what these objects take for granted: Secrets and claims that none of them is."""
        self._demand_namespace()
        own = {(each["kind"], each["metadata"]["name"]) for each in objects}
        for name, keys in sorted(_secrets(objects).items()):
            if ("Secret", name) not in own:
                self.put("Secret", name, stringData=dict.fromkeys(keys, "x" * 32))
        claims = {each["claimName"] for name, each in _walk(list(objects)) if name == "persistentVolumeClaim"}
        for name in sorted(claims - {name for kind, name in own if kind == "PersistentVolumeClaim"}):
            spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
            self.put("PersistentVolumeClaim", name, spec=spec)


_NO_POD: Object = {"metadata": {}}


def _rolled_out(thing: Object) -> bool:
    status, wanted = thing.get("status") or {}, thing["spec"]["replicas"]
    counts = {status.get(each) for each in ("replicas", "readyReplicas", "updatedReplicas")}
    return counts == {wanted} and status["observedGeneration"] == thing["metadata"]["generation"]


def _bare(kind: str, name: str) -> Object:
    return {"apiVersion": BY_NAME[kind].api_version, "kind": kind, "metadata": {"name": name}}


def _secrets(objects: Sequence[Object]) -> dict[str, set[str]]:
    """Names and keys of the Secrets that objects refer to anywhere."""
    found: dict[str, set[str]] = {}
    for path, value in _walk(list(objects)):
        if path == "secretKeyRef" and not value.get("optional"):
            found.setdefault(value["name"], set()).add(value["key"])
        elif path == "secretRef" and not value.get("optional"):
            found.setdefault(value["name"], set())
        elif path == "authOptions" and value.get("secretName"):
            found.setdefault(value["secretName"], set()).add("auth_token")
        elif path == "secret" and isinstance(value, dict) and "secretName" in value:
            found.setdefault(value["secretName"], set())
    return found


def _walk(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    yield name, value
    for key, each in value.items() if isinstance(value, dict) else [("", each) for each in _items(value)]:
        yield from _walk(each, key)


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []

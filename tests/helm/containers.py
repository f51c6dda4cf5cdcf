"""What a container's specification says of the process that it becomes: environment, command, folders. Runs nothing.

One machine is no cluster, so three things are put in place of what would stand in a pod, and nothing else is:
the paths of mounts become folders; the names of Services become their addresses; 0.0.0.0 becomes the pod's own address.
"""

import base64
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.helm.api_server.admission import address_of
from tests.helm.api_server.rules import pod_templates, quantity
from tests.helm.api_server.store import Object, Store

_HEAD = "[a-z][a-z0-9-]*-head-svc"


class Substitution:
    """Texts of a pod as texts of this machine."""

    def __init__(self, store: Store, namespace: str, mounts: Mapping[str, Path], address: str) -> None:
        self._new = {path: str(folder) for path, folder in mounts.items()} | {"0.0.0.0": address}
        self._store, self._namespace = store, namespace
        services = [re.escape(each["metadata"]["name"]) for each in store.all("Service", namespace)]
        # A head's Service comes after the pods that know its name.
        hosts = [rf"(?:{'|'.join([*services, _HEAD])})(?:\.{re.escape(namespace)}(?:\.svc[\w.]*)?)?"]
        paths = [re.escape(each) for each in sorted(self._new, key=len, reverse=True)]
        self._old = re.compile(rf"(?<![\w.-])({'|'.join(paths + hosts)})(?![\w.-])")

    def __call__(self, text: str) -> str:
        return self._old.sub(lambda found: self._new.get(found[1]) or self._host(found[1]), text)

    def _host(self, name: str) -> str:
        return address_of(self._store, self._namespace, name.split(".", maxsplit=1)[0])


def environment(store: Store, pod: Object, container: Object) -> dict[str, str]:
    """The variables of a container, `$(NAME)` of earlier ones filled in. All that it refers to has to be there."""
    namespace = pod["metadata"]["namespace"]
    found: dict[str, str] = dict(_links(store, pod))
    for source in container.get("envFrom") or []:
        for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
            if field in source:
                data = _data(store, kind, namespace, source[field]["name"])
                found |= {source.get("prefix", "") + key: value for key, value in data.items()}
    for variable in container.get("env") or []:
        value = _value(store, pod, container, variable)
        if value is not None:
            found[variable["name"]] = expanded(value, found)
    return found


def expanded(text: str, known: Mapping[str, str]) -> str:
    """A text with `$(NAME)` filled in, as Kubernetes does in variables, commands and arguments."""
    return re.sub(r"(?<!\$)\$\(([\w.-]+)\)", lambda match: known.get(match[1], match[0]), text)


def _links(store: Store, pod: Object) -> Iterator[tuple[str, str]]:
    """The variables that tell a pod of the Services of its namespace, unless it wants none."""
    if pod["spec"].get("enableServiceLinks", True):
        for service in store.all("Service", pod["metadata"]["namespace"]):
            name = service["metadata"]["name"].upper().replace("-", "_")
            if service["spec"].get("clusterIP") != "None":
                port = service["spec"]["ports"][0]["port"]
                yield f"{name}_SERVICE_HOST", service["spec"]["clusterIP"]
                yield f"{name}_PORT", f"tcp://{service['spec']['clusterIP']}:{port}"


def _data(store: Store, kind: str, namespace: str, name: str) -> dict[str, str]:
    data = (store.get(kind, namespace, name) or {}).get("data") or {}
    return {key: base64.b64decode(value).decode() for key, value in data.items()} if kind == "Secret" else data


def _value(store: Store, pod: Object, container: Object, variable: Object) -> str | None:
    source = variable.get("valueFrom")
    if not source:
        return str(variable.get("value", ""))
    if "fieldRef" in source:
        return _field(pod, source["fieldRef"]["fieldPath"])
    if "resourceFieldRef" in source:
        return _resource(container, source["resourceFieldRef"])
    field, kind = ("secretKeyRef", "Secret") if "secretKeyRef" in source else ("configMapKeyRef", "ConfigMap")
    data = _data(store, kind, pod["metadata"]["namespace"], source[field]["name"])
    return data.get(source[field]["key"])


def _field(pod: Object, path: str) -> str:
    if found := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
        return str((pod["metadata"].get(found[1]) or {}).get(found[2], ""))
    thing: Any = pod
    for part in path.split("."):
        thing = thing[part]
    return str(thing)


def _resource(container: Object, reference: Object) -> str:
    kind, _, name = reference["resource"].partition(".")
    value = quantity(container["resources"][kind][name]) / quantity(reference.get("divisor") or 1)
    return str(-int(-value // 1))


def volumes(store: Store, pod: Object, folder: Path, claims: Path) -> dict[str, Path]:
    """A folder for every volume: empty ones and files below `folder`, claims shared by all pods below `claims`."""
    found = {}
    for volume in pod["spec"].get("volumes") or []:
        path = folder / volume["name"]
        if "persistentVolumeClaim" in volume:
            path = claims / volume["persistentVolumeClaim"]["claimName"]
        path.mkdir(parents=True, exist_ok=True)
        found[volume["name"]] = path
        for field, kind, key in (("configMap", "ConfigMap", "name"), ("secret", "Secret", "secretName")):
            if field in volume:
                for name, text in _data(store, kind, pod["metadata"]["namespace"], volume[field][key]).items():
                    (path / name).write_text(text)
    return found


def shared(store: Store, namespace: str, claims: Path) -> dict[str, Path]:
    """Where claims stand in any pod of the namespace: pods tell each other of paths that they do not mount."""
    found = {}
    for kind in ("Deployment", "RayCluster", "Pod"):
        for thing in store.all(kind, namespace):
            for _, template in pod_templates(thing):
                found |= dict(_claim_mounts(template["spec"], claims))
    return found


def _claim_mounts(spec: Mapping[str, Any], claims: Path) -> Iterator[tuple[str, Path]]:
    names = {each["name"]: each["persistentVolumeClaim"]["claimName"] for each in _claims(spec)}
    for container in spec["containers"]:
        for mount in container.get("volumeMounts") or []:
            if mount["name"] in names:
                yield mount["mountPath"], claims / names[mount["name"]] / mount.get("subPath", "")


def _claims(spec: Mapping[str, Any]) -> list[Object]:
    return [each for each in spec.get("volumes") or [] if "persistentVolumeClaim" in each]


def mounts(container: Object, folders: Mapping[str, Path]) -> dict[str, Path]:
    """Which folder stands at which path in a container."""
    found = {}
    for mount in container.get("volumeMounts") or []:
        folder = folders[mount["name"]] / mount.get("subPath", "")
        if not folder.exists():
            folder.mkdir(parents=True)
        found[mount["mountPath"].rstrip("/")] = folder
    return found


def command(container: Object, known: Mapping[str, str], put: Callable[[str], str]) -> list[str]:
    """The words of a container's process."""
    words = [*(container.get("command") or []), *(container.get("args") or [])]
    assert words, f"container {container['name']} leaves its command to the image"
    return [put(expanded(word, known)) for word in words]

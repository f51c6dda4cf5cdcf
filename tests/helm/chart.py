"""Renders the chart with the real helm, and finds objects in what comes out. Knows nothing of what they should be."""

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[2] / "helm"
HELM = Path(sys.executable).with_name("helm")
CAPABILITIES = (
    "ray.io/v1/RayCluster",
    "monitoring.coreos.com/v1/ServiceMonitor",
    "gateway.networking.k8s.io/v1/HTTPRoute",
    "keda.sh/v1alpha1/ScaledObject",
)

SCENARIOS = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))

Object = dict[str, Any]


class Refused(Exception):
    """helm would not render; the message is what it printed."""


def render(
    values: Mapping[str, Any] | None = None,
    *,
    scenario: str = "",
    release: str = "demo",
    namespace: str = "models",
    upgrade: bool = False,
    kube_version: str = "1.34",
    capabilities: Sequence[str] = CAPABILITIES,
    chart: Path = CHART,
) -> list[Object]:
    """The objects of the chart with `values` over those of `ci/<scenario>-values.yaml`. Raises Refused."""
    text = _rendered(
        json.dumps(values or {}), scenario, release, namespace, upgrade, kube_version, tuple(capabilities), chart
    )
    return [document for document in yaml.safe_load_all(text) if document]


@functools.cache
def _rendered(
    values: str,
    scenario: str,
    release: str,
    namespace: str,
    upgrade: bool,
    kube_version: str,
    capabilities: tuple[str, ...],
    chart: Path,
) -> str:
    command = [str(HELM), "template", release, str(chart), "--namespace", namespace, "--kube-version", kube_version]
    command += ["--is-upgrade"] if upgrade else []
    command += [f"--api-versions={each}" for each in capabilities]
    command += ["--values", str(CHART / "ci" / f"{scenario}-values.yaml")] if scenario else []
    done = subprocess.run([*command, "--values", "-"], check=False, input=values, capture_output=True, text=True)
    if done.returncode:
        raise Refused(done.stderr)
    return done.stdout


def changed(folder: Path, changes: Mapping[str, tuple[str, str]]) -> Path:
    """A copy of the chart in a folder, with a text of some templates replaced: {"_settings.tpl": (old, new)}."""
    chart = folder / "chart"
    shutil.copytree(CHART, chart)
    for name, (old, new) in changes.items():
        path = chart / "templates" / name
        text = path.read_text()
        assert old in text, f"{name} has no {old}"
        path.write_text(text.replace(old, new))
    return chart


def find(objects: Sequence[Object], kind: str, name: str = "") -> Object:
    """The one object of this kind (whose name ends so)."""
    found = every(objects, kind, name)
    assert len(found) == 1, f"{len(found)} of {kind} {name}"
    return found[0]


def every(objects: Sequence[Object], kind: str, name: str = "") -> list[Object]:
    """The objects of this kind (whose names end so)."""
    return [each for each in objects if each["kind"] == kind and each["metadata"]["name"].endswith(name)]


@dataclass(frozen=True)
class Pod:
    """The pods that an object makes, or a pod that is one: `metadata` and `spec` are theirs."""

    owner: Object
    metadata: Object
    spec: Object

    def __str__(self) -> str:
        return f"{self.owner['kind']} {self.owner['metadata']['name']}"

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.metadata.get("labels") or {})

    def containers(self) -> list[Object]:
        """Its containers, those first that run before."""
        return [*(self.spec.get("initContainers") or []), *self.spec["containers"]]


def pods(objects: Sequence[Object]) -> list[Pod]:
    """The pods of all objects, the Ray cluster's too."""
    return [Pod(owner, pod.get("metadata") or {}, pod["spec"]) for owner in objects for pod in _pods(owner)]


def _pods(owner: Object) -> Iterator[Object]:
    spec = owner.get("spec") or {}
    if owner["kind"] == "Pod":
        yield owner
    elif owner["kind"] == "CronJob":
        yield spec["jobTemplate"]["spec"]["template"]
    elif owner["kind"] == "RayCluster":
        yield from (group["template"] for group in (spec["headGroupSpec"], *(spec.get("workerGroupSpecs") or [])))
    elif "template" in spec:
        yield spec["template"]


def pod(objects: Sequence[Object], name: str) -> Pod:
    """The one pod whose owner's name ends so."""
    found = [each for each in pods(objects) if each.owner["metadata"]["name"].endswith(name)]
    assert len(found) == 1, f"{len(found)} of pods {name}"
    return found[0]


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a selector (`matchLabels`, `matchExpressions`) takes a pod or namespace with these labels."""
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    return all(_holds(each, labels) for each in selector.get("matchExpressions") or [])


def _holds(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values") or []
    return {
        "In": value in values,
        "NotIn": value not in values,
        "Exists": value is not None,
        "DoesNotExist": value is None,
    }[expression["operator"]]

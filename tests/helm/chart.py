"""Renders the chart with the real helm, and finds objects in what comes out. Knows nothing of what they should be."""

import functools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[2] / "helm"
HELM = Path(sys.executable).with_name("helm")
CAPABILITIES = (
    "ray.io/v1/RayCluster",
    "monitoring.coreos.com/v1/ServiceMonitor",
    "gateway.networking.k8s.io/v1/HTTPRoute",
)

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
) -> list[Object]:
    """The objects of the chart with `values` over those of `ci/<scenario>-values.yaml`. Raises Refused."""
    text = _rendered(json.dumps(values or {}), scenario, release, namespace, upgrade, kube_version, tuple(capabilities))
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
) -> str:
    command = [str(HELM), "template", release, str(CHART), "--namespace", namespace, "--kube-version", kube_version]
    command += ["--is-upgrade"] if upgrade else []
    command += [f"--api-versions={each}" for each in capabilities]
    command += ["--values", str(CHART / "ci" / f"{scenario}-values.yaml")] if scenario else []
    done = subprocess.run([*command, "--values", "-"], check=False, input=values, capture_output=True, text=True)
    if done.returncode:
        raise Refused(done.stderr)
    return done.stdout


def find(objects: Sequence[Object], kind: str, name: str = "") -> Object:
    """The one object of this kind (whose name ends so)."""
    found = every(objects, kind, name)
    assert len(found) == 1, f"{len(found)} of {kind} {name}"
    return found[0]


def every(objects: Sequence[Object], kind: str, name: str = "") -> list[Object]:
    """The objects of this kind (whose names end so)."""
    return [each for each in objects if each["kind"] == kind and each["metadata"]["name"].endswith(name)]

"""Every scenario passes helm's linter, and its objects the schemas of every Kubernetes that the chart supports."""

import re
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.helm.chart import CHART, HELM, SCENARIOS, Object, render

SCHEMAS = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
# Kinds whose definitions are not Kubernetes' own.
FOREIGN = ("ray.io/", "monitoring.coreos.com/", "gateway.networking.k8s.io/", "keda.sh/")


def _versions() -> list[str]:
    """The versions from the oldest that the chart takes to the newest that can be checked."""
    oldest = re.search(r">=1\.(\d+)", yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"])
    assert oldest
    carried = {int(path.name.split(".")[1]) for path in SCHEMAS.glob("v1.*-strict")}
    return [f"1.{minor}" for minor in sorted(carried) if minor >= int(oldest[1])]


def _see(object_: Object, version: str) -> None:
    if not object_["apiVersion"].startswith(FOREIGN):
        kubernetes_validate.validate(object_, version, strict=True)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_linter_has_nothing_to_say(scenario: str) -> None:
    values = CHART / "ci" / f"{scenario}-values.yaml"
    done = subprocess.run(
        [HELM, "lint", "--strict", CHART, "--values", values], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout
    assert "[ERROR]" not in done.stdout


@pytest.mark.parametrize("version", _versions())
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_objects_have_only_fields_of_their_kind(scenario: str, version: str) -> None:
    objects = render(scenario=scenario, kube_version=version)
    assert len(objects) > 10
    for each in objects:
        _see(each, version)


def test_a_misspelt_field_is_seen() -> None:
    object_ = next(each for each in render(scenario="minimal") if each["kind"] == "Deployment")
    object_["spec"]["replicass"] = 2
    with pytest.raises(kubernetes_validate.ValidationError, match="replicass"):
        _see(object_, _versions()[0])

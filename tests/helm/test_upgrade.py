"""A release of the chart can take the last one's place: nothing changes that a cluster never changes.

The last release's rendering is installed by helm, as a chart of plain text, and upgraded to the chart of today.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.api_server import rules
from tests.helm.chart import CHART, Object, changed, render
from tests.helm.loopback import Cluster
from tests.helm.released.record import FOLDER, SCENARIOS

LAST = sorted((path for path in FOLDER.iterdir() if path.name[0].isdigit()), key=lambda path: path.name)[-1]
# What people's data, addresses and certificates hang on: it may not vanish under its name.
LASTING = {"PersistentVolumeClaim", "StatefulSet", "Service", "Secret", "RayCluster"}

Key = tuple[str, str]


def released(scenario: str) -> list[Object]:
    return [each for each in yaml.safe_load_all((LAST / f"{scenario}.yaml").read_text()) if each]


def by_name(objects: Sequence[Object]) -> dict[Key, Object]:
    return {(each["kind"], each["metadata"]["name"]): each for each in objects}


def is_hook(thing: Object) -> bool:
    return "helm.sh/hook" in (thing["metadata"].get("annotations") or {})


def breaks(before: Sequence[Object], after: Sequence[Object]) -> Iterator[str]:
    """What a cluster, or somebody's data, would not bear. Hooks are made anew each time."""
    old, new = by_name(before), by_name(after)
    for key, thing in old.items():
        if key not in new and key[0] in LASTING:
            yield f"{' '.join(key)} is gone"
        if key in new and not is_hook(thing):
            yield from (f"{' '.join(key)}: {fault}" for fault in rules.changes(thing, new[key]))
            yield from (f"{' '.join(key)}: {fault}" for fault in _orphans(thing, new[key]))


def _orphans(old: Object, new: Object) -> Iterator[str]:
    """A Service that selects other pods than before loses the old ones before new ones are ready."""
    if old["kind"] == "Service":
        pods = old["spec"].get("selector")
        if pods != new["spec"].get("selector"):
            yield f"spec.selector: {pods} becomes {new['spec'].get('selector')}"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_field_changes_that_never_may(scenario: str) -> None:
    before = released(scenario)
    assert {"Deployment", "Service", "RayCluster"} <= {each["kind"] for each in before}
    assert [*breaks(before, render(scenario=scenario, upgrade=True))] == []


Change = tuple[str, str, str]
# A template, what stands in it and what takes its place; the scenario; what has to be found.
BROKEN: Mapping[str, tuple[Change, str, str]] = {
    "labels that select": (
        ("_helpers.tpl", "app.kubernetes.io/component: {{ .component }}", "part: {{ .component }}"),
        "minimal",
        "Deployment demo-merger-api: spec.selector",
    ),
    "a claim's name": (
        ("_storage.tpl", '"%s-models"', '"%s-data"'),
        "minimal",
        "PersistentVolumeClaim demo-merger-models is gone",
    ),
    "a claim's access": (
        ("storage/claims.yaml", "accessModes:", "volumeMode: Block\n  accessModes:"),
        "minimal",
        "PersistentVolumeClaim demo-merger-models: spec: Forbidden",
    ),
    "the database's service": (
        ("postgresql/statefulset.yaml", "serviceName: ", "serviceName: x"),
        "all-on",
        "StatefulSet demo-merger-postgresql: spec: Forbidden",
    ),
    "the names of all": (
        ("_helpers.tpl", 'printf "%s-%s" .Release.Name $name', 'printf "%s-x" .Release.Name'),
        "minimal",
        "Service demo-merger-api is gone",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_chart_is_caught(name: str, tmp_path: Path) -> None:
    (template, old, new), scenario, message = BROKEN[name]
    broken = changed(tmp_path, {template: (old, new)})
    found = [*breaks(released(scenario), render(scenario=scenario, upgrade=True, chart=broken))]
    assert any(message in each for each in found), found


def _as_chart(objects: Sequence[Object], folder: Path) -> Path:
    """A chart whose templates are these objects and nothing else."""
    (folder / "templates").mkdir(parents=True)
    meta: dict[str, Any] = {"apiVersion": "v2", "name": "merger", "version": LAST.name, "appVersion": LAST.name}
    (folder / "Chart.yaml").write_text(yaml.safe_dump(meta))
    text = yaml.safe_dump_all(objects, sort_keys=True)
    (folder / "templates/all.yaml").write_text(text.replace("{{", '{{ "{{" }}'))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_last_release_is_upgraded(scenario: str, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster")
    try:
        cluster.prepare(released(scenario))
        cluster.helm("install", "demo", str(_as_chart(released(scenario), tmp_path / "released")))
        cluster.settle()
        # The bundled database's URL is made anew from its password, which the recording has not kept.
        secrets = {each["metadata"]["name"]: each.get("data") for each in cluster.all("Secret")}
        values = ("--values", str(CHART / "ci" / f"{scenario}-values.yaml"))
        cluster.helm("upgrade", "demo", str(CHART), *values)
        cluster.settle()
        for name, data in secrets.items():
            if not name.startswith("sh.helm.") and name != "demo-merger-database":
                assert (cluster.get("Secret", name) or {}).get("data") == data, name
    finally:
        cluster.close()

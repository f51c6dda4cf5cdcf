"""The operator's guide and the runbooks name values, settings, metrics, sections that exist; sizes are current."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from api.metrics import Metrics
from api.settings import Settings
from api.store.memory import MemoryStore
from docs.make_sizing import replaced
from tests.api.ray import ScriptedRay
from tests.helm.chart import CHART, HELM

DOCS = CHART.parent / "docs"
PAGES = [DOCS / "operating.md", DOCS / "runbooks.md"]
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())


def anchors(page: Path) -> set[str]:
    """The sections of a page as links name them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text())
    assert len(links) >= 5
    for target, section in links:
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), target
        assert not section or section in anchors(found), f"{target}#{section}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_value_that_is_named_is_one_of_the_chart(page: Path) -> None:
    named = re.findall(r"`([a-z][A-Za-z]*(?:\.[A-Za-z_]+)+)(?=[`: ])", page.read_text())
    seen = 0
    for path in named:
        top, *rest = path.split(".")
        if top == "settings":
            assert rest[0] in Settings.model_fields, path
        elif top == "thresholds":
            assert rest[0] in VALUES["monitoring"]["prometheusRule"]["thresholds"], path
        elif top in VALUES:
            node: Any = VALUES
            for name in (top, *rest):
                assert name in node, path
                node = node[name]
        else:
            continue
        seen += 1
    assert seen >= 5


def test_every_metric_that_is_named_is_exported() -> None:
    with ScriptedRay().client() as ray:
        metrics = Metrics(MemoryStore(), ray)
        metrics.rounds()
        known = set(re.findall(r"^# TYPE (\w+)", metrics.text().decode(), flags=re.MULTILINE)) | {"merger_ray_up"}
    named = set(re.findall(r"`(merger_[a-z_]+)", "".join(page.read_text() for page in PAGES)))
    assert len(named) > 10
    assert named <= known


def test_the_chart_is_shown_by_the_command_of_the_guide() -> None:
    lines = (DOCS / "operating.md").read_text().replace("\\\n", " ").splitlines()
    [command] = [line for line in lines if line.startswith("    helm template ")]
    words = shlex.split(command)
    done = subprocess.run([HELM, *words[1:]], cwd=CHART.parent, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kinds = {document["kind"] for document in yaml.safe_load_all(done.stdout) if document}
    assert kinds >= {"Deployment", "Job", "Service", "PrometheusRule", "NetworkPolicy"}


@pytest.mark.slow
def test_the_table_of_sizes_is_that_of_todays_plans() -> None:
    guide = (DOCS / "operating.md").read_text()
    assert replaced(guide) == guide
    assert replaced(re.sub(r"\| 7B.*\n", "", guide)) == guide, "the test sees a change"

"""What an operator is told: monitors find the pods, every expression reads metrics that exist, every alert fires when
it should, is silent when it should, and leads to its runbook.
"""

import json
import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from api.app import create_app
from api.jobs import State
from api.metrics import Metrics
from api.settings import Settings
from api.store.memory import MemoryStore
from tests.api.ray import ScriptedRay
from tests.api.test_metrics import report, started
from tests.helm.chart import CHART, Object, Refused, every, find, render
from tests.helm.promql import Selector, groupings, selectors
from tests.service.processes import Cluster, until
from workers.reports import Progress

DATABASE = {"database": {"existingSecret": "merger-database"}}
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
KINDS = {"serviceMonitor": "ServiceMonitor", "podMonitor": "PodMonitor", "prometheusRule": "PrometheusRule"}
RUNBOOKS = CHART.parent / "docs" / "runbooks.md"
# What Prometheus, its operator and Kubernetes put on every sample.
TARGET = {"namespace", "job", "pod", "persistentvolumeclaim", "ray_io_cluster", "ray_io_node_type", "ray_io_group"}
# Not ours: of Prometheus itself, of the kubelet, and of Ray 2.60 (seen on a real cluster, see the last test).
PROMETHEUS = {"up"}
KUBELET = {"kubelet_volume_stats_available_bytes", "kubelet_volume_stats_capacity_bytes"}
RAY = {
    "ray_cluster_active_nodes": set(),
    "ray_node_mem_total": {"IsHeadNode"},
    "ray_node_mem_used": {"IsHeadNode"},
    "ray_node_network_receive_speed": set(),
    "ray_node_network_send_speed": set(),
    "ray_resources": {"Name", "State"},
}


def monitored(**parts: dict[str, Any]) -> list[Object]:
    """The chart with these parts of its monitoring, by default everything switched on."""
    chosen = parts or {part: {} for part in (*KINDS, "dashboard")}
    monitoring = {part: {"enabled": True, **values} for part, values in chosen.items()}
    return render({**DATABASE, "monitoring": monitoring})


def rules(**values: Any) -> list[dict[str, Any]]:
    found = find(monitored(prometheusRule=values), "PrometheusRule")["spec"]["groups"]
    assert len(found) == 1
    listed: list[dict[str, Any]] = found[0]["rules"]
    return listed


def dashboard() -> dict[str, Any]:
    [content] = find(monitored(dashboard={}), "ConfigMap", "-dashboard")["data"].values()
    parsed: dict[str, Any] = json.loads(content)
    return parsed


def graphs() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> dict[str, str]:
    """Every expression of the alerts and of the dashboard, by where it stands."""
    told = {rule["alert"]: rule["expr"] for rule in rules()}
    for panel in graphs():
        told |= {f"{panel['title']}, {target['refId']}": target["expr"] for target in panel["targets"]}
    return told


# ---- objects ------------------------------------------------------------------------------------------


def test_nothing_of_it_is_there_unless_it_is_asked_for() -> None:
    objects = render(DATABASE)
    assert not [each for kind in KINDS.values() for each in every(objects, kind)]
    assert not every(objects, "ConfigMap", "-dashboard")
    assert not every(objects, "Service", "-dispatcher")


@pytest.mark.parametrize("part", [*KINDS, "dashboard"])
def test_each_part_is_switched_on_alone_and_carries_the_labels_by_which_it_is_found(part: str) -> None:
    objects = monitored(**{part: {"labels": {"release": "prometheus"}}})
    kinds = [kind for kind in KINDS.values() if every(objects, kind)]
    assert kinds == ([KINDS[part]] if part in KINDS else [])
    assert bool(every(objects, "ConfigMap", "-dashboard")) == (part == "dashboard")
    assert bool(every(objects, "Service", "-dispatcher")) == (part == "serviceMonitor")
    one = find(objects, KINDS[part]) if part in KINDS else find(objects, "ConfigMap", "-dashboard")
    assert one["metadata"]["labels"].items() >= {"release": "prometheus", "app.kubernetes.io/instance": "demo"}.items()


@pytest.mark.parametrize("part", KINDS)
def test_without_the_operator_its_objects_are_refused_with_what_to_do(part: str) -> None:
    values = {**DATABASE, "monitoring": {part: {"enabled": True}}}
    with pytest.raises(Refused, match="install the Prometheus operator"):
        render(values, capabilities=["ray.io/v1/RayCluster"])
    render({**DATABASE, "monitoring": {"dashboard": {"enabled": True}}}, capabilities=["ray.io/v1/RayCluster"])


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(
        each["operator"] == "In" and labels.get(each["key"]) in each["values"]
        for each in selector.get("matchExpressions", [])
    )


def test_the_service_monitor_finds_the_api_and_the_dispatcher_and_nothing_else() -> None:
    objects = monitored(serviceMonitor={"interval": "15s", "scrapeTimeout": "7s"})
    monitor = find(objects, "ServiceMonitor")["spec"]
    found = [each for each in every(objects, "Service") if selects(monitor["selector"], each["metadata"]["labels"])]
    assert sorted(each["metadata"]["name"] for each in found) == ["demo-merger-api", "demo-merger-dispatcher"]
    [endpoint] = monitor["endpoints"]
    assert (endpoint["interval"], endpoint["scrapeTimeout"]) == ("15s", "7s")
    for service in found:
        [port] = [port for port in service["spec"]["ports"] if port["name"] == endpoint["port"]]
        deployment = find(objects, "Deployment", service["metadata"]["name"])["spec"]["template"]
        assert service["spec"]["selector"].items() <= deployment["metadata"]["labels"].items()
        ports = {p["name"]: p["containerPort"] for c in deployment["spec"]["containers"] for p in c.get("ports", [])}
        assert port["targetPort"] in ports
    with ScriptedRay().client() as ray, TestClient(create_app(Settings(), MemoryStore(), ray)) as client:
        assert client.get(endpoint["path"]).is_success


def test_the_pod_monitor_asks_every_port_of_ray_and_its_labels_are_those_that_expressions_use() -> None:
    monitor = find(monitored(podMonitor={}), "PodMonitor")["spec"]
    assert monitor["selector"] == {"matchLabels": {"ray.io/cluster": "demo-merger-ray"}}
    assert [each["port"] for each in monitor["podMetricsEndpoints"]] == ["metrics", "as-metrics", "dash-metrics"]
    assert {re.sub(r"[./-]", "_", label) for label in monitor["podTargetLabels"]} <= TARGET


def test_a_cluster_of_somebody_else_has_no_pod_monitor() -> None:
    values = {**DATABASE, "monitoring": {"podMonitor": {"enabled": True}}}
    external = {"external": {"url": "http://ray-head:8265"}, "auth": {"existingSecret": "ray-token"}}
    assert every(render(values), "PodMonitor")
    assert not every(render({**values, "ray": external}), "PodMonitor")


def test_the_alert_for_volumes_watches_claims_that_are_named_to_the_release() -> None:
    storage = {"volume": {"existingClaim": "models"}, "modelCache": {"enabled": True, "existingClaim": "cache"}}
    values = {**DATABASE, "storage": storage, "monitoring": {"prometheusRule": {"enabled": True}}}
    [group] = find(render(values), "PrometheusRule")["spec"]["groups"]
    [rule] = [rule for rule in group["rules"] if rule["alert"] == "MergerVolumeFull"]
    patterns = {value for one in selectors(rule["expr"]) for label, _, value in one.matchers if label != "namespace"}
    assert patterns == {"(data-)?demo-merger(-.*)?|models|cache"}


# ---- expressions --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported() -> dict[str, list[dict[str, str]]]:
    """What /metrics of a real application says: the labels of every sample, by its name."""
    store = MemoryStore()
    with ScriptedRay().client() as ray, TestClient(create_app(Settings(), store, ray)) as client:
        client.get("/readyz")
        metrics: Metrics = client.app.state.context.metrics  # type: ignore[attr-defined]
        metrics.reported(job := started(), report(job, 1002.0, Progress("writing")), ())
        client.get("/livez")
        text = client.get("/metrics").text
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def test_every_expression_reads_metrics_that_there_are(exported: dict[str, list[dict[str, str]]]) -> None:
    read = {place: list(selectors(text)) for place, text in expressions().items()}
    assert all(read.values()), "an expression that reads nothing was not understood"
    known = exported.keys() | PROMETHEUS | KUBELET | RAY.keys()
    assert {one.name for found in read.values() for one in found} <= known
    ours = {name for name in exported if name.startswith("merger_") and not name.endswith("_created")}
    unseen = ours - {one.name for found in read.values() for one in found}
    assert not unseen - {"merger_http_seconds_sum", "merger_phase_seconds_bucket"}, "nobody looks at these"


def test_every_label_that_is_asked_for_can_match(exported: dict[str, list[dict[str, str]]]) -> None:
    for place, text in expressions().items():
        labels = set(TARGET)
        for one in selectors(text):
            own = {label for sample in exported.get(one.name, []) for label in sample} | RAY.get(one.name, set())
            assert {label for label, _, _ in one.matchers} <= own | TARGET, place
            labels |= own
        assert groupings(text) <= labels, place


def test_states_and_outcomes_that_are_asked_for_exist(exported: dict[str, list[dict[str, str]]]) -> None:
    outcomes = {labels["outcome"] for labels in exported["merger_attempts_total"]}
    asked = [matcher for text in expressions().values() for one in selectors(text) for matcher in one.matchers]
    states = {value for label, _, values in asked if label == "state" for value in values.split("|")}
    assert states == set(State)
    assert {value for label, _, value in asked if label == "outcome"} <= outcomes
    assert "lost" in outcomes


def test_expressions_are_read_right() -> None:
    text = 'sum by (le) (rate(a_b{x="1",y=~"p|q"}[5m])) / on (job) c offset 1h or vector(0) > 1e-3'
    assert list(selectors(text)) == [Selector("a_b", (("x", "=", "1"), ("y", "=~", "p|q"))), Selector("c", ())]
    assert groupings(text) == {"le", "job"}


# ---- the dashboard ------------------------------------------------------------------------------------


def test_every_panel_of_the_dashboard_says_what_it_shows_and_covers_no_other() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= own
    assert all(panel["description"] and panel["targets"] for panel in graphs())


def test_the_dashboard_uses_the_variables_that_it_has() -> None:
    text = json.dumps(dashboard())
    used = set(re.findall(r"\$\{?([a-z]+)", text))
    assert used == {variable["name"] for variable in dashboard()["templating"]["list"]}


# ---- alerts -------------------------------------------------------------------------------------------


def test_every_alert_leads_to_its_runbook_and_every_runbook_belongs_to_one() -> None:
    anchors = {
        line.removeprefix("## ").strip().lower() for line in RUNBOOKS.read_text().splitlines() if line[:3] == "## "
    }
    links = {rule["annotations"]["runbook_url"] for rule in rules(runbookUrl="https://docs.example/runbooks")}
    assert links == {f"https://docs.example/runbooks#{rule['alert'].lower()}" for rule in rules()}
    alerts = {rule["alert"].lower() for rule in rules()}
    assert alerts <= anchors
    assert {anchor for anchor in anchors if anchor.startswith("merger")} == alerts


def test_every_runbook_says_what_it_means_where_to_look_and_what_to_do() -> None:
    sections = re.split(r"^## ", RUNBOOKS.read_text(), flags=re.MULTILINE)[1:]
    for section in sections:
        if section.startswith("Merger"):
            assert re.findall(r"^\*\*(.+?)\*\*", section, flags=re.MULTILINE) == ["Means.", "Look.", "Do."], section[
                :40
            ]


@pytest.mark.parametrize(
    ("threshold", "alert"),
    [
        ("roundSeconds", "MergerDispatcherStuck"),
        ("queueSeconds", "MergerQueueOld"),
        ("failedJobsPerHour", "MergerJobsFailing"),
        ("lostAttemptsPerHour", "MergerAttemptsLost"),
        ("leaseLossesPerHour", "MergerLeaseChanges"),
        ("errorShare", "MergerApiErrors"),
        ("readSeconds", "MergerApiSlow"),
        ("headMemoryShare", "MergerRayHeadMemory"),
        ("volumeFreeShare", "MergerVolumeFull"),
    ],
)
def test_a_threshold_changes_its_alert_and_no_other(threshold: str, alert: str) -> None:
    before = {rule["alert"]: rule["expr"] for rule in rules()}
    after = {rule["alert"]: rule["expr"] for rule in rules(thresholds={threshold: 0.777})}
    assert {name for name in before if before[name] != after[name]} == {alert}
    assert "0.777" in after[alert]


def test_alerts_can_be_left_out_added_and_routed() -> None:
    own = {"alert": "Mine", "expr": "vector(1)"}
    found = rules(disabled=["MergerApiSlow"], extraRules=[own], alertLabels={"team": "models", "severity": "page"})
    assert [rule["alert"] for rule in found] == [r["alert"] for r in rules() if r["alert"] != "MergerApiSlow"] + [
        "Mine"
    ]
    assert {rule["labels"]["team"] for rule in found[:-1]} == {"models"}
    assert {rule["labels"]["severity"] for rule in found[:-1]} == {"critical", "warning"}, "they keep their own"
    assert found[-1] == own


API = 'namespace="models",job="demo-merger-api",pod="a"'
LEADS = 'namespace="models",job="demo-merger-dispatcher",pod="d1"'
STANDS_BY = 'namespace="models",job="demo-merger-dispatcher",pod="d2"'
HEAD = 'namespace="models",ray_io_cluster="demo-merger-ray",IsHeadNode="true",pod="h"'
WORKER = 'namespace="models",ray_io_cluster="demo-merger-ray",IsHeadNode="false",pod="w"'
OTHER = 'namespace="models",job="other-merger-api"'
CLAIM = 'namespace="models",persistentvolumeclaim="demo-merger-models"'
STRANGE = 'namespace="models",persistentvolumeclaim="somebody-elses"'
READ = f'{API},method="GET",route="/v1/jobs"'
HEALTHY = {
    f"up{{{API}}}": "1x180",
    f"up{{{OTHER}}}": "0x180",
    f"merger_database_up{{{API}}}": "1x180",
    f"merger_database_up{{{LEADS}}}": "1x180",
    f"merger_database_up{{{OTHER}}}": "0x180",
    f"merger_ray_up{{{API}}}": "1x180",
    f"merger_ray_up{{{LEADS}}}": "0x180",
    f'merger_jobs{{{API},state="failed"}}': "3x180",
    f'merger_jobs{{{LEADS},state="failed"}}': "3x180",
    f"merger_queue_age_seconds{{{API}}}": "10x180",
    f"merger_queue_age_seconds{{{OTHER}}}": "99999x180",
    f"merger_dispatcher_leading{{{LEADS}}}": "1x180",
    f"merger_dispatcher_leading{{{STANDS_BY}}}": "0x180",
    f"merger_dispatcher_round_timestamp_seconds{{{LEADS}}}": "0+60x180",
    f"merger_dispatcher_round_timestamp_seconds{{{STANDS_BY}}}": "5x180",
    f"merger_jobs_without_node{{{LEADS}}}": "0x180",
    f'merger_attempts_total{{{LEADS},outcome="lost"}}': "0x180",
    f'merger_attempts_total{{{API},outcome="failed"}}': "0+1x180",
    f"merger_dispatcher_lease_losses_total{{{LEADS}}}": "0x180",
    f'merger_http_seconds_count{{{READ},status="200"}}': "0+600x180",
    f'merger_http_seconds_count{{{READ},status="503"}}': "0+10x180",
    f'merger_http_seconds_bucket{{{READ},status="200",le="0.5"}}': "0+590x180",
    f'merger_http_seconds_bucket{{{READ},status="200",le="2.5"}}': "0+600x180",
    f'merger_http_seconds_bucket{{{READ},status="200",le="+Inf"}}': "0+600x180",
    f"ray_node_mem_used{{{HEAD}}}": "5x180",
    f"ray_node_mem_total{{{HEAD}}}": "6x180",
    f"ray_node_mem_used{{{WORKER}}}": "99x180",
    f"ray_node_mem_total{{{WORKER}}}": "100x180",
    f"kubelet_volume_stats_available_bytes{{{CLAIM}}}": "50x180",
    f"kubelet_volume_stats_capacity_bytes{{{CLAIM}}}": "100x180",
    f"kubelet_volume_stats_available_bytes{{{STRANGE}}}": "1x180",
    f"kubelet_volume_stats_capacity_bytes{{{STRANGE}}}": "100x180",
}
# What makes an alert fire; None takes a series away.
FIRING: list[tuple[str, dict[str, str | None]]] = [
    ("MergerApiDown", {f"up{{{API}}}": "0x180"}),
    ("MergerApiDown", {f"up{{{API}}}": None}),
    ("MergerDispatcherDown", {f"merger_dispatcher_leading{{{LEADS}}}": "0x180"}),
    (
        "MergerDispatcherDown",
        {f"merger_dispatcher_leading{{{LEADS}}}": None, f"merger_dispatcher_leading{{{STANDS_BY}}}": None},
    ),
    ("MergerDispatcherStuck", {f"merger_dispatcher_round_timestamp_seconds{{{LEADS}}}": "600x180"}),
    ("MergerDatabaseDown", {f"merger_database_up{{{LEADS}}}": "0x180"}),
    ("MergerRayDown", {f"merger_ray_up{{{API}}}": "0x180"}),
    ("MergerQueueOld", {f"merger_queue_age_seconds{{{API}}}": "0+60x180"}),
    ("MergerJobFitsNoNode", {f"merger_jobs_without_node{{{LEADS}}}": "1x180"}),
    ("MergerJobsFailing", {f'merger_jobs{{{API},state="failed"}}': "3x120 4x60"}),
    ("MergerAttemptsLost", {f'merger_attempts_total{{{LEADS},outcome="lost"}}': "0x120 0+1x60"}),
    ("MergerLeaseChanges", {f"merger_dispatcher_lease_losses_total{{{LEADS}}}": "0x120 0+1x60"}),
    ("MergerApiErrors", {f'merger_http_seconds_count{{{READ},status="503"}}': "0+60x180"}),
    ("MergerApiSlow", {f'merger_http_seconds_bucket{{{READ},status="200",le="0.5"}}': "0+500x180"}),
    ("MergerRayHeadMemory", {f"ray_node_mem_used{{{HEAD}}}": "5.5x180"}),
    ("MergerVolumeFull", {f"kubelet_volume_stats_available_bytes{{{CLAIM}}}": "9x180"}),
]


@pytest.fixture(scope="module")
def promtool(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs Prometheus's own tool (Debian has it in its package prometheus) in a folder with the rules."""
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed")
    folder = tmp_path_factory.mktemp("rules")

    def run(name: str, content: object, *arguments: str) -> subprocess.CompletedProcess[str]:
        (folder / name).write_text(yaml.safe_dump(content))
        return subprocess.run([tool, *arguments, name], cwd=folder, check=False, capture_output=True, text=True)

    done = run("rules.yaml", {"groups": [{"name": "merger", "rules": rules()}]}, "check", "rules")
    assert done.returncode == 0, done.stderr
    assert f"{len(rules())} rules found" in done.stdout
    return run


def expect(changes: dict[str, str | None], alerts: set[str], minutes: int = 170) -> dict[str, Any]:
    """A test of promtool: exactly these alerts fire in a world that is healthy but for the changes."""
    series = [{"series": name, "values": values} for name, values in {**HEALTHY, **changes}.items() if values]
    samples = [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in alerts]
    asked = {"expr": 'count by (alertname) (ALERTS{alertstate="firing"})', "eval_time": f"{minutes}m"}
    return {"interval": "1m", "input_series": series, "promql_expr_test": [{**asked, "exp_samples": samples}]}


def suite(*tests: dict[str, Any]) -> dict[str, Any]:
    return {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": list(tests)}


def test_every_alert_fires_for_its_cause_alone_and_none_in_a_healthy_world(promtool: Any) -> None:
    assert {alert for alert, _ in FIRING} == {rule["alert"] for rule in rules()}
    assert {name for _, changes in FIRING for name in changes} <= HEALTHY.keys()
    tests = [expect(changes, {alert}) for alert, changes in FIRING]
    done = promtool("tests.yaml", suite(expect({}, set()), *tests), "test", "rules")
    assert done.returncode == 0, done.stdout + done.stderr
    done = promtool("wrong.yaml", suite(expect({}, {"MergerApiDown"})), "test", "rules")
    assert done.returncode != 0, "the tests of promtool can fail"


def test_alerts_wait_before_they_fire_and_go_when_it_is_over(promtool: Any) -> None:
    down: dict[str, str | None] = {f"up{{{API}}}": "1x60 0x10 1x110"}
    tests = [expect(down, alerts, at) for at, alerts in ((62, set()), (69, {"MergerApiDown"}), (75, set()))]
    done = promtool("time.yaml", suite(*tests), "test", "rules")
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_understands_the_expressions_of_the_dashboard(promtool: Any) -> None:
    told = [expr.replace("$namespace", "models").replace("$release", "demo-merger") for expr in expressions().values()]
    listed = [{"record": f"merger:test{i}", "expr": expr} for i, expr in enumerate(told)]
    done = promtool("dashboard.yaml", {"groups": [{"name": "panels", "rules": listed}]}, "check", "rules")
    assert done.returncode == 0, done.stderr
    done = promtool(
        "broken.yaml", {"groups": [{"name": "p", "rules": [{"record": "x", "expr": "sum("}]}]}, "check", "rules"
    )
    assert done.returncode != 0


@pytest.mark.slow
def test_ray_has_the_metrics_that_expressions_read() -> None:
    import httpx2

    cluster = Cluster()
    try:
        cluster.start_head()
        cluster.start_node(2)
        told = cluster.folder / "prom_metrics_service_discovery.json"  # Ray's own list for Prometheus

        def complete() -> bool:
            found: dict[str, set[str]] = {}
            for target in json.loads(told.read_text())[0]["targets"] if told.exists() else []:
                text = httpx2.get(f"http://{target}/metrics", trust_env=False).text
                for name, labels in re.findall(r"^([a-z_]+)\{(.*)\} ", text, flags=re.MULTILINE):
                    found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
            return all(found.get(name, set()) >= labels and name in found for name, labels in RAY.items())

        until(complete, 60, 0.5)
    finally:
        cluster.stop()

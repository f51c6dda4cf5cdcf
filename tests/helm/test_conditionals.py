"""Every condition in the templates is seen both ways: values with which it holds and does not, and what shows it.

Those of NOTES.txt and of refusals stand in files of their own, which are tables too. The conditions of Ray, the storage
and the monitoring have other tests.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.helm.cases import (
    BUNDLED,
    INGRESSES,
    KEDA,
    LOAD_BALANCER,
    OWN_KEYS,
    POLICIES_OFF,
    ROUTES,
    SCALED,
    TRACED,
    Values,
    merged,
    nested,
)
from tests.helm.chart import CHART, Object, changed, every, find, pod, render
from tests.helm.test_notes import NOTES
from tests.helm.test_refusals import LOOKUPS, REFUSALS

TEMPLATES = CHART / "templates"
ELSEWHERE = ("_ray", "_storage", "ray/", "storage/", "monitoring/", "_monitoring")
CONDITION = re.compile(r"\{\{-? *(?:else )?((?:if|with|range) [^}]*?) *-?\}\}")


def conditions() -> set[tuple[str, str]]:
    """Every condition as (file below templates/, text)."""
    files = [path for path in TEMPLATES.rglob("*") if path.is_file()]
    names = {path: path.relative_to(TEMPLATES).as_posix() for path in files}
    return {
        (name, found[1])
        for path, name in names.items()
        if not name.startswith(ELSEWHERE)
        for found in CONDITION.finditer(path.read_text())
    }


def _seen(objects: list[Object], where: tuple[Any, ...]) -> Any:
    """What stands at (kind, end of the name, keys and indices...), or nothing."""
    kind, name, *path = where
    found: Any = next(iter(every(objects, kind, name)), None)
    for key in path:
        if isinstance(found, list) and isinstance(key, str):
            found = next((each for each in found if each.get("name") == key), None)
        elif found is not None:
            found = found.get(key) if isinstance(found, dict) else (found[key : key + 1] or [None])[0]
    return found


# ---- objects and fields: (file, condition), values with it, values without it, where it shows ----

API, DISPATCHER = ("Deployment", "-api"), ("Deployment", "-dispatcher")
POD = ("spec", "template", "spec")
SERVICE, INGRESS, ROUTE = ("Service", "-api", "spec"), ("Ingress", "-api"), ("HTTPRoute", "-api")
HPA, STATEFUL = ("HorizontalPodAutoscaler", "-api"), ("StatefulSet", "-postgresql")
API_INGRESS = ("NetworkPolicy", "-api", "spec", "ingress", 0, "from")

Case = tuple[str, str, Values, Values, tuple[Any, ...]]
CASES: list[Case] = [
    (
        "api/deployment.yaml",
        "if not (or .Values.api.autoscaling.enabled .Values.api.keda.enabled)",
        {},
        SCALED,
        (*API, "spec", "replicas"),
    ),
    ("api/scaledobject.yaml", "with .Values.api.keda", KEDA, {}, ("ScaledObject", "-api")),
    ("api/scaledobject.yaml", "if .enabled", KEDA, {}, ("ScaledObject", "-api")),
    (
        "_pod.tpl",
        'if and .root.Values.monitoring.telemetry.enabled (has .component (list "api" "dispatcher"))',
        TRACED,
        {},
        (*DISPATCHER, *POD, "containers", 0, "env", "OTEL_SERVICE_NAME"),
    ),
    (
        "_pod.tpl",
        "range $name, $value := .root.Values.monitoring.telemetry.env",
        merged(TRACED, {"monitoring": {"telemetry": {"env": {"OTEL_TRACES_SAMPLER": "always_off"}}}}),
        TRACED,
        (*API, *POD, "containers", 0, "env", "OTEL_TRACES_SAMPLER"),
    ),
    (
        "api/deployment.yaml",
        "with .Values.api.extraContainers",
        {"api": {"extraContainers": [{"name": "beside"}]}},
        {},
        (*API, *POD, "containers", "beside"),
    ),
    (
        "dispatcher/deployment.yaml",
        "with .Values.dispatcher.extraContainers",
        {"dispatcher": {"extraContainers": [{"name": "beside"}]}},
        {},
        (*DISPATCHER, *POD, "containers", "beside"),
    ),
    ("api/hpa.yaml", "with .Values.api.autoscaling", SCALED, {}, HPA),
    ("api/hpa.yaml", "if .enabled", SCALED, {}, HPA),
    (
        "api/hpa.yaml",
        "with .behavior",
        {"api": {"autoscaling": {"enabled": True, "behavior": {"scaleDown": {"stabilizationWindowSeconds": 600}}}}},
        SCALED,
        (*HPA, "spec", "behavior"),
    ),
    ("api/networkpolicy.yaml", "if .Values.networkPolicy.enabled", {}, POLICIES_OFF, ("NetworkPolicy", "-api")),
    (
        "api/networkpolicy.yaml",
        "with .Values.networkPolicy.extraEgress",
        {"networkPolicy": {"extraEgress": [{"ports": [{"port": 9000}]}]}},
        {},
        ("NetworkPolicy", "-api", "spec", "egress", 4),
    ),
    (
        "api/networkpolicy.yaml",
        "with .Values.networkPolicy.ingressFrom",
        {"networkPolicy": {"ingressFrom": [{"podSelector": {}}]}},
        {},
        (*API_INGRESS, 1),
    ),
    (
        "api/networkpolicy.yaml",
        "with concat .Values.networkPolicy.ingressNamespaces .Values.networkPolicy.monitoringNamespaces",
        {"networkPolicy": {"ingressNamespaces": ["ingress"]}},
        {},
        (*API_INGRESS, 1, "namespaceSelector"),
    ),
    (
        "dispatcher/networkpolicy.yaml",
        "if .Values.networkPolicy.enabled",
        {},
        POLICIES_OFF,
        ("NetworkPolicy", "-dispatcher"),
    ),
    (
        "dispatcher/networkpolicy.yaml",
        "with .Values.networkPolicy.monitoringNamespaces",
        {"networkPolicy": {"monitoringNamespaces": ["monitoring"]}},
        {},
        ("NetworkPolicy", "-dispatcher", "spec", "ingress"),
    ),
    (
        "migrations/networkpolicy.yaml",
        "if and .Values.networkPolicy.enabled .Values.migrations.enabled",
        {},
        {"migrations": {"enabled": False}},
        ("NetworkPolicy", "-migrations"),
    ),
    (
        "migrations/networkpolicy.yaml",
        "if and .Values.networkPolicy.enabled .Values.migrations.enabled",
        {},
        POLICIES_OFF,
        ("NetworkPolicy", "-migrations"),
    ),
    (
        "smoke/networkpolicy.yaml",
        "if and .Values.networkPolicy.enabled .Values.smoke.enabled",
        {},
        {"smoke": {"enabled": False}},
        ("NetworkPolicy", "-smoke"),
    ),
    (
        "smoke/networkpolicy.yaml",
        "if and .Values.networkPolicy.enabled .Values.smoke.enabled",
        {},
        POLICIES_OFF,
        ("NetworkPolicy", "-smoke"),
    ),
    ("network/policy.yaml", "if .Values.networkPolicy.enabled", {}, POLICIES_OFF, ("NetworkPolicy", "demo-merger")),
    (
        "api/poddisruptionbudget.yaml",
        "if .Values.api.podDisruptionBudget.enabled",
        {},
        {"api": {"podDisruptionBudget": {"enabled": False}}},
        ("PodDisruptionBudget", "-api"),
    ),
    (
        "dispatcher/poddisruptionbudget.yaml",
        "if .Values.dispatcher.podDisruptionBudget.enabled",
        {},
        {"dispatcher": {"podDisruptionBudget": {"enabled": False}}},
        ("PodDisruptionBudget", "-dispatcher"),
    ),
    *(
        (
            f"{component}/serviceaccount.yaml",
            f"if {condition}",
            {},
            off,
            ("ServiceAccount", f"-{component}"),
        )
        for component, condition, off in (
            ("api", "not .Values.api.serviceAccount.name", {"api": {"serviceAccount": {"name": "own"}}}),
            (
                "dispatcher",
                "not .Values.dispatcher.serviceAccount.name",
                {"dispatcher": {"serviceAccount": {"name": "own"}}},
            ),
            (
                "migrations",
                "and .Values.migrations.enabled (not .Values.migrations.serviceAccount.name)",
                {"migrations": {"serviceAccount": {"name": "own"}}},
            ),
            (
                "migrations",
                "and .Values.migrations.enabled (not .Values.migrations.serviceAccount.name)",
                {"migrations": {"enabled": False}},
            ),
            (
                "smoke",
                "and .Values.smoke.enabled (not .Values.smoke.serviceAccount.name)",
                {"smoke": {"serviceAccount": {"name": "own"}}},
            ),
            (
                "smoke",
                "and .Values.smoke.enabled (not .Values.smoke.serviceAccount.name)",
                {"smoke": {"enabled": False}},
            ),
        )
    ),
    (
        "extra.yaml",
        "range .Values.extraObjects",
        {"extraObjects": [{"kind": "Other", "metadata": {"name": "x"}}]},
        {},
        ("Other", "x"),
    ),
    ("migrations/job.yaml", "if .Values.migrations.enabled", {}, {"migrations": {"enabled": False}}, ("Job", "")),
    (
        "migrations/job.yaml",
        'if include "merger.migrations.hook" .',
        {},
        {"migrations": {"useHelmHooks": False}},
        ("Job", "", "metadata", "annotations", "helm.sh/hook"),
    ),
    (
        "_migrations.tpl",
        "if and .Values.migrations.useHelmHooks (not .Values.postgresql.enabled)",
        {},
        {"migrations": {"useHelmHooks": False}},
        ("Job", "demo-merger-migrations"),
    ),
    (
        "_migrations.tpl",
        "if and .Values.migrations.useHelmHooks (not .Values.postgresql.enabled)",
        {},
        BUNDLED,
        ("Job", "demo-merger-migrations"),
    ),
    (
        "_migrations.tpl",
        'if include "merger.migrations.hook" .root',
        {},
        {"migrations": {"useHelmHooks": False}},
        ("ServiceAccount", "-migrations", "metadata", "annotations"),
    ),
    (
        "_migrations.tpl",
        'if not (include "merger.migrations.hook" .)',
        {"migrations": {"useHelmHooks": False}},
        {},
        ("Job", "", "spec", "ttlSecondsAfterFinished"),
    ),
    (
        "_migrations.tpl",
        "with .Values.migrations.extraEnvFrom",
        {"migrations": {"extraEnvFrom": [{"secretRef": {"name": "own"}}]}},
        {},
        ("Job", "", *POD, "containers", 0, "envFrom"),
    ),
    ("network/httproute.yaml", "if .Values.httpRoute.enabled", ROUTES, {}, ROUTE),
    *(
        (
            "network/httproute.yaml",
            f"with .Values.httpRoute.{name}",
            merged(ROUTES, {"httpRoute": {name: value}}),
            ROUTES,
            (*ROUTE, *path),
        )
        for name, value, path in (
            ("annotations", {"example.org/a": "b"}, ("metadata", "annotations")),
            ("filters", [{"type": "URLRewrite"}], ("spec", "rules", 0, "filters")),
            ("hostnames", ["merger.example.org"], ("spec", "hostnames")),
            ("timeouts", {"request": "0s"}, ("spec", "rules", 0, "timeouts")),
        )
    ),
    ("network/ingress.yaml", "if .Values.ingress.enabled", INGRESSES, {}, INGRESS),
    (
        "network/ingress.yaml",
        "range .Values.ingress.hosts",
        merged(INGRESSES, {"ingress": {"hosts": ["first.example.org", "second.example.org"]}}),
        INGRESSES,
        (*INGRESS, "spec", "rules", 1),
    ),
    *(
        (
            "network/ingress.yaml",
            f"with .Values.ingress.{name}",
            merged(INGRESSES, {"ingress": {name: value}}),
            INGRESSES,
            (*INGRESS, *path),
        )
        for name, value, path in (
            ("annotations", {"example.org/a": "b"}, ("metadata", "annotations")),
            ("className", "nginx", ("spec", "ingressClassName")),
            ("tls", [{"secretName": "tls"}], ("spec", "tls")),
        )
    ),
    *(
        (
            "network/service.yaml",
            f"with .Values.service.{name}",
            merged(LOAD_BALANCER, {"service": {name: value}}),
            LOAD_BALANCER,
            where,
        )
        for name, value, where in (
            ("annotations", {"example.org/a": "b"}, ("Service", "-api", "metadata", "annotations")),
            ("loadBalancerClass", "example.org/balancer", (*SERVICE, "loadBalancerClass")),
            ("loadBalancerSourceRanges", ["192.0.2.0/24"], (*SERVICE, "loadBalancerSourceRanges")),
            ("nodePort", 30080, (*SERVICE, "ports", 0, "nodePort")),
        )
    ),
    *(
        (f"postgresql/{file}.yaml", "if .Values.postgresql.enabled", BUNDLED, {}, where)
        for file, where in (
            ("secret", ("Secret", "-database")),
            ("service", ("Service", "-postgresql")),
            ("serviceaccount", ("ServiceAccount", "-postgresql")),
            ("statefulset", STATEFUL),
        )
    ),
    (
        "postgresql/networkpolicy.yaml",
        "if and .Values.networkPolicy.enabled .Values.postgresql.enabled",
        BUNDLED,
        {},
        ("NetworkPolicy", "-postgresql"),
    ),
    (
        "postgresql/networkpolicy.yaml",
        "if and .Values.networkPolicy.enabled .Values.postgresql.enabled",
        BUNDLED,
        merged(BUNDLED, POLICIES_OFF),
        ("NetworkPolicy", "-postgresql"),
    ),
    *(
        (
            "postgresql/statefulset.yaml",
            f"with .Values.postgresql.{name}",
            merged(BUNDLED, nested(f"postgresql.{name}", value)),
            BUNDLED,
            (*STATEFUL, "spec", *path),
        )
        for name, value, path in (
            ("nodeSelector", {"a": "b"}, ("template", "spec", "nodeSelector")),
            ("tolerations", [{"key": "a"}], ("template", "spec", "tolerations")),
            ("storage.className", "fast", ("volumeClaimTemplates", 0, "spec", "storageClassName")),
        )
    ),
    (
        "settings/keys.yaml",
        "if not (and .Values.auth.apiKey.existingSecret .Values.auth.secretKeys.existingSecret)",
        {},
        OWN_KEYS,
        ("Secret", "-keys"),
    ),
    (
        "settings/keys.yaml",
        "if not .Values.auth.apiKey.existingSecret",
        {},
        {"auth": {"apiKey": {"existingSecret": "own"}}},
        ("Secret", "-keys", "data", "api-key"),
    ),
    (
        "settings/keys.yaml",
        "if not .Values.auth.secretKeys.existingSecret",
        {},
        {"auth": {"secretKeys": {"existingSecret": "own"}}},
        ("Secret", "-keys", "data", "secret-keys"),
    ),
    ("smoke/pod.yaml", "if .Values.smoke.enabled", {}, {"smoke": {"enabled": False}}, ("Pod", "-smoke")),
    (
        "_settings.tpl",
        "range $name, $value := .Values.settings",
        {"settings": {"max_running": 3}},
        {},
        ("ConfigMap", "-settings", "data", "MERGER_MAX_RUNNING"),
    ),
    (
        "_policies.tpl",
        "if .Values.postgresql.enabled",
        BUNDLED,
        {},
        ("NetworkPolicy", "-api", "spec", "egress", 1, "to", 0, "podSelector"),
    ),
    (
        "_policies.tpl",
        "if .Values.networkPolicy.databaseTo",
        {"networkPolicy": {"databaseTo": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}},
        {},
        ("NetworkPolicy", "-api", "spec", "egress", 1, "to", 0, "ipBlock"),
    ),
    *(
        (
            "_policies.tpl",
            f"with .Values.networkPolicy.{name}",
            {},
            {"networkPolicy": {name: []}},
            ("NetworkPolicy", "-api", "spec", "egress", 3, "to", block, "ipBlock", "except"),
        )
        for name, block in (("httpsExcept", 0), ("httpsExcept6", 1))
    ),
    (
        "_policies.tpl",
        "with .annotations",
        {},
        {"migrations": {"useHelmHooks": False}},
        ("NetworkPolicy", "-migrations", "metadata", "annotations"),
    ),
    (
        "_helpers.tpl",
        "with .root.Values.commonLabels",
        {"commonLabels": {"a": "b"}},
        {},
        (*API, "metadata", "labels", "a"),
    ),
    (
        "_pod.tpl",
        "with merge (dict) .root.Values.commonLabels (default dict .values.podLabels)",
        {"commonLabels": {"a": "b"}},
        {},
        (*API, "spec", "template", "metadata", "labels", "a"),
    ),
    (
        "_pod.tpl",
        "with .Values.image.pullSecrets",
        {"image": {"pullSecrets": ["registry"]}},
        {},
        (*API, *POD, "imagePullSecrets"),
    ),
    (
        "_pod.tpl",
        "range .",
        {"image": {"pullSecrets": ["a", "b"]}},
        {"image": {"pullSecrets": ["a"]}},
        (*API, *POD, "imagePullSecrets", 1),
    ),
    (
        "_pod.tpl",
        "with mergeOverwrite (deepCopy .values.serviceAccount.annotations) (default dict .annotations)",
        {"api": {"serviceAccount": {"annotations": {"a": "b"}}}},
        {},
        ("ServiceAccount", "-api", "metadata", "annotations"),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}: {case[1]} {list(case[3])}")
def test_a_condition_shows(case: Case) -> None:
    _, _, on, off, where = case
    assert _seen(render(on, scenario="minimal"), where) is not None
    assert _seen(render(off, scenario="minimal"), where) is None


# ---- fields of the pods, for every component that has them ----

COMPONENTS = {"api": "-api", "dispatcher": "-dispatcher", "migrations": "-migrations", "smoke": "-smoke"}
NAMED = [{"name": "other"}]
FIELDS: dict[str, tuple[str, Any, tuple[Any, ...]]] = {
    "with .values.priorityClassName": ("priorityClassName", "high", ("spec", "priorityClassName")),
    "with .values.nodeSelector": ("nodeSelector", {"a": "b"}, ("spec", "nodeSelector")),
    "with .values.tolerations": ("tolerations", [{"key": "a"}], ("spec", "tolerations")),
    "with .values.affinity": ("affinity", {"nodeAffinity": {}}, ("spec", "affinity")),
    "with .values.extraInitContainers": ("extraInitContainers", NAMED, ("spec", "initContainers", "other")),
    "with .values.extraEnv": ("extraEnv", NAMED, ("spec", "containers", 0, "env", "other")),
    "with .values.extraEnvFrom": ("extraEnvFrom", NAMED, ("spec", "containers", 0, "envFrom", "other")),
    "with .values.extraVolumes": ("extraVolumes", NAMED, ("spec", "volumes", "other")),
    "with .values.extraVolumeMounts": ("extraVolumeMounts", NAMED, ("spec", "containers", 0, "volumeMounts", "other")),
    "with merge (dict) (default dict .annotations) .values.podAnnotations": (
        "podAnnotations",
        {"a": "b"},
        ("metadata", "annotations", "a"),
    ),
    "podLabels": ("podLabels", {"a": "b"}, ("metadata", "labels", "a")),
}


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("condition", FIELDS)
def test_a_field_of_pods_shows(component: str, condition: str) -> None:
    field, value, path = FIELDS[condition]
    for values, expected in (({component: {field: value}}, True), ({}, False)):
        found = pod(render(values, scenario="minimal"), COMPONENTS[component])
        here: list[Object] = [
            {"kind": "Pod", "metadata": {"name": ""}, "pod": {"metadata": found.metadata, "spec": found.spec}}
        ]
        assert (_seen(here, ("Pod", "", "pod", *path)) is not None) is expected
        others = [end for name, end in COMPONENTS.items() if name != component]
        assert all("other" not in str(pod(render(values, scenario="minimal"), end).spec) for end in others)


@pytest.mark.parametrize("component", ["api", "dispatcher"])
def test_pods_spread_softly_unless_told_otherwise(component: str) -> None:
    own = {"topologyKey": "{{ .Release.Name }}", "maxSkew": 7}
    spread = pod(render(scenario="minimal"), f"-{component}").spec["topologySpreadConstraints"]
    assert [each["whenUnsatisfiable"] for each in spread] == ["ScheduleAnyway"]
    values = {component: {"topologySpreadConstraints": [own]}}
    told = pod(render(values, scenario="minimal"), f"-{component}").spec["topologySpreadConstraints"]
    assert told == [{"topologyKey": "demo", "maxSkew": 7}]


def test_annotations_of_the_chart_stand_beside_those_of_the_values() -> None:
    values = {"api": {"podAnnotations": {"a": "b", "checksum/settings": "mine"}}}
    annotations = pod(render(values, scenario="minimal"), "-api").metadata["annotations"]
    assert annotations["a"] == "b"
    assert len(annotations["checksum/settings"]) == 64
    dispatcher = render({"migrations": {"podAnnotations": {}}}, scenario="minimal")
    assert "annotations" not in pod(dispatcher, "-migrations").metadata


# ---- names, images and numbers ----


@pytest.mark.parametrize(
    ("release", "values", "expected"),
    [
        ("demo", {}, "demo-merger"),
        ("merger", {}, "merger"),
        ("my-merger-2", {}, "my-merger-2"),
        ("demo", {"nameOverride": "fusion"}, "demo-fusion"),
        ("demo", {"fullnameOverride": "fusion"}, "fusion"),
    ],
)
def test_names_follow_the_release(release: str, values: Values, expected: str) -> None:
    assert (
        find(render(values, scenario="minimal", release=release), "Service", "-api")["metadata"]["name"]
        == f"{expected}-api"
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "ghcr.io/merger/merger:0.1.0"),
        ({"image": {"tag": "edge"}}, "ghcr.io/merger/merger:edge"),
        ({"image": {"registry": ""}}, "merger/merger:0.1.0"),
        ({"image": {"tag": "edge", "digest": f"sha256:{'0' * 64}"}}, f"ghcr.io/merger/merger@sha256:{'0' * 64}"),
        ({"global": {"imageRegistry": "mirror:5000"}}, "mirror:5000/merger/merger:0.1.0"),
    ],
)
def test_images(values: Values, expected: str) -> None:
    objects = render(values, scenario="minimal")
    images = {pod(objects, end).spec["containers"][0]["image"] for end in COMPONENTS.values()}
    assert images == {expected}


@pytest.mark.parametrize(("value", "text"), [(4294967296, "4294967296"), (1.5, "1.5"), (7.0, "7"), (1e-05, "1e-05")])
def test_numbers_are_printed_whole(value: float, text: str) -> None:
    settings = find(render({"settings": {"runner_cpus": value}}, scenario="minimal"), "ConfigMap", "-settings")["data"]
    assert settings["MERGER_RUNNER_CPUS"] == text
    assert (
        find(render({"settings": {"python": "1.50"}}, scenario="minimal"), "ConfigMap", "-settings")["data"][
            "MERGER_PYTHON"
        ]
        == "1.50"
    )


PARTS = [
    ('include "merger.ray.nodeShapes" .', "MERGER_NODE_SHAPES", '"[]"'),
    ('include "merger.ray.tokenSecret" .', "MERGER_RAY_TOKEN", '"token"'),
    ('include "merger.storage.env" .', "MERGER_TRIED", '"- {name: MERGER_TRIED, value: x}"'),
]


@pytest.mark.parametrize(
    ("part", "variable", "instead"), PARTS, ids=lambda part: part if part.startswith("MERGER") else ""
)
def test_variables_of_ray_and_storage_are_there_where_these_say_so(
    tmp_path: Path, part: str, variable: str, instead: str
) -> None:
    for folder, text, expected in (("with", instead, True), ("without", '""', False)):
        chart = changed(tmp_path / folder, {"_settings.tpl": (part, text)})
        objects = render(scenario="minimal", chart=chart)
        api = pod(objects, "-api").spec["containers"][0]["env"]
        names = {each["name"] for each in api} | find(objects, "ConfigMap", "-settings")["data"].keys()
        assert (variable in names) is expected


def test_sources_of_variables_of_the_storage(tmp_path: Path) -> None:
    part = 'include "merger.storage.envFrom" .root'
    for folder, text, count in (("with", '"- {secretRef: {name: store}}"', 2), ("without", '""', 1)):
        chart = changed(tmp_path / folder, {"_pod.tpl": (part, text)})
        assert len(pod(render(scenario="minimal", chart=chart), "-api").spec["containers"][0]["envFrom"]) == count


# ---- the tables are whole ----

TESTED = {
    ("_pod.tpl", "if .values.topologySpreadConstraints"),
    ("_pod.tpl", 'with include "merger.storage.envFrom" .root'),
    *(("_settings.tpl", f"with {part}") for part, _, _ in PARTS),
    ("_settings.tpl", 'if and (kindIs "float64" .) (eq (floor .) .)'),
    ("_helpers.tpl", "if .Values.fullnameOverride"),
    ("_helpers.tpl", "if contains $name .Release.Name"),
    ("_helpers.tpl", "if .image.digest"),
    ("_validation.tpl", "with .Values.database.existingSecret"),  # off where the database is the bundled one
    ("smoke/pod.yaml", 'if eq (dig "mode" "" (default dict .Values.storage)) "hub"'),
    ("postgresql/networkpolicy.yaml", 'range list "api" "dispatcher" "migrations"'),  # of constants
}


def test_every_condition_of_the_templates_is_in_a_table() -> None:
    tables = {(file, condition) for file, condition, *_ in CASES} | TESTED
    tables |= {("_pod.tpl", condition) for condition in FIELDS if condition != "podLabels"}
    tables |= {("_validation.tpl", condition) for condition in (*LOOKUPS, *(each[0] for each in REFUSALS))}
    tables |= {("NOTES.txt", condition) for condition in NOTES}
    found = conditions()
    assert len(found) > 100
    assert tables == found


def test_a_new_condition_would_be_missed() -> None:
    assert CONDITION.findall("{{- if .Values.new }}{{ else if (eq 1 2) -}}{{- with .x }}") == [
        "if .Values.new",
        "if (eq 1 2)",
        "with .x",
    ]

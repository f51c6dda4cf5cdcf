"""What each object of the chart is for: how pods are replaced, what keys look like, what changes when values do."""

import base64
from typing import Any
from urllib.parse import urlsplit

import pytest
from cryptography.fernet import Fernet

from tests.helm.cases import BUNDLED, Values, merged
from tests.helm.chart import Object, every, find, pod, pods, render


def _decoded(secret: Object) -> dict[str, str]:
    return {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}


def _annotations(object_: Object) -> dict[str, str]:
    return object_["metadata"].get("annotations") or {}


@pytest.mark.parametrize("name", ["-api", "-dispatcher"])
def test_new_pods_are_ready_before_old_ones_go(name: str) -> None:
    strategy = find(render(scenario="minimal"), "Deployment", name)["spec"]["strategy"]
    assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}


def test_requests_in_flight_end_before_the_process() -> None:
    values = {"api": {"preStopSeconds": 12, "terminationGracePeriodSeconds": 99}}
    spec = pod(render(values, scenario="minimal"), "-api").spec
    assert spec["terminationGracePeriodSeconds"] == 99
    assert spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "12"]


def test_a_slow_start_is_no_death() -> None:
    """Until the startup probe has passed, the others are not asked."""
    for name in ("api", "dispatcher"):
        container = pod(render({name: {"startSeconds": 300}}, scenario="minimal"), f"-{name}").spec["containers"][0]
        startup = container["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] == 300


def test_new_settings_replace_pods_and_the_same_ones_do_not() -> None:
    def checksums(values: Values) -> set[str]:
        objects = render(values, scenario="minimal")
        return {pod(objects, name).metadata["annotations"]["checksum/settings"] for name in ("-api", "-dispatcher")}

    assert len(checksums({})) == 1
    assert checksums({}) == checksums({"api": {"replicas": 5}})
    assert checksums({}) != checksums({"settings": {"max_running": 9}})


def test_keys_that_are_made_are_keys() -> None:
    secret = find(render(scenario="minimal"), "Secret", "-keys")
    keys = _decoded(secret)
    assert keys["api-key"].startswith("mk_")
    assert len(keys["api-key"]) > 50
    sealed = Fernet(keys["secret-keys"]).encrypt(b"token")
    assert Fernet(keys["secret-keys"]).decrypt(sealed) == b"token"
    assert _annotations(secret) == {"helm.sh/resource-policy": "keep"}


def test_the_bundled_database_is_the_one_that_the_url_names() -> None:
    objects = render(BUNDLED)
    secret, stateful = find(objects, "Secret", "-database"), find(objects, "StatefulSet", "-postgresql")
    held = _decoded(secret)
    url = urlsplit(held["url"])
    service = find(objects, "Service", url.hostname or "?")
    assert service["spec"]["clusterIP"] == "None"
    assert stateful["spec"]["serviceName"] == service["metadata"]["name"]
    assert url.port == service["spec"]["ports"][0]["port"]
    environment = {each["name"]: each for each in pod(objects, "-postgresql").spec["containers"][0]["env"]}
    assert url.password == held["password"]
    assert environment["POSTGRES_PASSWORD"]["valueFrom"]["secretKeyRef"]["key"] == "password"
    assert url.username == environment["POSTGRES_USER"]["value"]
    assert url.path == f"/{environment['POSTGRES_DB']['value']}"
    assert _annotations(secret)["helm.sh/resource-policy"] == "keep"


def test_migrations_come_before_what_needs_them() -> None:
    objects = render(scenario="minimal")
    job = find(objects, "Job")
    assert _annotations(job)["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert _annotations(job)["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded"
    assert not [each for each in every(objects, "Deployment") if _annotations(each)]
    names = {each["name"] for each in pod(objects, "-migrations").spec["containers"][0]["env"]}
    assert {name for name in names if name.startswith("MERGER_")} == {"MERGER_DATABASE_URL"}


@pytest.mark.parametrize("values", [BUNDLED, {"migrations": {"useHelmHooks": False}}])
def test_a_plain_job_has_another_name_where_it_is_another(values: Values) -> None:
    """A Job's template can never be changed."""

    def job(more: Values) -> Object:
        return find(render(merged(values, more), scenario="minimal"), "Job")

    assert "annotations" not in job({})["metadata"]
    assert job({})["metadata"]["name"] == job({"api": {"replicas": 4}})["metadata"]["name"]
    assert job({})["metadata"]["name"] != job({"image": {"tag": "next"}})["metadata"]["name"]
    assert job({})["spec"]["template"] == job({"api": {"replicas": 4}})["spec"]["template"]


def test_the_smoke_test_asks_the_service_and_runners_the_address_that_they_are_told() -> None:
    objects = render({"api": {"url": "https://merger.example.org"}, "service": {"port": 80}}, scenario="minimal")
    assert find(objects, "ConfigMap", "-settings")["data"]["MERGER_URL"] == "https://merger.example.org"
    smoke = pod(objects, "-smoke")
    variables = {each["name"]: each.get("value") for each in smoke.spec["containers"][0]["env"]}
    assert variables["MERGER_URL"] == "http://demo-merger-api:80"
    assert smoke.spec["containers"][0]["args"] == ["--seconds", "840"]
    assert smoke.spec["activeDeadlineSeconds"] == 900
    assert smoke.spec["restartPolicy"] == "Never"
    assert _annotations(smoke.owner)["helm.sh/hook"] == "test"


def test_a_service_without_storage_is_asked_for_a_plan() -> None:
    assert "--plan-only" in pod(render(scenario="hub-only"), "-smoke").spec["containers"][0]["args"]


def test_values_are_templates_where_they_say_so() -> None:
    objects = render(scenario="all-on")
    assert find(objects, "ConfigMap", "demo-text")["data"] == {"url": "http://demo-merger-api:8080"}
    assert find(objects, "ConfigMap", "demo-more")["data"] == {"EXAMPLE": "1"}
    assert find(objects, "Ingress")["spec"]["rules"][0]["host"] == "merger.models.example.org"
    assert find(objects, "HTTPRoute")["spec"]["hostnames"] == ["merger.models.example.org"]
    environment = pod(objects, "-api").spec["containers"][0]["env"]
    assert {"name": "HTTPS_PROXY", "value": "http://proxy.models:3128"} in environment


def test_labels_are_on_every_object_and_the_version_on_no_pod() -> None:
    """A version on pods would replace them at every upgrade, changed or not."""
    objects = [each for each in render(scenario="all-on") if not each["metadata"]["name"].startswith("demo-text")]
    ours = [each for each in objects if each["metadata"]["name"] != "demo-more"]
    assert len(ours) > 20
    for each in ours:
        assert each["metadata"]["labels"]["team"] == "models", each["metadata"]["name"]
        assert each["metadata"]["labels"]["app.kubernetes.io/instance"] == "demo"
    for each in pods(ours):
        assert each.labels["team"] == "models", each
        assert not {"helm.sh/chart", "app.kubernetes.io/version"} & each.labels.keys(), each


def test_a_drain_can_always_take_a_pod() -> None:
    for name in ("api", "dispatcher"):
        objects = render({name: {"replicas": 1}}, scenario="minimal")
        assert find(objects, "PodDisruptionBudget", f"-{name}")["spec"]["maxUnavailable"] == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"type": "ClusterIP", "ports": [("http", 8080, "http")]}),
        ({"service": {"type": "LoadBalancer", "port": 80}}, {"type": "LoadBalancer", "ports": [("http", 80, "http")]}),
    ],
)
def test_the_service(values: Values, expected: dict[str, Any]) -> None:
    spec = find(render(values, scenario="minimal"), "Service", "-api")["spec"]
    assert spec["type"] == expected["type"]
    assert [(port["name"], port["port"], port["targetPort"]) for port in spec["ports"]] == expected["ports"]


def test_nobody_gets_rights_in_kubernetes() -> None:
    """The service asks no API server; what Ray's autoscaler needs, the operator makes."""
    for scenario in ("minimal", "production", "all-on"):
        kinds = {each["kind"] for each in render(scenario=scenario)}
        assert not kinds & {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}

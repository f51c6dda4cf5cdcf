"""What objects of the chart say of each other, of the application and of Secrets made elsewhere is true."""

import functools
import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from api.app import create_app
from api.dispatcher import Dispatcher
from api.dispatching import create_watched
from api.metrics import Metrics
from api.ray_jobs import RayJobs
from api.settings import Settings
from api.store.memory import MemoryStore
from tests.helm.chart import CHART, SCENARIOS, Object, Pod, every, find, pod, pods, render, selects

COMMANDS = {"api.web", "api.dispatching", "api.smoke", "api.store.migrate"}


def _scenario(name: str) -> list[Object]:
    return render(scenario=name)


def _named_by_hand(scenario: str) -> set[str]:
    """Every word of a scenario's values: names of what the one who installs has made."""
    text = (CHART / "ci" / f"{scenario}-values.yaml").read_text().replace("{{ .Release.Name }}", "demo")
    return set(_words(yaml.safe_load(text)))


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _words(each)
    else:
        yield str(value)


def references(each: Pod) -> Iterator[tuple[str, str, str]]:
    """What a pod reads, as (kind, name, key); no key where it takes all of them."""
    for container in each.containers():
        for variable in container.get("env") or []:
            source = variable.get("valueFrom") or {}
            for kind, field in (("Secret", "secretKeyRef"), ("ConfigMap", "configMapKeyRef")):
                if field in source:
                    yield kind, source[field]["name"], source[field]["key"]
        for source in container.get("envFrom") or []:
            for kind, field in (("Secret", "secretRef"), ("ConfigMap", "configMapRef")):
                if field in source:
                    yield kind, source[field]["name"], ""
    for volume in each.spec.get("volumes") or []:
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"], ""
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"], ""
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], ""


def unresolved(each: Pod, objects: list[Object], outside: set[str]) -> list[str]:
    """What a pod reads that neither the objects hold nor somebody has said to have made."""
    missing = []
    for kind, name, key in references(each):
        made = [one for one in every(objects, kind) if one["metadata"]["name"] == name]
        held = {*(made[0].get("data") or {}), *(made[0].get("stringData") or {})} if made else set()
        if not (made and (not key or key in held)) and (made or name not in outside):
            missing.append(f"{kind} {name} {key}".strip())
    return missing


def _hooks(object_: Object) -> set[str]:
    return set((object_["metadata"].get("annotations") or {}).get("helm.sh/hook", "").split(",")) - {""}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_what_pods_read_is_there(scenario: str) -> None:
    objects, outside = _scenario(scenario), _named_by_hand(scenario)
    assert sum(len(list(references(each))) for each in pods(objects)) > 8
    for each in pods(objects):
        assert not unresolved(each, objects, outside), each


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_hooks_before_an_installation_need_nothing_that_comes_later(scenario: str) -> None:
    objects = _scenario(scenario)
    early = [each for each in objects if "pre-install" in _hooks(each)]
    names = {each["metadata"]["name"] for each in every(early, "ServiceAccount")} | _named_by_hand(scenario)
    for each in pods(early):
        assert not unresolved(each, early, _named_by_hand(scenario)), each
        assert each.spec["serviceAccountName"] in names
    weights = {each["kind"]: int(each["metadata"]["annotations"]["helm.sh/hook-weight"]) for each in early}
    assert all(weight < weights["Job"] for kind, weight in weights.items() if kind != "Job")


def test_a_missing_key_is_seen() -> None:
    objects = _scenario("minimal")
    api = pod(objects, "-api")
    del find(objects, "Secret", "-keys")["data"]["api-key"]
    assert unresolved(api, objects, {"merger-database"}) == ["Secret demo-merger-keys api-key"]
    assert "Secret merger-database url" in unresolved(api, objects, set())


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_service_accounts_are_made_or_named(scenario: str) -> None:
    objects = _scenario(scenario)
    made = {each["metadata"]["name"] for each in every(objects, "ServiceAccount")} | _named_by_hand(scenario)
    for each in pods(objects):
        assert each.owner["kind"] == "RayCluster" or each.spec["serviceAccountName"] in made, each


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_services_have_pods_with_their_ports(scenario: str) -> None:
    objects = _scenario(scenario)
    assert every(objects, "Service")
    for service in every(objects, "Service"):
        chosen = [each for each in pods(objects) if selects({"matchLabels": service["spec"]["selector"]}, each.labels)]
        assert len(chosen) == 1, service["metadata"]["name"]
        names = {port["name"] for container in chosen[0].containers() for port in container.get("ports") or []}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_selectors_take_the_pods_of_their_owner_only(scenario: str) -> None:
    objects = _scenario(scenario)
    for each in pods(objects):
        selector = (each.owner.get("spec") or {}).get("selector")
        if selector:
            assert [str(other) for other in pods(objects) if selects(selector, other.labels)] == [str(each)]
    for budget in every(objects, "PodDisruptionBudget"):
        chosen = [other for other in pods(objects) if selects(budget["spec"]["selector"], other.labels)]
        assert len(chosen) == 1, budget["metadata"]["name"]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_routes_lead_to_a_port_of_a_service(scenario: str) -> None:
    objects = _scenario(scenario)
    ports = {
        (service["metadata"]["name"], name)
        for service in every(objects, "Service")
        for port in service["spec"]["ports"]
        for name in (port["name"], port["port"])
    }
    backends = [
        (path["backend"]["service"]["name"], path["backend"]["service"]["port"]["name"])
        for ingress in every(objects, "Ingress")
        for rule in ingress["spec"]["rules"]
        for path in rule["http"]["paths"]
    ]
    backends += [
        (backend["name"], backend["port"])
        for route in every(objects, "HTTPRoute")
        for rule in route["spec"]["rules"]
        for backend in rule["backendRefs"]
    ]
    assert set(backends) <= ports
    assert backends or scenario not in ("production", "all-on")


def test_a_scaled_deployment_has_no_replicas_of_its_own() -> None:
    objects = _scenario("production")
    scaler = find(objects, "HorizontalPodAutoscaler")["spec"]
    target = find(objects, scaler["scaleTargetRef"]["kind"], scaler["scaleTargetRef"]["name"])
    assert target["apiVersion"] == scaler["scaleTargetRef"]["apiVersion"]
    assert "replicas" not in target["spec"]
    assert find(_scenario("minimal"), "Deployment", "-api")["spec"]["replicas"] == 2


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_probes_ask_routes_of_the_application(scenario: str) -> None:
    for name, routes in _routes().items():
        container = pod(_scenario(scenario), f"-{name}").spec["containers"][0]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["path"] in routes
            assert container[probe]["httpGet"]["port"] in {port["name"] for port in container["ports"]}


@functools.cache
def _routes() -> dict[str, set[str]]:
    """What each application answers to GET."""
    settings, store, ray = Settings(), MemoryStore(), RayJobs("http://127.0.0.1:1", None)
    watched = create_watched(Dispatcher(store, ray, settings), store, Metrics(store, ray))
    apps = {"api": create_app(settings, store, ray), "dispatcher": watched}
    return {
        name: {path for path, ways in app.openapi()["paths"].items() if "get" in ways} for name, app in apps.items()
    }


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_ports_in_arguments_are_those_of_the_container(scenario: str) -> None:
    for each in pods(_scenario(scenario)):
        for container in each.containers():
            arguments = container.get("args") or []
            if "--port" in arguments:
                port = int(arguments[arguments.index("--port") + 1])
                assert [one["containerPort"] for one in container["ports"]] == [port]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_commands_are_modules_that_exist(scenario: str) -> None:
    commands = [container.get("command") or [] for each in pods(_scenario(scenario)) for container in each.containers()]
    modules = {command[2] for command in commands if command[:2] == ["python", "-m"]}
    assert modules >= COMMANDS
    assert not [module for module in modules if not importlib.util.find_spec(module)]


def test_mounts_are_of_volumes_and_volumes_are_mounted() -> None:
    for scenario in SCENARIOS:
        for each in pods(_scenario(scenario)):
            mounts = {mount["name"] for container in each.containers() for mount in container.get("volumeMounts") or []}
            claims = (each.owner["spec"].get("volumeClaimTemplates") or []) if "spec" in each.owner else []
            named = [volume["name"] for volume in each.spec.get("volumes") or []]
            assert len(named) == len(set(named)), each
            assert mounts == {*named, *(claim["metadata"]["name"] for claim in claims)}, each


def test_objects_are_of_the_namespace_and_have_different_names() -> None:
    for scenario in SCENARIOS:
        objects = [each for each in _scenario(scenario) if each["metadata"].get("labels")]
        assert {each["metadata"]["namespace"] for each in objects} == {"models"}
        names = [json.dumps([each["kind"], each["metadata"]["name"]]) for each in objects]
        assert len(names) == len(set(names))
        assert max(len(each["metadata"]["name"]) for each in objects) <= 63

"""Every value of the chart is documented, typed and used; others are refused; settings are the service's own."""

import copy
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema
import pytest
import yaml

from api.settings import Settings
from docs.make_chart import DERIVED, Entry, entries
from tests.helm.cases import KEDA, TRACED
from tests.helm.chart import CHART, SCENARIOS, Object, Refused, every, find, pods, render

VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
ENTRIES = entries((CHART / "values.yaml").read_text())
# Entries that are no section with entries of their own.
LEAVES = [each for each in ENTRIES if not any(other.path[:-1] == each.path for other in ENTRIES)]


def _name(path: object) -> str:
    return ".".join(path) if isinstance(path, tuple) else ""


def _resolved(node: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in node:
        return node
    definition: dict[str, Any] = SCHEMA["definitions"][node["$ref"].rsplit("/", 1)[1]]
    return definition


def _at(path: tuple[str, ...]) -> dict[str, Any]:
    """The part of the schema for a key."""
    node = SCHEMA
    for name in path:
        node = _resolved(node)
        node = node["properties"][name] if name in node.get("properties", {}) else node["additionalProperties"]
    return _resolved(node)


def _sections(node: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every section of the schema that names its keys."""
    node = _resolved(node)
    if "properties" in node:
        yield path
        for name, child in node["properties"].items():
            yield from _sections(child, (*path, name))


def _keys(node: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key that the schema names, but for those of Kubernetes' own structures."""
    for name, child in node.get("properties", {}).items():
        yield (*path, name)
        if "$ref" not in child:
            yield from _keys(child, (*path, name))


def _values(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    return {path[0]: _values(path[1:], value) if path[1:] else value}


def _over(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values over others, as helm lays them."""
    both = dict(base)
    for name, value in values.items():
        old = both.get(name)
        both[name] = _over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


# ---- the schema and the file say the same ----


def test_every_key_of_the_schema_has_a_value() -> None:
    documented = {path[:end] for entry in ENTRIES for path in (entry.path,) for end in range(1, len(path) + 1)}
    named = {path for path in _keys(SCHEMA) if path[0] != "settings"} - {("httpRoute", "timeouts", "request")}
    named -= {("httpRoute", "timeouts", "backendRequest")}
    assert len(named) > 100
    assert named <= documented


def test_every_value_is_in_the_schema_and_right() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.Draft7Validator(SCHEMA).validate(VALUES)
    for entry in ENTRIES:
        assert _at(entry.path)


def test_a_key_without_a_comment_is_seen() -> None:
    text = (CHART / "values.yaml").read_text()
    line = "  # -- Pods of the dispatcher: one leads, others take its place.\n"
    assert line in text
    with pytest.raises(ValueError, match=r"dispatcher\.replicas has no comment"):
        entries(text.replace(line, ""))


@pytest.mark.parametrize("section", list(_sections(SCHEMA)), ids=_name)
def test_unknown_keys_are_refused(section: tuple[str, ...]) -> None:
    if section == ("global",):
        pytest.skip("values that a parent chart shares with all of its charts")
    values = _values((*section, "unknownKey"), 1)
    with pytest.raises(Refused, match="Additional property unknownKey is not allowed"):
        render(values, scenario="minimal")


@pytest.mark.parametrize("entry", LEAVES, ids=lambda entry: _name(entry.path))
def test_values_of_another_type_are_refused(entry: Entry) -> None:
    types = _at(entry.path).get("type")
    wrong = 1.5 if types in ("object", "array", "string", "boolean", "integer") else [[]]
    validator = jsonschema.Draft7Validator(SCHEMA)
    assert validator.is_valid(VALUES)
    assert not validator.is_valid(_over(VALUES, _values(entry.path, wrong)))


REFUSED = [
    ({"api": {"replicas": 0}}, "api.replicas"),
    ({"service": {"port": 70000}}, "service.port"),
    ({"service": {"type": "ExternalName"}}, "service.type"),
    ({"image": {"digest": "sha256:1"}}, "image.digest"),
    ({"image": {"pullPolicy": "Sometimes"}}, "image.pullPolicy"),
    ({"fullnameOverride": "Merger"}, "fullnameOverride"),
    ({"settings": {"max_runing": 3}}, "max_runing"),
    ({"settings": {"max_running": 0}}, "settings.max_running"),
    ({"settings": {"database_url": "sqlite:///jobs.db"}}, "database_url"),
    ({"networkPolicy": {"httpsExcept": ["10.0.0.0"]}}, "networkPolicy.httpsExcept"),
    ({"api": {"podDisruptionBudget": {"maxUnavailable": "0%"}}}, "api.podDisruptionBudget.maxUnavailable"),
    ({"postgresql": {"storage": {"size": "much"}}}, "postgresql.storage.size"),
]


@pytest.mark.parametrize(("values", "where"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_helm_says_where_a_value_is_wrong(values: dict[str, Any], where: str) -> None:
    with pytest.raises(Refused, match=re.escape(where)):
        render(values, scenario="minimal")


# ---- every value is used ----

# Values that show only beside others.
BESIDE: dict[str, dict[str, Any]] = {
    "api.autoscaling": {"api": {"autoscaling": {"enabled": True}}},
    "api.keda": KEDA,
    "monitoring.telemetry": TRACED,
    "httpRoute": {"httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}]}},
    "postgresql.enabled": {"database": {"existingSecret": ""}},
    "networkPolicy.databaseTo": {"postgresql": {"enabled": False}, "database": {"existingSecret": "database"}},
    "networkPolicy.databasePort": {"postgresql": {"enabled": False}, "database": {"existingSecret": "database"}},
    "storage.mode": {"storage": {"objects": {"roots": ["s3://team/"]}}},
    "ray.gcsFaultTolerance.backend": {"ray": {"gcsFaultTolerance": {"redis": {"address": "redis:6379"}}}},
    "ray.gcsFaultTolerance.redis": {
        "ray": {
            "gcsFaultTolerance": {"backend": "redis", "redis": {"address": "redis:6379", "existingSecret": "redis"}},
        },
    },
    "ray.gcsFaultTolerance.storage": {"ray": {"gcsFaultTolerance": {"backend": "rocksdb"}}},
    "ray.groupDefaults.enabled": {"ray": {"groups": {"cpu": {"enabled": True}, "more": {}}}},
}
OTHERS = {
    "global.imageRegistry": "other.example.org",
    "image.digest": f"sha256:{'1' * 64}",
    "postgresql.image.digest": f"sha256:{'1' * 64}",
    "api.autoscaling.minReplicas": 5,
    "api.keda.minReplicas": 5,
    "api.keda.triggers": [{"type": "other"}],
    "monitoring.telemetry.endpoint": "http://other:4318",
    "monitoring.telemetry.env": {"OTEL_TRACES_SAMPLER": "other"},
    "service.type": "NodePort",
    "service.nodePort": 30099,
    "ingress.path": "/merger",
    "api.url": "http://other.example.org",
    "api.podDisruptionBudget.maxUnavailable": 2,
    "dispatcher.podDisruptionBudget.maxUnavailable": 2,
    "extraObjects": [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "other"}}],
    "httpRoute.timeouts": {"request": "77s"},
    "monitoring.prometheusRule.disabled": ["MergerApiSlow"],
    "monitoring.prometheusRule.thresholds.errorShare": 0.5,
    "monitoring.prometheusRule.thresholds.headMemoryShare": 0.5,
    "monitoring.prometheusRule.thresholds.volumeFreeShare": 0.5,
    "storage.mode": "objects",
    "storage.volume.accessModes": ["ReadWriteOnce"],
    "storage.volume.mountPath": "/other",
    "storage.volume.sourceRoots": ["/models/other"],
    "storage.volume.outputRoots": ["/models/other"],
    "storage.objects.roots": ["s3://other/"],
    "storage.objects.env": {"AWS_REGION": "other"},
    "storage.scratch.mountPath": "/other",
    "storage.modelCache.accessModes": ["ReadWriteOnce"],
    "storage.modelCache.mountPath": "/other",
    "ray.version": "2.77.0",
    "ray.gcsFaultTolerance.backend": "redis",
    "ray.gcsFaultTolerance.redis.address": "other:6379",
    "ray.objectStoreMemory": "1Gi",
    "ray.groupDefaults.minReplicas": 2,
    "ray.groupDefaults.image": {"tag": "other"},
    "ray.head.scratch": {"size": "77Gi"},
    "ray.groupDefaults.scratch": {"size": "77Gi"},
    "ray.groups": {"other": {}},
}
# Seen in tests of their own: they tell helm how to ask the cluster.
UNSEEN = {"ray.skipCRDCheck"}


def _other(entry: Entry) -> Any:
    """A value that is right and not the default."""
    schema = _at(entry.path)
    if _name(entry.path) in OTHERS:
        return OTHERS[_name(entry.path)]
    if "enum" in schema:
        return next(each for each in schema["enum"] if each != entry.default)
    kind = schema["type"]
    if kind in ("integer", "number"):
        return 2 * entry.default + 10
    if kind == "array":
        item = _resolved(schema["items"])
        samples: list[Any] = ["other", "198.51.100.0/24", {"name": "other", "value": "x"}]
        return [next(each for each in samples if jsonschema.Draft7Validator(item).is_valid(each))]
    if kind == "object":
        return {"requests": {"cpu": "77m", "memory": "7Gi"}} if "properties" in schema else {"example.org/other": "x"}
    samples = ["other", "7Gi", "7s", "http://other.example.org"]
    return next(each for each in samples if jsonschema.Draft7Validator(schema).is_valid(each) and each != entry.default)


def _shown(objects: list[Object]) -> str:
    """What was rendered, without what is drawn anew each time."""
    objects = copy.deepcopy(objects)
    for secret in every(objects, "Secret"):
        secret["data"] = sorted(secret.get("data") or {})
    return json.dumps(objects, sort_keys=True)


def _rendering(values: Mapping[str, Any], scenario: str) -> str | None:
    """What values show, or nothing where they are refused."""
    try:
        return _shown(render(values, scenario=scenario))
    except Refused:
        return None


def _changes(entry: Entry, scenario: str) -> bool:
    """Whether another value of a key changes what a scenario renders, which may have one of its own."""
    name = _name(entry.path)
    base = next((values for prefix, values in BESIDE.items() if f"{name}.".startswith(f"{prefix}.")), {})
    others = (True, False) if isinstance(entry.default, bool) else (_other(entry),)
    after = {_rendering(_over(base, _values(entry.path, other)), scenario) for other in others}
    return bool(after - {_rendering(base, scenario), None})


@pytest.mark.parametrize(
    "entry", [each for each in LEAVES if _name(each.path) not in UNSEEN], ids=lambda entry: _name(entry.path)
)
def test_every_value_changes_what_is_rendered(entry: Entry) -> None:
    order = sorted(SCENARIOS, key=lambda name: name != "minimal")
    assert any(_changes(entry, scenario) for scenario in order), "no scenario shows this value"


def test_two_renderings_of_the_same_values_are_the_same() -> None:
    """Else every value would seem to change something."""
    first = render(scenario="minimal")
    again = render({"image": {"pullSecrets": []}}, scenario="minimal")  # the default: rendered once more
    assert first is not again
    assert _shown(first) == _shown(again)
    assert json.dumps(first) != json.dumps(again)  # keys are drawn anew


# ---- settings ----


def _variables(objects: list[Object]) -> set[str]:
    """The names MERGER_... that pods get."""
    names = {name for each in every(objects, "ConfigMap") for name in each["data"]}
    for each in pods(objects):
        names |= {variable["name"] for container in each.containers() for variable in container.get("env") or []}
    return {name for name in names if name.startswith("MERGER_")}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_variables_are_fields_of_the_settings(scenario: str) -> None:
    names = _variables(render(scenario=scenario))
    assert len(names) >= 5
    assert names <= {f"MERGER_{name.upper()}" for name in Settings.model_fields}


def test_fields_are_settings_of_the_chart_or_derived_by_it() -> None:
    fields, settable = set(Settings.model_fields), set(SCHEMA["properties"]["settings"]["properties"])
    assert not settable & DERIVED.keys()
    assert fields == settable | (DERIVED.keys() & fields)


def test_what_the_chart_derives_it_renders() -> None:
    rendered = {name for scenario in SCENARIOS for name in _variables(render(scenario=scenario))}
    assert DERIVED.keys() <= Settings.model_fields.keys()
    assert {f"MERGER_{name.upper()}" for name in DERIVED} <= rendered


def test_defaults_are_those_of_the_service_but_for_what_the_values_say() -> None:
    for name, field in SCHEMA["properties"]["settings"]["properties"].items():
        assert field["default"] == {**Settings().model_dump(mode="json"), **VALUES["settings"]}[name], name
    assert VALUES["settings"].keys() == {"start_seconds"}  # which the README gives a reason for


def test_the_service_reads_settings_as_they_were_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of a values file is floating, and 4294967296 may not become 4.294967296e+09."""
    settable = SCHEMA["properties"]["settings"]["properties"]
    written = {name: _setting(field) for name, field in settable.items()}
    assert {type(value) for value in written.values()} >= {int, float, str}
    rendered = find(render({"settings": written}, scenario="minimal"), "ConfigMap", "-settings")["data"]
    for name, value in rendered.items():
        monkeypatch.setenv(name, value)
    settings = Settings().model_dump(mode="json")
    assert {name: settings[name] for name in written} == written


def _setting(field: Mapping[str, Any]) -> Any:
    if "enum" in field:
        return next(each for each in field["enum"] if each != field["default"])
    samples = {"integer": 1 << 33, "number": 0.625, "string": "python3.11", "boolean": True}
    return samples[field["type"]]

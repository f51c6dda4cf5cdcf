"""The loopback API server refuses what a real one refuses, and merges patches as the real kubectl does."""

import copy
import json
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from tests.helm.api_server import rules, schemas
from tests.helm.api_server.admission import Admission, Refusal
from tests.helm.api_server.kinds import BY_NAME
from tests.helm.api_server.patches import StrategicMerge, merged
from tests.helm.api_server.store import Object, Store

KUBECTL = shutil.which("kubectl")
VERSION = "1.34"


def deployment() -> Object:
    container = {
        "name": "web",
        "image": "one",
        "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
        "ports": [{"name": "http", "containerPort": 80}],
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    pod = {"containers": [container], "volumes": [{"name": "tmp", "emptyDir": {}}], "tolerations": [{"key": "a"}]}
    template = {"metadata": {"labels": {"app": "web"}}, "spec": pod}
    spec: Object = {"replicas": 2, "selector": {"matchLabels": {"app": "web"}}, "template": template}
    spec["strategy"] = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": spec}


def in_container(**fields: Any) -> Object:
    return {"spec": {"template": {"spec": {"containers": [{"name": "web", **fields}]}}}}


PATCHES: dict[str, Object] = {
    "a field of an element": in_container(image="two"),
    "a new element": {"spec": {"template": {"spec": {"containers": [{"name": "side", "image": "x"}]}}}},
    "an element's end": in_container(env=[{"name": "A", "$patch": "delete"}]),
    "an order": in_container(
        **{"$setElementOrder/env": [{"name": "C"}, {"name": "B"}], "env": [{"name": "C", "value": "3"}]}
    ),
    "a field's end": {"spec": {"replicas": None}},
    "a list without keys": {"spec": {"template": {"spec": {"tolerations": [{"key": "b"}]}}}},
    "a map in another's place": {"spec": {"strategy": {"$patch": "replace", "type": "Recreate"}}},
    "another source": {
        "spec": {
            "template": {
                "spec": {
                    "volumes": [{"$retainKeys": ["configMap", "name"], "name": "tmp", "configMap": {"name": "c"}}],
                }
            }
        }
    },
}


@pytest.mark.skipif(not KUBECTL, reason="kubectl is not here")
@pytest.mark.parametrize("name", PATCHES)
def test_strategic_patches_merge_as_kubectl_merges_them(name: str, tmp_path: Any) -> None:
    path = tmp_path / "deployment.json"
    path.write_text(json.dumps(deployment()))
    command = [str(KUBECTL), "patch", "--local", "--filename", str(path), "--type", "strategic", "--output", "json"]
    done = subprocess.run([*command, "--patch", json.dumps(PATCHES[name])], check=True, capture_output=True, text=True)
    merge = StrategicMerge(schemas.definitions(VERSION)["$defs"])
    ours = merge(deployment(), copy.deepcopy(PATCHES[name]), schemas.schema_of(BY_NAME["Deployment"], VERSION))
    assert _bare(ours) == _bare(json.loads(done.stdout))


def _bare(thing: Any) -> Any:
    """Without what kubectl fills in by itself."""
    if isinstance(thing, dict):
        return {key: _bare(value) for key, value in thing.items() if value not in ({}, None) and key != "status"}
    return [_bare(each) for each in thing] if isinstance(thing, list) else thing


def test_a_merge_patch_is_rfc_7396s_example() -> None:
    target = {"title": "Goodbye!", "author": {"givenName": "John", "familyName": "Doe"}, "tags": ["a", "b"]}
    patch = {"title": "Hello!", "phone": "+01", "author": {"familyName": None}, "tags": ["example"]}
    expected = {"title": "Hello!", "author": {"givenName": "John"}, "tags": ["example"], "phone": "+01"}
    assert merged(target, patch) == expected


def _spec(change: Callable[[Object], Any]) -> Callable[[Object], None]:
    def apply(thing: Object) -> None:
        change(thing["spec"])

    return apply


def _first(spec: Object) -> Object:
    found: Object = spec["template"]["spec"]["containers"][0]
    return found


REFUSED: dict[str, tuple[Callable[[Object], None], str]] = {
    "unknown field": (_spec(lambda s: s.update(replicass=1)), 'unknown field "spec.replicass"'),
    "unknown field in a container": (_spec(lambda s: _first(s).update(imag="x")), 'containers[0].imag"'),
    "a number as a text": (_spec(lambda s: s.update(replicas="two")), "spec.replicas"),
    "a variable's number": (_spec(lambda s: _first(s)["env"][0].update(value=1)), "env[0].value"),
    "labels that the selector does not meet": (
        _spec(lambda s: s["template"]["metadata"].update(labels={"app": "other"})),
        "`selector` does not match template `labels`",
    ),
    "a mount of no volume": (_spec(lambda s: s["template"]["spec"].pop("volumes")), "volumeMounts.name: Not found"),
    "a port's long name": (
        _spec(lambda s: _first(s)["ports"][0].update(name="sixteen-letters-x")),
        "ports.name: Invalid value",
    ),
    "more asked than allowed": (
        _spec(lambda s: _first(s).update(resources={"requests": {"memory": "2Gi"}, "limits": {"memory": "1Gi"}})),
        "must be less than or equal to memory limit",
    ),
    "a restart policy of Jobs": (
        _spec(lambda s: s["template"]["spec"].update(restartPolicy="Never")),
        "restartPolicy: Unsupported value",
    ),
    "a name with capitals": (lambda each: each["metadata"].update(name="Web"), "metadata.name: Invalid value"),
    "a label's long value": (lambda each: each["metadata"].update(labels={"a": "x" * 64}), "63 characters or less"),
}


@pytest.fixture
def admission() -> Admission:
    found = Admission(Store(), VERSION)
    name = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "models"}}
    found.create(BY_NAME["Namespace"], "", name)
    return found


def test_a_right_object_is_taken(admission: Admission) -> None:
    made = admission.create(BY_NAME["Deployment"], "models", deployment())
    assert made["metadata"]["uid"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_object_is_refused(name: str, admission: Admission) -> None:
    change, message = REFUSED[name]
    wrong = deployment()
    change(wrong)
    with pytest.raises(Refusal) as refusal:
        admission.create(BY_NAME["Deployment"], "models", wrong)
    assert message in refusal.value.message


def test_there_is_no_namespace_that_nobody_made(admission: Admission) -> None:
    with pytest.raises(Refusal, match='namespaces "elsewhere" not found'):
        admission.create(BY_NAME["Deployment"], "elsewhere", deployment())


def test_an_object_is_made_once(admission: Admission) -> None:
    admission.create(BY_NAME["Deployment"], "models", deployment())
    with pytest.raises(Refusal, match="already exists"):
        admission.create(BY_NAME["Deployment"], "models", deployment())


def _claim(**spec: Any) -> Object:
    whole = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "2Gi"}}} | spec
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "x"}, "spec": whole}


def _set(**spec: Any) -> Object:
    whole = deployment()["spec"] | {"serviceName": "x"} | spec
    return {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "x"}, "spec": whole}


def _config(data: str) -> Object:
    head = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}}
    return head | {"immutable": True, "data": {"a": data}}


CHANGES: dict[str, tuple[Object, Object, str]] = {
    "a claim may grow": (_claim(), _claim(resources={"requests": {"storage": "3Gi"}}), ""),
    "a claim may not shrink": (_claim(), _claim(resources={"requests": {"storage": "1Gi"}}), "can not be less"),
    "a claim keeps its class": (_claim(), _claim(storageClassName="fast"), "spec is immutable"),
    "a set scales": (_set(), _set(replicas=5), ""),
    "a set keeps its service": (_set(), _set(serviceName="y"), "updates to statefulset spec"),
    "a frozen map": (_config("1"), _config("2"), "immutable"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_may_change(name: str) -> None:
    old, new, message = CHANGES[name]
    found = [*rules.changes(old, new)]
    assert bool(found) == bool(message)
    assert all(message in each for each in found)

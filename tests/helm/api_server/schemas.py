"""Whether an object has the form that Kubernetes (or KubeRay) gives its kind. Knows nothing of earlier objects."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from kubernetes_validate import utils
from referencing import Registry, Resource

from tests.helm.api_server.kinds import FOREIGN, Kind

# KubeRay's definition of a RayCluster stands beside the project where somebody has put it; elsewhere its form is not
# checked here.
RAY_CLUSTERS = Path(__file__).parents[4] / "shared/reference/kuberay-crd-1.7.0/ray.io_rayclusters.yaml"


@functools.cache
def definitions(version: str) -> Mapping[str, Any]:
    """The schemas of Kubernetes' types by name, unknown fields refused."""
    release = [each for each in utils.all_versions() if utils.major_minor(each) == version][-1]
    path = f"kubernetes-json-schema/v{release}-local-strict/_definitions.json"
    return dict(utils.schema_contents(path, version))


def schema_of(kind: Kind, version: str) -> Mapping[str, Any]:
    """The schema of a kind of Kubernetes' own."""
    package = (kind.group or "core").removesuffix(".k8s.io").replace("rbac.authorization", "rbac")
    found: Mapping[str, Any] = definitions(version)["$defs"][f"io.k8s.api.{package}.{kind.version}.{kind.name}"]
    return found


@functools.cache
def _validator(kind: Kind, version: str) -> Any:
    if kind.group in FOREIGN:
        return jsonschema.Draft202012Validator(_foreign(kind))
    every = definitions(version)
    registry: Registry[Any] = Resource.from_contents(every) @ Registry()
    name = next(name for name, each in every["$defs"].items() if each is schema_of(kind, version))
    return jsonschema.Draft202012Validator({"$ref": f"{every['$id']}#/$defs/{name}"}, registry=registry)


def _foreign(kind: Kind) -> Any:
    if kind.name != "RayCluster" or not RAY_CLUSTERS.exists():
        return {"type": "object", "required": ["spec"]}
    text = yaml.load(RAY_CLUSTERS.read_text(), Loader=yaml.CSafeLoader)
    served = next(each for each in text["spec"]["versions"] if each["name"] == kind.version)
    schema = _strict(served["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def _strict(schema: Any) -> Any:
    """An OpenAPI schema as a JSON schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _strict(value) for key, value in schema.items()}
    if result.pop("x-kubernetes-int-or-string", False) is True:
        result = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    free = result.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in result
    if isinstance(result.get("properties"), dict) and result.get("type") == "object" and not free:
        result["additionalProperties"] = False
    return result


def faults(thing: Mapping[str, Any], kind: Kind, version: str) -> Iterator[str]:
    """What is wrong with an object's form, `path: message`."""
    for error in _validator(kind, version).iter_errors(thing):
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        if error.validator == "additionalProperties":
            known = set(error.schema.get("properties", {}))
            for unknown in sorted(set(error.instance) - known):
                yield f'unknown field "{path}.{unknown}"'.replace('".', '"')
        else:
            yield f"{path.removeprefix('.')}: {error.message[:300]}"


NEWEST = utils.major_minor(kubernetes_validate.latest_version())

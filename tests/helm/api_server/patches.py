"""The two kinds of patches that helm sends. Knows how lists are merged from the schemas; knows no single kind."""

import copy
import json
from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]


def merged(target: Any, patch: Any) -> Any:
    """A JSON merge patch (RFC 7396), as objects of custom kinds get it."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


class StrategicMerge:
    """A strategic merge patch: lists with a merge key are merged by it, and the patch's `$` keys are obeyed."""

    def __init__(self, definitions: Mapping[str, Schema]) -> None:
        self._definitions = definitions

    def __call__(self, target: Any, patch: dict[str, Any], schema: Schema) -> Any:
        schema = self._resolved(schema)
        if patch.get("$patch") == "replace":
            return {key: value for key, value in patch.items() if key != "$patch"}
        result = dict(target) if isinstance(target, dict) else {}
        if (keys := patch.get("$retainKeys")) is not None:
            result = {key: value for key, value in result.items() if key in keys}
        for key, value in patch.items():
            if key.startswith("$deleteFromPrimitiveList/"):
                name = key.partition("/")[2]
                result[name] = [each for each in result.get(name, []) if each not in value]
            elif not key.startswith("$"):
                self._set(result, key, value, self._field(schema, key))
        self._order(result, target, patch, schema)
        return result

    def _set(self, result: dict[str, Any], key: str, value: Any, schema: Schema) -> None:
        if value is None or (isinstance(value, dict) and value.get("$patch") == "delete"):
            result.pop(key, None)
        elif isinstance(value, dict):
            result[key] = self(result.get(key), value, schema)
        elif isinstance(value, list) and "merge" in schema.get("x-kubernetes-patch-strategy", ""):
            result[key] = self._list(result.get(key) or [], value, schema)
        else:
            result[key] = copy.deepcopy(value)

    def _list(self, target: list[Any], patch: list[Any], schema: Schema) -> list[Any]:
        key = schema.get("x-kubernetes-patch-merge-key")
        if key is None:
            return target + [each for each in patch if each not in target]
        if any(each.get("$patch") == "replace" for each in patch):
            return [each for each in patch if each.get("$patch") != "replace"]
        result = list(target)
        for each in patch:
            at = next((i for i, old in enumerate(result) if old.get(key) == each.get(key)), None)
            if each.get("$patch") == "delete":
                result = [old for old in result if old.get(key) != each.get(key)]
            elif at is None:
                result.append(self({}, each, schema["items"]))
            else:
                result[at] = self(result[at], each, schema["items"])
        return _ordered(result, target, [each for each in patch if "$patch" not in each], key)

    def _order(self, result: dict[str, Any], target: Any, patch: dict[str, Any], schema: Schema) -> None:
        for directive, order in patch.items():
            name = directive.partition("/")[2]
            if directive.startswith("$setElementOrder/") and isinstance(result.get(name), list):
                key = self._field(schema, name).get("x-kubernetes-patch-merge-key")
                result[name] = _ordered(result[name], (target or {}).get(name) or [], order, key)

    def _field(self, schema: Schema, key: str) -> Schema:
        found = schema.get("properties", {}).get(key)
        if found is None:
            found = schema.get("additionalProperties")
        return found if isinstance(found, dict) else {}

    def _resolved(self, schema: Schema) -> Schema:
        reference = schema.get("$ref")
        if reference is None and len(schema.get("allOf", [])) == 1:
            reference = schema["allOf"][0].get("$ref")
        return self._resolved(self._definitions[reference.rpartition("/")[2]]) if reference else schema


def _ordered(result: list[Any], before: list[Any], order: list[Any], key: str | None) -> list[Any]:
    """A merged list in the patch's order; what the patch does not name stays before what it stood before."""

    def name(each: Any) -> str:
        return json.dumps(each.get(key) if key else each, sort_keys=True)

    wanted = {name(each): i for i, each in enumerate(order)}
    place = {name(each): i for i, each in enumerate(before)}
    named = sorted((each for each in result if name(each) in wanted), key=lambda each: wanted[name(each)])
    others = [each for each in result if name(each) not in wanted]
    found = []
    while named and others:
        later = place.get(name(named[0]), -1) > place.get(name(others[0]), -1)
        found.append((others if later else named).pop(0))
    return found + named + others

"""`merger methods`: what there is."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import click

from merger.cli.terminal import as_json
from merger.errors import RecipeError
from merger.methods import METHODS
from merger.methods.merging import RULES
from merger.methods.method import Method


@click.command(name="methods")
@click.argument("name", required=False)
@as_json
def command(name: str | None, as_json: bool) -> None:
    """List the methods, or show the fields, the paper and an example of the method NAME."""
    if name is None:
        schemas: Any = {key: method.model_json_schema() for key, method in METHODS.items()}
        click.echo(json.dumps(schemas, indent=2) if as_json else _list())
        return
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, 1)
        hint = f"Did you mean {close[0]!r}?" if close else f"There are {', '.join(METHODS)}."
        hint = "It is a merge method of mergekit: `merger methods mergekit`." if name in RULES else hint
        raise RecipeError("is no method", where=name, remedy=hint)
    method = METHODS[name]
    click.echo(json.dumps(method.model_json_schema(), indent=2) if as_json else _describe(method))


def _list() -> str:
    width = max(map(len, METHODS))
    return "\n".join(f"{name:{width}}  {_summary(method)}" for name, method in METHODS.items())


def _summary(method: type[Method]) -> str:
    return (method.__doc__ or "").strip().splitlines()[0]


def _describe(method: type[Method]) -> str:
    schema = method.model_json_schema(by_alias=True)
    lines = [_summary(method), f"Source: {method.paper}", "", "Fields", *_fields(schema)]
    for name, part in _parts(schema).items():
        lines += ["", f"Fields of {name}: {part.get('description', '').splitlines()[0]}", *_fields(part)]
    lines += ["", method.more()] if method.more() else []
    return "\n".join([*lines, "", "Example", *(f"  {line}" for line in method.example.splitlines())])


def _fields(schema: Mapping[str, Any]) -> Iterator[str]:
    for name, field in schema["properties"].items():
        if name != "method":
            known = field.get("const", field.get("default"))
            default = "required" if name in schema.get("required", []) else f"default {json.dumps(known)}"
            yield f"  {name} ({default})"
            yield f"      {field.get('description', '')}"


def _parts(schema: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What stands within fields and is no recipe, by the field and, where there are several, by its task."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, field in schema["properties"].items():
        for key in dict.fromkeys(re.findall(r'"#/\$defs/(\w+)"', json.dumps(field))):
            part = schema["$defs"][key]
            task = part["properties"].get("task", {}).get("const")
            if "method" not in part["properties"]:
                found[f"{name} with task: {task}" if task else name] = part
    return found

"""`merger methods`: what there is."""

import difflib
import json
from typing import Any

import click

from merger.cli.terminal import as_json
from merger.errors import RecipeError
from merger.methods import METHODS
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
        raise RecipeError("is no method", where=name, remedy=hint)
    method = METHODS[name]
    click.echo(json.dumps(method.model_json_schema(), indent=2) if as_json else _describe(method))


def _list() -> str:
    width = max(map(len, METHODS))
    return "\n".join(f"{name:{width}}  {_summary(method)}" for name, method in METHODS.items())


def _summary(method: type[Method]) -> str:
    return (method.__doc__ or "").strip().splitlines()[0]


def _describe(method: type[Method]) -> str:
    fields = method.model_json_schema(by_alias=True)["properties"]
    required = method.model_json_schema().get("required", [])
    lines = [_summary(method), f"Source: {method.paper}", "", "Fields"]
    for name, field in fields.items():
        if name != "method":
            default = "required" if name in required else f"default {json.dumps(field.get('default'))}"
            lines += [f"  {name} ({default})", f"      {field.get('description', '')}"]
    return "\n".join([*lines, "", "Example", *(f"  {line}" for line in method.example.splitlines())])

"""Writes what follows from the chart's values.yaml: descriptions and defaults in its schema, the table of its README.

    python docs/make_chart.py

Knows how values.yaml is commented: `# -- text` above a key, and lines after it that go on. A key with such a comment is
one entry, whatever stands below it, unless something below has comments too. Types and bounds stand in the schema by
hand, but for `settings`: those come from the service's own model.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode

from api.settings import Settings

CHART = Path(__file__).parents[1] / "helm"
BEGIN, END = "<!-- values: made by docs/make_chart.py -->\n", "<!-- end of values -->"

# Fields of the settings that the chart sets itself, and from which of its values.
DERIVED = {
    "database_url": "database, postgresql",
    "api_key": "auth.apiKey",
    "secret_keys": "auth.secretKeys",
    "url": "api.url, service.port",
    "ray_url": "ray",
    "ray_token": "ray",
    "node_shapes": "ray",
    "working_folder": "storage",
    "source_roots": "storage",
    "output_roots": "storage",
    "object_roots": "storage",
    "shared_folders": "storage.mode",
}

Schema = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A documented key: where it stands, what it is for, what it is if nobody sets it."""

    path: tuple[str, ...]
    text: str
    default: Any


def entries(text: str) -> list[Entry]:
    """The documented keys of a values file, in its order. Raises ValueError where one lacks its comment."""
    root = yaml.compose(text)
    assert isinstance(root, MappingNode)
    return list(_entries(root, yaml.safe_load(text), text.splitlines(), ()))


def _entries(node: MappingNode, values: Mapping[str, Any], lines: list[str], path: tuple[str, ...]) -> Iterator[Entry]:
    for key, child in node.value:
        name, here = key.value, (*path, key.value)
        comment = _comment(lines, key.start_mark.line)
        nested = isinstance(child, MappingNode) and bool(child.value) and _documented(child, lines)
        if comment:
            yield Entry(here, comment, None if nested else values[name])
        if nested:
            yield from _entries(child, values[name], lines, here)
        elif not comment:
            raise ValueError(f"{'.'.join(here)} has no comment `# -- ...` above it")


def _documented(node: MappingNode, lines: list[str]) -> bool:
    """Whether something in a mapping has a comment of its own; one line `{a: 1}` has that of its key at most."""
    return not node.flow_style and any(
        _comment(lines, key.start_mark.line) or (isinstance(child, MappingNode) and _documented(child, lines))
        for key, child in node.value
    )


def _comment(lines: list[str], line: int) -> str:
    """The comment directly above a line, or nothing."""
    above: list[str] = []
    while line and (stripped := lines[line - 1].strip()).startswith("#"):
        line -= 1
        if stripped.startswith("# -- "):
            return " ".join([stripped.removeprefix("# -- "), *above])
        above.insert(0, stripped.removeprefix("#").strip())
    return ""


def settings() -> list[Entry]:
    """The fields of the service's settings that are set as they are."""
    fields = {name: field for name, field in _model().items() if name not in DERIVED}
    return [Entry(("settings", name), field["description"], field.get("default")) for name, field in fields.items()]


def _model() -> dict[str, Schema]:
    properties: dict[str, Schema] = Settings.model_json_schema()["properties"]
    return properties


def filled(schema: Schema, documented: list[Entry]) -> Schema:
    """The schema with descriptions and defaults. Raises KeyError where it lacks a key."""
    schema = json.loads(json.dumps(schema))
    schema["properties"]["settings"]["properties"] = {
        name: {key: value for key, value in field.items() if key not in ("title", "format")}
        for name, field in _model().items()
        if name not in DERIVED
    }
    for entry in documented:
        found, shared = _at(schema, entry.path)
        found["description"] = entry.text
        if not shared and entry.default is not None:
            found["default"] = entry.default
    return schema


def _at(schema: Schema, path: tuple[str, ...]) -> tuple[Schema, bool]:
    """The part of the schema for a key, and whether other keys have the same part."""
    found, shared = schema, False
    for name in path:
        if "$ref" in found:
            found, shared = schema["definitions"][found["$ref"].rsplit("/", 1)[1]], True
        if name in found.get("properties", {}):
            found = found["properties"][name]
        elif isinstance(found.get("additionalProperties"), dict):
            found, shared = found["additionalProperties"], True
        else:
            raise KeyError(f"{'.'.join(path)} is not in values.schema.json")
    return found, shared


def table(documented: list[Entry]) -> str:
    """The entries as rows of a table in Markdown."""
    rows = [f"| `{'.'.join(entry.path)}` | {_shown(entry.default)} | {_cell(entry.text)} |" for entry in documented]
    return "\n".join(["| key | default | what it is |", "|---|---|---|", *rows, ""])


def _shown(default: Any) -> str:
    return "" if default is None else _cell(f"`{json.dumps(default, ensure_ascii=False)}`")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def made() -> dict[Path, str]:
    """The files with what is made, each as it should stand."""
    documented = entries((CHART / "values.yaml").read_text())
    schema = filled(json.loads((CHART / "values.schema.json").read_text()), documented)
    at = [entry.path for entry in documented].index(("settings",)) + 1
    before, rest = (CHART / "README.md").read_text().split(BEGIN)
    after = rest.split(END)[1]
    return {
        CHART / "values.schema.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n",
        CHART / "README.md": before + BEGIN + table([*documented[:at], *settings(), *documented[at:]]) + END + after,
    }


if __name__ == "__main__":
    for path, text in made().items():
        path.write_text(text)

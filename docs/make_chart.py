"""Writes what follows from the chart's values.yaml: descriptions and defaults in its schema, tables of its README.

    python docs/make_chart.py

Knows how values.yaml is commented: `# -- text` above a key, and lines after it that go on. A key with such a comment is
one entry, whatever stands below it, unless something below has comments too. Types and bounds stand in the schema by
hand, but for `settings`: those come from the service's own model. The comment that a scenario in ci/ begins with says
what it is for.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode

from api.settings import Settings

CHART = Path(__file__).parents[1] / "helm"
BEGIN, END = "<!-- values: made by docs/make_chart.py -->\n", "<!-- end of values -->"
SCENARIOS_BEGIN, SCENARIOS_END = "<!-- scenarios: made by docs/make_chart.py -->\n", "<!-- end of scenarios -->"

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


def settings(documented: list[Entry]) -> list[Entry]:
    """The fields of the service's settings that are set as they are, without those that the values file has."""
    all_ = [Entry(("settings", name), field["description"], field.get("default")) for name, field in _model().items()]
    taken = {entry.path for entry in documented}
    return [entry for entry in all_ if entry.path[1] not in DERIVED and entry.path not in taken]


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


def scenarios() -> str:
    """The scenarios as rows of a table in Markdown. Raises ValueError where one does not say what it is for."""
    rows = [f"| `ci/{path.name}` | {_cell(_heading(path))} |" for path in sorted((CHART / "ci").glob("*.yaml"))]
    return "\n".join(["| values | for |", "|---|---|", *rows, ""])


def _heading(path: Path) -> str:
    lines = takewhile(lambda line: line.startswith("# "), path.read_text().splitlines())
    heading = " ".join(line.removeprefix("# ") for line in lines)
    if not heading:
        raise ValueError(f"{path.name} does not begin with a comment that says what it is for")
    return heading


def _between(text: str, begin: str, end: str, made: str) -> str:
    before, rest = text.split(begin)
    return before + begin + made + end + rest.split(end)[1]


def _shown(default: Any) -> str:
    return "" if default is None else _cell(f"`{json.dumps(default, ensure_ascii=False)}`")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def made() -> dict[Path, str]:
    """The files with what is made, each as it should stand."""
    documented = entries((CHART / "values.yaml").read_text())
    schema = filled(json.loads((CHART / "values.schema.json").read_text()), documented)
    at = max(i for i, entry in enumerate(documented, 1) if entry.path[0] == "settings")
    readme = _between((CHART / "README.md").read_text(), SCENARIOS_BEGIN, SCENARIOS_END, scenarios())
    values = table([*documented[:at], *settings(documented), *documented[at:]])
    return {
        CHART / "values.schema.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n",
        CHART / "README.md": _between(readme, BEGIN, END, values),
    }


if __name__ == "__main__":
    for path, text in made().items():
        path.write_text(text)

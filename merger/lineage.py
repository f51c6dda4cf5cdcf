"""What parents' model cards declare, and what their result passes on: the fields of its card, the texts of licences.

Knows the front matter of a README.md as the Hugging Face Hub reads it. Pure: text in, values out; knows nothing of
checkpoints, and of licences only their names (`merger.licenses` judges them).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MAX_FRONT_MATTER = 64 << 10  # characters; the longest ones on the Hub list some thousand languages
_MAX_DEPTH = 20  # `model-index` needs seven


@dataclass(frozen=True)
class Card:
    """What a model card declares, as far as it has the form that the Hub asks for; nothing by default."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    pipeline_tag: str | None = None
    library_name: str | None = None
    tags: tuple[str, ...] = ()
    base_model: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parent:
    """A model that a result is made of: what the recipe calls it, the repository on the Hub (`org/name`; None for a
    local folder) with its commit, whether access to that must be asked for, its card, its weight in the result.
    """

    reference: str
    repository: str | None = None
    revision: str | None = None
    gated: bool = False
    card: Card = Card()
    weight: float | None = None

    @property
    def label(self) -> str:
        """What people call it."""
        return self.repository or self.reference


# ---- reading ------------------------------------------------------------------------------------------

_ID = r"[A-Za-z0-9][\w.-]{0,95}"
_FORMS = {
    "license": r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}",
    "license_name": r"[A-Za-z0-9][\w .,()+-]{0,99}",
    "license_link": r"https?://[!-;=?-~]{1,500}|[\w][\w./-]{0,200}",  # an address, or a file beside the card
    "language": r"[A-Za-z0-9][A-Za-z0-9-]{0,31}",
    "datasets": rf"{_ID}(/{_ID})?",
    "pipeline_tag": r"[a-z0-9][a-z0-9-]{0,63}",
    "library_name": _ID,
    "tags": r"[\w][\w .:/+-]{0,99}",
    "base_model": rf"{_ID}(/{_ID})?",
}
_NOTHING = ("null", "none")  # what programs write where there is no value


def read_card(text: str) -> Card:
    """What the card in a README.md declares. Whatever is not of the right form is left out: a card that cannot be read
    declares nothing. Anything may stand in `text`, which strangers have written; no text raises an error.
    """
    content = _mapping(_front_matter_of(text))
    fields = {key: _strings(content.get(key), key) for key in _FORMS}
    one = {key: found[0] if len(found) == 1 else None for key, found in fields.items()}
    return Card(
        license=one["license"].lower() if one["license"] else None,
        license_name=one["license_name"],
        license_link=one["license_link"],
        language=fields["language"],
        datasets=fields["datasets"],
        pipeline_tag=one["pipeline_tag"],
        library_name=one["library_name"],
        tags=fields["tags"],
        base_model=fields["base_model"],
    )


def _front_matter_of(text: str) -> str:
    """What stands between the two lines of dashes at the head of a card; nothing where it is longer than is read."""
    start = text[: MAX_FRONT_MATTER + 8].lstrip("\ufeff \t\r\n").replace("\r\n", "\n")
    if not start.startswith("---\n"):
        return ""
    body, closing, _ = start[3:].partition("\n---")
    return body if closing else ""


class _Plain(yaml.BaseLoader):
    """YAML of strings, lists and mappings: the language `no` stays a word. Aliases, which can make gigabytes out of a
    line, and depth are refused while the text is read.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > _MAX_DEPTH or self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("too deep, or an alias")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _mapping(text: str) -> Mapping[str, Any]:
    try:
        content = yaml.load(text, Loader=_Plain)  # a BaseLoader: makes no objects
    except Exception:  # hostile text; PyYAML lets some of it through to ValueError, OverflowError and IndexError
        return {}
    return content if isinstance(content, dict) else {}


def _strings(value: object, key: str) -> tuple[str, ...]:
    """The strings of a field, which may hold one or a list, that have its form; each once."""
    values = value if isinstance(value, list) else [value]
    texts = [text.strip() for text in values if isinstance(text, str)]
    fit = (text for text in texts if re.fullmatch(_FORMS[key], text, re.ASCII) and text.lower() not in _NOTHING)
    return tuple(dict.fromkeys(fit))


# ---- writing ------------------------------------------------------------------------------------------

_WARNING_TAG = "not-for-all-audiences"


def front_matter(
    parents: Sequence[Parent],
    *,
    library: str,
    license: Mapping[str, str],
    is_adapter: bool = False,
    extra_tags: Iterable[str] = (),
) -> dict[str, Any]:
    """What the card of a result declares, in the order in which people read it; only what has a value.

    `license` are the fields of a verdict. The base models are the parents on the Hub, which takes ids and no paths.
    An adapter's are the models that its parents adapt: that is what the relation `adapter` says.
    """
    adapted = _union(parent.card.base_model for parent in parents) if is_adapter else []
    warned = any(_WARNING_TAG in parent.card.tags for parent in parents)
    base_models = adapted or list(dict.fromkeys(parent.repository for parent in parents if parent.repository))
    fields: dict[str, Any] = {
        "base_model": base_models,
        "base_model_relation": ("adapter" if adapted else "merge") if base_models else "",
        "library_name": library,
        "pipeline_tag": _agreed(parent.card.pipeline_tag for parent in parents),
        "tags": list(dict.fromkeys(["merge", "merger", *extra_tags, *([_WARNING_TAG] if warned else [])])),
        **license,
        "language": _union(parent.card.language for parent in parents),
        "datasets": _union(parent.card.datasets for parent in parents),
    }
    return {key: value for key, value in fields.items() if value}


def _union(lists: Iterable[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(item for found in lists for item in found))


def _agreed(values: Iterable[str | None]) -> str | None:
    """The one value of those that declare any; None where they differ."""
    found = {value for value in values if value}
    return found.pop() if len(found) == 1 else None


# ---- texts of licences --------------------------------------------------------------------------------


def texts_of(
    given: Mapping[str, Path], parents: Sequence[tuple[str, Mapping[str, Path]]], read: Callable[[Path], bytes]
) -> dict[str, Path]:
    """Which texts of licences come along beside those that are `given`, by the name that they get: those of every
    parent (what it is called, and its files by name) that say something else.

    A name that is taken gets the parent's number, from 1, and what it is called: LICENSE-2-org-name.
    """
    seen = {read(path) for path in given.values()}
    found: dict[str, Path] = {}
    for number, (label, files) in enumerate(parents, 1):
        for name, path in files.items():
            content = read(path)
            if content not in seen:
                seen.add(content)
                found[_free_name(name, number, label) if name in given or name in found else name] = path
    return found


def _free_name(name: str, number: int, label: str) -> str:
    stem, dot, suffix = name.partition(".")
    called = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.")[-80:]
    return f"{stem}-{number}-{called}{dot}{suffix}"

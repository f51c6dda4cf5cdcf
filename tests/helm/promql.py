"""Which metrics and labels an expression of Prometheus asks for. Knows the language's words; knows no metric."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_RANGE = re.compile(r"\[[^\]]*\]")
_SELECTOR = re.compile(r"\b([a-zA-Z_:][a-zA-Z0-9_:]*)\b(?!\s*\()(?:\s*\{([^}]*)\})?")
_MATCHER = re.compile(r'\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*(=~|!~|!=|=)\s*"([^"]*)"\s*(?:,|$)')
_WORDS = frozenset({"and", "or", "unless", "offset", "bool", "start", "end", "inf", "nan"})
_DURATION = re.compile(r"\boffset\s+[0-9]+[smhdwy]")


@dataclass(frozen=True)
class Selector:
    """A metric's name, and what is asked of its labels."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]


def selectors(expression: str) -> Iterator[Selector]:
    """Every metric that an expression reads."""
    bare = _DURATION.sub("", _RANGE.sub("", _GROUPING.sub("", expression)))
    for name, inside in _SELECTOR.findall(bare):
        if name not in _WORDS:
            yield Selector(name, tuple(_MATCHER.findall(inside)))


def groupings(expression: str) -> set[str]:
    """The labels by which it groups."""
    return {label.strip() for inside in _GROUPING.findall(expression) for label in inside.split(",") if label.strip()}

"""Files of several mergekit configurations, of which later ones use earlier ones by name. Pure: plain data in and out.

As in `mergekit-multi` each has a `name`, but for one that may have none. That one is the result, or the last.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from merger.errors import RecipeError
from merger.mergekit_config import reference_of

_REFERENCES = ("model", "base_model", "tokenizer_source", "source", "path")


def result_of(documents: Sequence[Any]) -> dict[str, Any]:
    """The configuration that a file is for. Raises RecipeError where the file is not one of configurations."""
    for i, document in enumerate(documents):
        if not isinstance(document, dict) or "merge_method" not in document:
            remedy = "A file of several documents holds mergekit configurations. Recipes nest: write one in the other."
            raise RecipeError("is not a mergekit configuration", where=f"document {i + 1}", remedy=remedy)
    unnamed = [document for document in documents if "name" not in document]
    if len(unnamed) > 1:
        raise RecipeError(
            f"is missing in {len(unnamed)} of {len(documents)} documents",
            where="name",
            remedy="Every configuration but the last needs a name.",
        )
    found: dict[str, Any] = unnamed[0] if unnamed else documents[-1]
    return found


def combined(documents: Sequence[dict[str, Any]], result: dict[str, Any]) -> dict[str, Any]:
    """The result's configuration, with those that it uses beside it, as `merges`. Raises RecipeError."""
    named: dict[str, dict[str, Any]] = {}
    for document in documents:
        name = document.get("name")
        if name is not None and name in named:
            raise RecipeError(f"{name!r} stands twice", where="name", remedy="Give each configuration its own name.")
        if document is not result and name is not None:
            named[name] = document
    used: set[str] = set()
    whole = _bound(result, named, used, ())
    unused = [name for name in named if name not in used]
    if unused:
        raise RecipeError(
            f"{unused[0]!r} is not used by the configuration that is the result",
            where="name",
            remedy="A recipe has one result. Put configurations that do not belong together in files of their own.",
        )
    return whole


def _bound(
    document: dict[str, Any], named: Mapping[str, dict[str, Any]], used: set[str], above: tuple[str, ...]
) -> dict[str, Any]:
    names = [name for name in dict.fromkeys(_referred(document)) if name in named]
    for name in names:
        if name in above:
            circle = " uses ".join([*above[above.index(name) :], name])
            raise RecipeError(f"the configurations go round in a circle: {circle}", where="name", remedy="Break it.")
    used.update(names)
    merges = {name: _bound(named[name], named, used, (*above, name)) for name in names}
    return {**document, "merges": {**merges, **document.get("merges", {})}} if merges else document


def _referred(value: Any) -> Iterator[str]:
    """The paths of all models that plain data name."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key in _REFERENCES and isinstance(part, str):
                yield from _path_in(part)
            elif key != "merges":
                yield from _referred(part)
    elif isinstance(value, list):
        for part in value:
            yield from _referred(part)


def _path_in(text: str) -> Iterator[str]:
    try:
        yield reference_of(text).path
    except ValueError:
        return

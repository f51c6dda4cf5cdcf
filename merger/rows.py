"""Data as rows, and rows as tokens. Knows text files and JSONL; knows nothing of models."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from merger.errors import SourceError


def rows_of(files: Iterable[Path], field: str = "text") -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of files with where they stand: of JSONL each line, of any other file its whole text as `field`.

    Raises SourceError.
    """
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"cannot be read as text: {error}", where=str(path)) from error
        if path.suffix not in (".jsonl", ".ndjson", ".json"):
            yield str(path), {field: text}
            continue
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, _row(line, where)


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SourceError(f"is not JSON: {error}", where=where) from error
    if not isinstance(row, dict):
        raise SourceError("is not an object with fields", where=where)
    return row


def field_of(row: Mapping[str, Any], name: str, where: str) -> Any:
    """A field of a row. Raises SourceError where it is not there."""
    if name not in row:
        raise SourceError(f"has no field {name!r}; it has {', '.join(row) or 'none'}", where=where)
    return row[name]


def ids_of(tokenizer: Any, row: Mapping[str, Any], name: str, where: str) -> list[int]:
    """The tokens of a row's field, which may hold tokens already; `input_ids` stands for `text`. Raises SourceError."""
    value = row["input_ids"] if name == "text" and "input_ids" in row else field_of(row, name, where)
    if isinstance(value, list):
        return [int(token) for token in value]
    if tokenizer is None:
        raise SourceError("the model has no tokenizer, and the data are not `input_ids`", where=where)
    pair = row.get("text_pair") if name == "text" else None
    encoded = tokenizer(str(value), pair, verbose=False, truncation=False)
    return list(encoded["input_ids"])


def pair_of(tokenizer: Any, row: Mapping[str, Any], where: str) -> tuple[list[int], list[int]]:
    """The tokens of a preference: `chosen` and `rejected`, each behind the `prompt` where it is text. Raises
    SourceError.
    """
    prompt = str(row.get("prompt", ""))

    def side(name: str) -> list[int]:
        value = field_of(row, name, where)
        full = {**row, name: value if isinstance(value, list) else prompt + str(value)}
        return ids_of(tokenizer, full, name, where)

    return side("chosen"), side("rejected")

"""Whether two tokenizers give the same ids. Knows tokenizer files; knows nothing of weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt", "spiece.model")


def difference(first: Mapping[str, Path], other: Mapping[str, Path]) -> str | None:
    """What two models' tokenizers disagree about, or None; files are compared where both models have them.

    `first` and `other` map the names of side files to their paths.
    """
    for name in VOCABULARY_FILES:
        if name in first and name in other:
            a, b = first[name].read_bytes(), other[name].read_bytes()
            if a == b:
                return None
            return _first_difference(name, a, b)
    return None


def _first_difference(name: str, a: bytes, b: bytes) -> str | None:
    """Files may differ in their layout or in settings; what counts is which token has which id."""
    try:
        first, other = _ids(json.loads(a)), _ids(json.loads(b))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return f"{name} differs"
    odd = {token for token, _ in first.items() ^ other.items()}
    if not odd:
        return None
    token = min(odd, key=lambda token: (token not in first, first.get(token, other.get(token, 0)), token))
    return f"token {token!r} has the id {first.get(token)} in one and {other.get(token)} in the other"


def _ids(content: Any) -> dict[str, int]:
    """Token to id, from a tokenizer.json (with its added tokens) or a vocab.json. Raises where it is neither."""
    if not isinstance(content.get("model"), dict):
        return _checked(dict(content))
    vocabulary = content["model"]["vocab"]
    pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((row[0], i) for i, row in enumerate(vocabulary))
    return _checked(dict(pairs) | {added["content"]: added["id"] for added in content.get("added_tokens", [])})


def _checked(ids: dict[Any, Any]) -> dict[str, int]:
    if not ids or not all(type(token) is str and type(id_) is int for token, id_ in ids.items()):
        raise ValueError("is no vocabulary")
    return ids

"""Whether two tokenizers give the same ids. Knows tokenizer files; knows nothing of weights."""

import json
from collections.abc import Mapping
from pathlib import Path

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
        ids_a, ids_b = _ids(json.loads(a)), _ids(json.loads(b))
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{name} differs"
    for token in sorted(ids_a.keys() | ids_b.keys(), key=lambda token: ids_a.get(token, ids_b.get(token, 0))):
        if ids_a.get(token) != ids_b.get(token):
            return f"token {token!r} has the id {ids_a.get(token)} in one and {ids_b.get(token)} in the other"
    return None


def _ids(content: dict) -> dict[str, int]:  # type: ignore[type-arg]
    """Token to id, from a tokenizer.json (with its added tokens) or a vocab.json."""
    if "model" not in content:
        return dict(content)
    vocabulary = content["model"]["vocab"]
    pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((row[0], i) for i, row in enumerate(vocabulary))
    return dict(pairs) | {added["content"]: added["id"] for added in content.get("added_tokens", [])}

"""One tokenizer out of several. Knows what tokenizer.json holds; knows nothing of weights or files.

Ids of the first are kept. Tokens of the others follow in their order, each with what makes it a token: its merges in
BPE, its score in Unigram. mergekit adds them all as words that are cut out of a text before the model sees it, which
breaks byte-level texts apart; here they become part of the model.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from merger.errors import IncompatibleSources, UnsupportedModel
from merger.tokenizer_files import Content, TokenizerFiles, entry, kind_of, next_id

_KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")
# Settings of a model without which its tokens mean something else.
_MEANINGS = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
_REMEDY = "`tokenizer: {source: base}` takes one tokenizer and matches the others' tokens by name."


def trimmed(files: TokenizerFiles, rows: int) -> TokenizerFiles:
    """The tokenizer without tokens that have no row in an embedding of so many."""
    if max(files.ids.values(), default=-1) < rows:
        return files
    gone = {token for token, number in files.ids.items() if number >= rows}
    model = dict(files.content["model"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        model["vocab"] = vocabulary[:rows]
    else:
        model["vocab"] = {token: number for token, number in vocabulary.items() if number < rows}
    if model.get("merges"):
        model["merges"] = [merge for merge in model["merges"] if not gone & {*_pair(merge), _made(merge, model)}]
    added = [it for it in files.content["added_tokens"] if files.ids[it["content"]] < rows]
    return replace(files, content={**files.content, "model": model, "added_tokens": added})


def united_content(tokenizers: Sequence[TokenizerFiles], extra: Iterable[str] = ()) -> dict[str, Any]:
    """The tokenizer.json of all tokens: those of the first with their ids, those of the others, then `extra` ones,
    which are added as words, and special ones of the first that had no row.

    Raises IncompatibleSources where the tokens of two of them do not mean the same, naming both.
    """
    base = tokenizers[0]
    ids, added = dict(base.ids), [dict(it) for it in base.content["added_tokens"]]
    model: dict[str, Any] = dict(base.content["model"])
    for other in tokenizers[1:]:
        _check_kinds(base, other)
        fresh = sorted((token for token in other.ids if token not in ids), key=other.ids.__getitem__)
        first = next_id(ids.values())
        ids |= {token: first + i for i, token in enumerate(fresh)}
        added += [entry(token, ids[token], other.added[token]) for token in fresh if token in other.added]
        words = {token for token in fresh if token not in other.added}
        if words:
            _check_splits(base, other)
            model = _extended(model, other.content["model"], words, ids)
    for token in (*extra, *base.specials):  # without the special ones transformers would add them beyond the last row
        if token not in ids:
            ids[token] = next_id(ids.values())
            added.append(entry(token, ids[token], special=token in base.specials))
    if len(ids) > len(base.ids):
        model = {**model, "vocab": _whole_vocabulary(model, ids)}
    return {**base.content, "model": model, "added_tokens": sorted(added, key=lambda it: it["id"])}


def _whole_vocabulary(model: Content, ids: Mapping[str, int]) -> Any:
    """The model's vocabulary with the added tokens in it: those beside it get the ids after its last, whatever the
    file says (tokenizers, `AddedVocabulary::add_tokens`).
    """
    if kind_of(model) != "Unigram":
        return dict(sorted(ids.items(), key=lambda item: item[1]))
    scores = {str(piece): score for piece, score in model["vocab"]}
    tokens = {number: token for token, number in ids.items()}
    pieces = []
    for number in range(next_id(ids.values())):  # its ids are places in a list, which has no holes
        token = tokens.get(number, f"<unused_{number}>")
        pieces.append([token, scores.get(token, 0.0)])
    return pieces


def _extended(model: Content, other: Content, words: set[str], ids: Mapping[str, int]) -> dict[str, Any]:
    """The model with words of another one. A BPE's own merges come first: texts of its tokens stay as they were."""
    if kind_of(model) == "Unigram":
        pieces = {str(piece): score for piece, score in other["vocab"]}
        more = sorted(words, key=ids.__getitem__)
        return {**model, "vocab": [*model["vocab"], *([token, pieces[token]] for token in more)]}
    grown = {**model, "vocab": {**model["vocab"], **{token: ids[token] for token in words}}}
    if kind_of(model) == "BPE":
        mine = [_pair(merge) for merge in model["merges"]]
        known = set(mine)
        theirs = [_pair(merge) for merge in other["merges"] if _made(merge, other) in words]
        grown["merges"] = _written([*mine, *(pair for pair in theirs if pair not in known)], model["merges"])
    return grown


# ---- merges -------------------------------------------------------------------------------------------


def _pair(merge: Any) -> tuple[str, str]:
    """A merge, which files hold as a list of two or as one text."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _made(merge: Any, model: Content) -> str:
    """The token that a merge makes."""
    left, right = _pair(merge)
    return left + right.removeprefix(model.get("continuing_subword_prefix") or "")


def _written(pairs: Sequence[tuple[str, str]], like: Sequence[Any]) -> list[Any]:
    """Merges in the form of those that were there; tokens with a space are not possible in one text."""
    as_text = bool(like) and isinstance(like[0], str) and not any(" " in left + right for left, right in pairs)
    return [" ".join(pair) if as_text else list(pair) for pair in pairs]


# ---- refusals -----------------------------------------------------------------------------------------


def check_kind(files: TokenizerFiles) -> None:
    """See that a tokenizer is of a kind that can be changed. Raises UnsupportedModel."""
    if files.kind not in _KINDS:
        raise UnsupportedModel(
            f"is a tokenizer of the kind {files.kind}; there are {', '.join(_KINDS)}",
            where=f"{files.label}: tokenizer.json",
            remedy=_REMEDY,
        )


def _check_kinds(base: TokenizerFiles, other: TokenizerFiles) -> None:
    if base.kind != other.kind:
        raise IncompatibleSources(
            f"{base.label} has a tokenizer of the kind {base.kind} and {other.label} one of the kind {other.kind}: "
            "no tokenizer holds the tokens of both",
            where="tokenizer: model.type",
            remedy=_REMEDY,
        )


def _check_splits(base: TokenizerFiles, other: TokenizerFiles) -> None:
    """See that a text comes to both models in the same form: else their tokens are of different texts."""
    parts: list[tuple[str, Any, Any]] = [
        (part, base.content.get(part), other.content.get(part)) for part in ("normalizer", "pre_tokenizer")
    ]
    a, b = base.content["model"], other.content["model"]
    parts += [(f"model.{name}", a.get(name) or None, b.get(name) or None) for name in _MEANINGS]
    for name, mine, theirs in parts:
        if mine != theirs:
            raise IncompatibleSources(
                f"{base.label} and {other.label} bring texts into different forms ({_short(mine)} and "
                f"{_short(theirs)}): tokens of one are not tokens of the other",
                where=f"tokenizer: {name}",
                remedy=_REMEDY,
            )


def _short(part: Any) -> str:
    """A part of a tokenizer for people."""
    if not isinstance(part, Mapping):
        return repr(part)
    inner = part.get("normalizers") or part.get("pretokenizers") or ()
    return f"{part.get('type')}({', '.join(_short(it) for it in inner)})" if inner else _setting(part)


def _setting(part: Content) -> str:
    told = ", ".join(f"{key}={str(value)[:40]}" for key, value in part.items() if key != "type")
    return f"{part.get('type')}({told})" if told else str(part.get("type"))

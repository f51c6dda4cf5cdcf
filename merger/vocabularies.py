"""Models brought to one vocabulary, before they are merged. Knows tokens, embeddings and configs; reads no weights.

What `tokenizer:` means in a mergekit configuration (tokenizer/config.py, build.py, embed.py), but lazily, with ids that
follow from the order of the models, and with tokens that are part of the new tokenizer's model.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from merger.architecture import embedding_of, head_of, ties_embeddings
from merger.checkpoint import Checkpoint
from merger.dtypes import promote
from merger.errors import IncompatibleSources, RecipeError, UnsupportedModel
from merger.expression import Expression
from merger.gathered import Rows, gathered, padded
from merger.kernels import CODES
from merger.token_rows import Given, own_rows, rows_of
from merger.tokenizer_files import (
    SETTINGS,
    TOKENIZER,
    TokenizerFiles,
    files_of,
    is_old,
    is_tokenizer_file,
    next_id,
)
from merger.tokenizer_unions import check_kind, trimmed, united_content
from merger.vocabulary_configs import Ids, with_vocabulary_size
from merger.vocabulary_settings import ModelToken, Reference, TokenizerSettings, Zero

_REMEDY = "Save this tokenizer again with transformers' `save_pretrained`; `tokenizer: {source: base}` changes none."

IndexOf = Callable[[Reference], int]  # the number of a model that a configuration names; raises RecipeError


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a result: its tokens, how many rows its embedding has (`size`), and its files."""

    ids: Mapping[str, int]
    size: int
    texts: Mapping[str, str]
    side_files: Mapping[str, Path]
    rows: tuple[Rows, ...]  # of each model's new embedding, without the rows up to a multiple
    notes: tuple[str, ...]

    def applied(self, checkpoint: Checkpoint) -> Checkpoint:
        """A checkpoint, its embedding in this vocabulary already, with the tokenizer's files and its size."""
        config = with_vocabulary_size(checkpoint.config, self.size) if checkpoint.config is not None else None
        kept = {name: path for name, path in checkpoint.side_files.items() if not is_tokenizer_file(name)}
        texts = {name: text for name, text in checkpoint.texts.items() if not is_tokenizer_file(name)}
        return replace(
            checkpoint,
            config=config,
            side_files={**kept, **self.side_files},
            texts={**texts, **self.texts},
        )


def united(
    models: Sequence[Checkpoint], base: int | None, settings: TokenizerSettings, index_of: IndexOf
) -> tuple[list[Checkpoint], Vocabulary]:
    """The models in one vocabulary: each with its embedding, head and head's bias in it, with the config's sizes and
    ids, and with the tokenizer's files. Without a base the first model gives the ids, and no model's
    rows come before others.

    Raises RecipeError, IncompatibleSources or UnsupportedModel with the field, the tensor or the file at fault.
    """
    of_tensors = [_vocabulary_tensors(model) for model in models]
    counts = [
        min(model.tensors[name].shape[0] for name in names) for model, names in zip(models, of_tensors, strict=True)
    ]
    whole, notes = _tokenizers(models, base or 0)
    tokenizers = [trimmed(files, count) for files, count in zip(whole, counts, strict=True)]
    donor = _donor(settings.source, base, index_of)
    content = _content(tokenizers, donor, settings)
    result = replace(tokenizers[donor], content=content)
    count = next_id(result.ids.values())
    own = own_rows([_places(result, files, counts[i], i == donor) for i, files in enumerate(tokenizers)], count)
    given = _given(settings, result, tokenizers, counts, index_of)
    rows = tuple(rows_of(own, base, given))
    multiple = settings.pad_to_multiple_of or 1
    size = -(-count // multiple) * multiple
    texts, side_files = _files(models[donor], whole[donor], result)
    notes += _notes(models, counts, tokenizers, result, size, donor)
    notes += _note_on_zeros(rows[donor], result, given)
    vocabulary = Vocabulary(result.ids, size, texts, side_files, rows, tuple(notes))
    made = [
        _brought(
            i,
            models,
            of_tensors,
            rows[i],
            size,
            vocabulary,
            Ids(tokenizers[i], result, models[donor], i == donor, size),
        )
        for i in range(len(models))
    ]
    made[donor] = replace(made[donor], notes=(*made[donor].notes, *notes))
    return made, vocabulary


# ---- tokenizers ---------------------------------------------------------------------------------------


def _tokenizers(models: Sequence[Checkpoint], base: int) -> tuple[list[TokenizerFiles], list[str]]:
    """The tokenizers of all models; one that has none is taken to use the base's."""
    found = [files_of(model) for model in models]
    given = found[base]
    if given is None:
        raise UnsupportedModel(
            "has no tokenizer, which the vocabulary of the result begins with",
            where=models[base].label,
            remedy="Put its tokenizer.json beside its weights, or name a base_model that has one.",
        )
    notes = [
        f"{model.label} has no tokenizer: its tokens are taken to be those of {models[base].label}"
        for model, files in zip(models, found, strict=True)
        if files is None
    ]
    whole = [files or replace(given, label=model.label) for model, files in zip(models, found, strict=True)]
    for files in whole:
        check_kind(files)
    return whole, notes


def _donor(source: Reference, base: int | None, index_of: IndexOf) -> int:
    """The model whose ids are kept."""
    return (base or 0) if source in ("union", "base") else index_of(source)


def _content(tokenizers: Sequence[TokenizerFiles], donor: int, settings: TokenizerSettings) -> dict[str, Any]:
    order = [donor]
    if settings.source == "union":
        order += [i for i in range(len(tokenizers)) if i != donor]
    return united_content([tokenizers[i] for i in order], settings.tokens or ())


def _places(result: TokenizerFiles, files: TokenizerFiles, rows: int, is_donor: bool) -> dict[int, int]:
    """New ids to old rows; of the donor also those of ids that no token has."""
    found = {number: files.ids[token] for token, number in result.ids.items() if token in files.ids}
    if is_donor:
        end = next_id(files.ids.values())
        found |= {number: number for number in range(min(end, rows)) if number not in result.tokens}
    return found


def _given(
    settings: TokenizerSettings,
    result: TokenizerFiles,
    tokenizers: Sequence[TokenizerFiles],
    counts: Sequence[int],
    index_of: IndexOf,
) -> dict[int, Given]:
    """What the configuration says of tokens. Raises RecipeError where a row is not there."""
    found: dict[int, Given] = {}
    for token, said in (settings.tokens or {}).items():
        where = f"tokenizer.tokens.{token}.source"
        match said.source:
            case None:
                found[result.ids[token]] = Given("default", said.force)
            case Zero():
                found[result.ids[token]] = Given("zero", said.force)
            case ModelToken(model=model, token_id=None, token=other):
                number = index_of(model)
                row = _row_of(tokenizers[number], str(other), where)
                found[result.ids[token]] = Given((number, row), said.force)
            case ModelToken(model=model, token_id=row) if row is not None:
                number = index_of(model)
                if row >= counts[number]:
                    message = f"asks for row {row} of {tokenizers[number].label}, which has {counts[number]}"
                    raise RecipeError(message, where=where, remedy="Rows are counted from 0.")
                found[result.ids[token]] = Given((number, row), said.force)
            case reference:
                number = index_of(reference)
                found[result.ids[token]] = Given((number, _row_of(tokenizers[number], token, where)), said.force)
    return found


def _row_of(files: TokenizerFiles, token: str, where: str) -> int:
    if token not in files.ids:
        raise RecipeError(
            f"asks for the row of {token!r} in {files.label}, which has no such token",
            where=where,
            remedy="Tokens are written as in tokenizer.json: a word's start is there Ġ or ▁, not a space.",
        )
    return files.ids[token]


# ---- tensors ------------------------------------------------------------------------------------------

# Beside the embedding and the head: embeddings that a model has twice, heads of encoders, and biases.
_OTHERS = re.compile(
    r"(^|\.)shared\.weight$|(^|\.)(encoder|decoder)\.embed_tokens\.weight$|(^|\.)(lm_head|embed_out)\.bias$"
    r"|^cls\.predictions\.(decoder\.(weight|bias)|bias)$"
)
# Rows by token that are not rows of the first axis, or of another vocabulary.
_REFUSED = re.compile(r"(^|\.)(final_logits_bias|embed_tokens_per_layer\.weight)$")


def _vocabulary_tensors(model: Checkpoint) -> list[str]:
    """The tensors whose rows are tokens, an embedding first. Raises UnsupportedModel."""
    first = [name for name in (embedding_of(model.tensors), head_of(model.tensors)) if name]
    others = [name for name in model.tensors if _OTHERS.search(name) and name not in first]
    odd = [name for name in model.tensors if _REFUSED.search(name)]
    names = [*first, *others]
    if odd or not any(name.endswith(".weight") for name in names) or not (embedding_of(model.tensors) or others):
        raise UnsupportedModel(
            f"has {odd[0]}, whose rows no vocabulary gives" if odd else "has no embedding by a name that is known",
            where=model.label,
            remedy="Merge models that share a tokenizer, without `tokenizer` in the recipe.",
        )
    for name in names:
        if model.tensors[name].dtype not in CODES:
            raise UnsupportedModel(
                f"is {model.tensors[name].dtype}, in which merger does not calculate",
                where=f"{model.label}: tensor {name!r}",
                remedy="Convert the model to bfloat16 first.",
            )
    return names


def _brought(
    number: int,
    models: Sequence[Checkpoint],
    of_tensors: Sequence[Sequence[str]],
    rows: Rows,
    size: int,
    vocabulary: Vocabulary,
    ids: Ids,
) -> Checkpoint:
    """One model in the new vocabulary."""
    model = models[number]
    tensors = dict(model.tensors)
    for name in of_tensors[number]:
        sources = [_counterpart(name, other, model) for other in models]
        lacking = [models[i].label for i in np.unique(rows.source).tolist() if sources[i] is None]
        if lacking:
            raise IncompatibleSources(
                f"is missing in {lacking[0]}, and {model.label} needs rows of it",
                where=f"tensor {name!r}",
                remedy="Merge models of one architecture.",
            )
        tensors[name] = _made(name, model, models, sources, rows, size)
    config = ids.in_config(model.config) if model.config is not None else None
    moved = vocabulary.applied(replace(model, tensors=tensors, config=config))
    return replace(moved, texts={**moved.texts, **ids.generation_text(model)})


def _counterpart(name: str, other: Checkpoint, model: Checkpoint) -> Expression | None:
    """A model's tensor of this name; its embedding where the name is that of a head which is tied there."""
    if name in other.tensors:
        return other.tensors[name]
    embedding = embedding_of(other.tensors)
    is_tied = ties_embeddings(other.config) or "tie_word_embeddings" not in (other.config or {})
    return other.tensors[embedding] if name == head_of(model.tensors) and embedding and is_tied else None


def _made(
    name: str,
    model: Checkpoint,
    models: Sequence[Checkpoint],
    sources: Sequence[Expression | None],
    rows: Rows,
    size: int,
) -> Expression:
    own = model.tensors[name]
    for source, other in zip(sources, models, strict=True):
        if source is not None and source.shape[1:] != own.shape[1:]:
            a, b = list(own.shape), list(source.shape)
            raise IncompatibleSources(
                f"has the shape {a} in {model.label} and {b} in {other.label}: rows of other widths",
                where=f"tensor {name!r}",
                remedy="Merge models of one size.",
            )
    there = [source if source is not None else own for source in sources]  # those that lack it give no row
    dtype = promote(frozenset(source.dtype for source in there))
    return padded(gathered(there, rows, dtype), size - len(rows))


# ---- files --------------------------------------------------------------------------------------------


def _files(donor: Checkpoint, own: TokenizerFiles, result: TokenizerFiles) -> tuple[dict[str, str], dict[str, Path]]:
    """The result's tokenizer files: the giver's own where no token changes. Raises UnsupportedModel."""
    side = {name: path for name, path in donor.side_files.items() if is_tokenizer_file(name)}
    texts = {name: text for name, text in donor.texts.items() if is_tokenizer_file(name)}
    if result.ids == own.ids:
        return texts, side
    texts = {name: text for name, text in texts.items() if not is_old(name)}
    texts[TOKENIZER] = json.dumps(result.content, indent=2, ensure_ascii=False) + "\n"
    _check_readable(texts[TOKENIZER], result)
    if own.settings:
        texts[SETTINGS] = json.dumps(_settings_of(result), indent=2, ensure_ascii=False) + "\n"
    return texts, {name: path for name, path in side.items() if name not in texts and not is_old(name)}


def _check_readable(text: str, result: TokenizerFiles) -> None:
    """See that the library which reads the file finds the same ids, where it is installed. Raises UnsupportedModel."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return
    try:
        found = Tokenizer.from_str(text).get_vocab()
    except Exception as error:  # the library raises nothing narrower
        raise UnsupportedModel(
            f"cannot be made: {error}", where=f"{result.label}: {TOKENIZER}", remedy=_REMEDY
        ) from error
    odd = sorted(token for token in found.keys() | result.ids.keys() if found.get(token) != result.ids.get(token))
    if odd:
        raise UnsupportedModel(
            f"would give {odd[0]!r} the id {found.get(odd[0])}, not {result.ids.get(odd[0])}",
            where=f"{result.label}: {TOKENIZER}",
            remedy=_REMEDY,
        )


def _settings_of(result: TokenizerFiles) -> dict[str, Any]:
    """tokenizer_config.json, its list of added tokens as it is now."""
    settings = dict(result.settings)
    if "added_tokens_decoder" in settings:
        added = result.content["added_tokens"]
        settings["added_tokens_decoder"] = {
            str(it["id"]): {key: value for key, value in it.items() if key != "id"} for it in added
        }
    return settings


def _notes(
    models: Sequence[Checkpoint],
    counts: Sequence[int],
    tokenizers: Sequence[TokenizerFiles],
    result: TokenizerFiles,
    size: int,
    donor: int,
) -> list[str]:
    notes = []
    fresh = len(result.ids) - len(tokenizers[donor].ids)
    if fresh:
        notes.append(f"{fresh} tokens are added to the {len(tokenizers[donor].ids)} of {models[donor].label}")
    if counts[donor] > size:
        notes.append(
            f"the embedding has {size} rows, {counts[donor] - size} fewer than that of {models[donor].label}: no token "
            "has those; `tokenizer: {pad_to_multiple_of: N}` adds rows again"
        )
    for model, files in zip(models, tokenizers, strict=True):
        lost = sum(token not in result.ids for token in files.ids)
        if lost:
            notes.append(f"{lost} of {len(files.ids)} tokens of {model.label} are not in the result's vocabulary")
    return notes


def _note_on_zeros(rows: Rows, result: TokenizerFiles, given: Mapping[int, Given]) -> list[str]:
    """That rows are zeros which nobody asked for."""
    empty = np.flatnonzero(np.diff(rows.ends) == 0).tolist()
    asked = {number for number, said in given.items() if said.row == "zero"}
    tokens = [result.tokens[number] for number in empty if number in result.tokens and number not in asked]
    return [f"{len(tokens)} tokens are in no model, {tokens[0]!r} first: their rows are zeros"] if tokens else []

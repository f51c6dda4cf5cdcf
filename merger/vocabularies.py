"""Models brought to one vocabulary, before they are merged. Knows tokens, embeddings and configs; reads no weights.

What `tokenizer:` means in a mergekit configuration (tokenizer/config.py, build.py, embed.py), but lazily, with ids that
follow from the order of the models, and with tokens that are part of the new tokenizer's model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from merger.checkpoint import Checkpoint
from merger.errors import IncompatibleSources, RecipeError, UnsupportedModel
from merger.gathered import Rows
from merger.token_rows import Given, own_rows, rows_of
from merger.tokenizer_files import TokenizerFiles, files_of, is_tokenizer_file, next_id
from merger.tokenizer_outputs import tokenizer_outputs
from merger.tokenizer_unions import check_kind, trimmed, united_content
from merger.vocabulary_configs import Ids, with_vocabulary_size
from merger.vocabulary_settings import ModelToken, Reference, TokenizerSettings, Zero
from merger.vocabulary_tensors import counterpart, in_vocabulary, vocabulary_tensors

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
    ids, and with the tokenizer's files. Without a base the first model gives the ids, and no
    model's rows come before others.

    Raises RecipeError, IncompatibleSources or UnsupportedModel with the field, the tensor or the file at fault.
    """
    of_tensors = [vocabulary_tensors(model) for model in models]
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
    texts, side_files = tokenizer_outputs(models[donor], whole[donor], result)
    notes += _notes(models, counts, tokenizers, result, size, donor)
    notes += _note_on_zeros(rows[donor], result, given)
    vocabulary = Vocabulary(result.ids, size, texts, side_files, rows, tuple(notes))
    ids = [Ids(files, result, models[donor], i == donor, size) for i, files in enumerate(tokenizers)]
    made = [_brought(i, models, of_tensors[i], vocabulary, ids[i]) for i in range(len(models))]
    digests = tuple(part.digest for part in rows)
    made = [replace(model, digests=(*model.digests, *digests)) for model in made]
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


def _brought(
    number: int, models: Sequence[Checkpoint], names: Sequence[str], vocabulary: Vocabulary, ids: Ids
) -> Checkpoint:
    """One model in the new vocabulary; `names` are its tensors of tokens."""
    model = models[number]
    rows, tensors = vocabulary.rows[number], dict(model.tensors)
    for name in names:
        sources = [counterpart(name, other, model) for other in models]
        lacking = [models[i].label for i in np.unique(rows.source).tolist() if sources[i] is None]
        if lacking:
            raise IncompatibleSources(
                f"is missing in {lacking[0]}, and {model.label} needs rows of it",
                where=f"tensor {name!r}",
                remedy="Merge models of one architecture.",
            )
        tensors[name] = in_vocabulary(name, model, models, sources, rows, vocabulary.size)
    config = ids.in_config(model.config) if model.config is not None else None
    moved = vocabulary.applied(replace(model, tensors=tensors, config=config))
    return replace(moved, texts={**moved.texts, **ids.generation_text(model)})


# ---- notes ------------------------------------------------------------------------------------------


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

"""Checkpoints combined tensor by tensor; their weighted sum, the one operation behind every average.

Knows which checkpoints may be added; reads no weights.

Rules (`docs/averaging.md`): the same tensors in the same shapes, or a refusal that names the first that
differs; floating tensors are summed, integer buffers must be identical, running statistics of batch
normalisation come from the newest checkpoint, tied heads are told apart from missing ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from merger.architecture import (
    differences,
    embedding_of,
    head_of,
    is_running_statistic,
    labels_of,
    ties_embeddings,
    with_ties,
)
from merger.checkpoint import Checkpoint, Part
from merger.dtypes import DTYPES, Kind, promote
from merger.errors import IncompatibleSources, UnsupportedModel
from merger.expression import Expression, Identical, Stored, combine
from merger.tokenizer import difference


def weighted_sum(checkpoints: Sequence[Checkpoint], weights: Sequence[float]) -> Checkpoint:
    """The checkpoint whose floating tensors are the sum of weight * tensor; config and side files come from the first.

    Raises IncompatibleSources with the tensor or the config key at fault.
    """
    if len(checkpoints) == 1 and weights[0] == 1.0:
        return checkpoints[0]
    return combined(checkpoints, weights, lambda _, floats: _sum(floats, weights))


def combined(
    checkpoints: Sequence[Checkpoint],
    weights: Sequence[float],
    merge: Callable[[str, Sequence[Expression]], Expression],
) -> Checkpoint:
    """The checkpoint whose floating tensors are what `merge` makes of a name and the tensors of that name; config and
    side files come from the first. `weights` are what the report says of them.

    Raises IncompatibleSources with the tensor or the config key at fault.
    """
    check_models(checkpoints)
    check_vocabularies(checkpoints)
    checkpoints, notes = same_head(checkpoints)
    _check_names(checkpoints)
    first = checkpoints[0]
    tensors = {name: merged(name, checkpoints, partial(merge, name)) for name in first.tensors}
    parts: list[Part] = []
    for checkpoint, weight in zip(checkpoints, weights, strict=True):
        parts += [Part(part.source, weight * part.weight) for part in checkpoint.parts]
    return replace(
        first,
        tensors=tensors,
        parts=tuple(parts),
        notes=_unique([*_all_notes(checkpoints), *notes, *_notes_on_tensors(checkpoints)]),
        warnings=_unique([*(w for c in checkpoints for w in c.warnings), *config_warnings(checkpoints)]),
        kin=tuple(kin for checkpoint in checkpoints for kin in checkpoint.kin),
        origin=None,  # no surgery that one of them went through describes what comes of them
        optimizer={},
        paragraphs=(),
    )


# ---- configs and tokenizers ---------------------------------------------------------------------------


def check_models(checkpoints: Sequence[Checkpoint]) -> None:
    """See that models are of one kind, none of them an adapter or quantized.

    Raises UnsupportedModel and IncompatibleSources.
    """
    first = checkpoints[0]
    for checkpoint in checkpoints:
        if checkpoint.is_adapter:
            raise UnsupportedModel(
                "is an adapter: the mean of its factors A and B apart is not the mean of what they do",
                where=checkpoint.label,
                remedy="`method: lora` adds adapters, with `base` into a model.",
            )
        if checkpoint.config and "quantization_config" in checkpoint.config:
            raise IncompatibleSources(
                "is quantized: its stored numbers are not its weights",
                where=checkpoint.label,
                remedy="Dequantize it first, for example with transformers' `dequantize()` and `save_pretrained`.",
            )
    for other in checkpoints[1:]:
        kinds = [(checkpoint.config or {}).get("model_type") for checkpoint in (first, other)]
        if None not in kinds and kinds[0] != kinds[1]:
            raise IncompatibleSources(
                f"model_type is {kinds[0]} in {first.label} and {kinds[1]} in {other.label}",
                where="config.json",
                remedy="Only models of one architecture can be averaged.",
            )
        _check_labels(first, other)


def check_vocabularies(checkpoints: Sequence[Checkpoint]) -> None:
    """See that models have one vocabulary. Raises IncompatibleSources."""
    first = checkpoints[0]
    for other in checkpoints[1:]:
        problem = difference(first.side_files, other.side_files)
        if problem:
            raise IncompatibleSources(
                f"{first.label} and {other.label} do not use the same vocabulary: {problem}",
                where="tokenizer",
                remedy="Rows of the embedding would mix different tokens. Average models with one tokenizer.",
            )


def _check_labels(first: Checkpoint, other: Checkpoint) -> None:
    a, b = labels_of(first.config), labels_of(other.config)
    if a is None or b is None or a == b:
        return
    if len(a) == len(b) and sorted(a) == sorted(b):
        problem = f"the same labels in another order: {', '.join(a[:4])} in {first.label}, {', '.join(b[:4])} in"
    else:
        odd = sorted(set(a) ^ set(b), key=(*a, *b).index)[0]
        problem = f"{len(a)} labels in {first.label} and {len(b)}, of which {odd!r} is not in both, in"
    raise IncompatibleSources(
        f"{problem} {other.label}",
        where="config.json: id2label",
        remedy="Rows of the classifier would mix different classes. Average models with one list of labels.",
    )


def config_warnings(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """In what the configs of others differ from the first's, which is taken."""
    first = checkpoints[0]
    warnings = []
    for other in checkpoints[1:]:
        for key, (a, b) in differences(first.config, other.config).items():
            warnings.append(
                f"config.json: {key} is {a!r} in {first.label} and {b!r} in {other.label}; the first is used"
            )
    return warnings


# ---- names --------------------------------------------------------------------------------------------


def same_head(checkpoints: Sequence[Checkpoint]) -> tuple[Sequence[Checkpoint], list[str]]:
    """Where some models lack the output head because it is tied to the embedding, give all of them one or none."""
    names: set[str] = set().union(*(checkpoint.tensors for checkpoint in checkpoints))
    head, embedding = head_of(names), embedding_of(names)
    lacking = [checkpoint for checkpoint in checkpoints if head not in checkpoint.tensors]
    if not head or not embedding or not lacking or not all(_may_be_tied(c, embedding) for c in lacking):
        return checkpoints, []
    having = [checkpoint for checkpoint in checkpoints if head in checkpoint.tensors]
    if all(ties_embeddings(checkpoint.config) for checkpoint in having):
        dropped = [_without(checkpoint, head) for checkpoint in checkpoints]
        return dropped, [f"{head} is left out: it is tied to {embedding} in every source"]
    note = f"{head} is stored apart from {embedding}: some sources tie them, others do not"
    return [_with_own_head(checkpoint, head, embedding) for checkpoint in checkpoints], [note]


def _may_be_tied(checkpoint: Checkpoint, embedding: str) -> bool:
    config = checkpoint.config or {}
    return embedding in checkpoint.tensors and (ties_embeddings(config) or "tie_word_embeddings" not in config)


def _without(checkpoint: Checkpoint, head: str) -> Checkpoint:
    return replace(checkpoint, tensors={name: tensor for name, tensor in checkpoint.tensors.items() if name != head})


def _with_own_head(checkpoint: Checkpoint, head: str, embedding: str) -> Checkpoint:
    config = with_ties(checkpoint.config, False) if checkpoint.config else None
    tensors = dict(checkpoint.tensors)
    tensors.setdefault(head, tensors[embedding])
    return replace(checkpoint, tensors=tensors, config=config)


def _check_names(checkpoints: Sequence[Checkpoint]) -> None:
    first = checkpoints[0]
    for other in checkpoints[1:]:
        odd = sorted(first.tensors.keys() ^ other.tensors.keys())
        if odd:
            lacking = other if odd[0] in first.tensors else first
            more = f" (and {len(odd) - 1} more tensors differ)" if len(odd) > 1 else ""
            raise IncompatibleSources(
                f"is missing in {lacking.label}, the other of {first.label} and {other.label} has it{more}",
                where=f"tensor {odd[0]!r}",
                remedy="Average checkpoints of one model. `merger inspect` shows what each holds.",
            )


# ---- tensors ------------------------------------------------------------------------------------------


def _sum(tensors: Sequence[Expression], weights: Sequence[float]) -> Expression:
    return combine(list(zip(weights, tensors, strict=True)), promote(frozenset(tensor.dtype for tensor in tensors)))


def merged(
    name: str, checkpoints: Sequence[Checkpoint], merge: Callable[[Sequence[Expression]], Expression]
) -> Expression:
    """The tensors of one name as one: `merge` is for floating ones; others must be identical. Raises
    IncompatibleSources where shapes, or dtypes that are not floating, differ.
    """
    tensors = [checkpoint.tensors[name] for checkpoint in checkpoints]
    shape = tensors[0].shape
    for tensor, checkpoint in zip(tensors, checkpoints, strict=True):
        if tensor.shape != shape:
            _refuse_shapes(name, checkpoints[0], checkpoint)
    if is_running_statistic(name):
        return tensors[-1]
    dtypes = frozenset(tensor.dtype for tensor in tensors)
    if all(DTYPES[dtype].is_float for dtype in dtypes):
        return merge(tensors)
    return _identical(name, tensors, dtypes, checkpoints)


def _refuse_shapes(name: str, first: Checkpoint, other: Checkpoint) -> None:
    a, b = list(first.tensors[name].shape), list(other.tensors[name].shape)
    vocabulary = name in (embedding_of(first.tensors), head_of(first.tensors)) and a[1:] == b[1:]
    cause = "their vocabularies have different sizes" if vocabulary else "they are not the same model"
    raise IncompatibleSources(
        f"has the shape {a} in {first.label} and {b} in {other.label}: {cause}",
        where=f"tensor {name!r}",
        remedy="Bring the embeddings to one size first." if vocabulary else "Average checkpoints of one model.",
    )


def _identical(
    name: str, tensors: Sequence[Expression], dtypes: frozenset[str], sources: Sequence[Checkpoint]
) -> Expression:
    if len(dtypes) > 1:
        raise IncompatibleSources(f"has different dtypes: {', '.join(sorted(dtypes))}", where=f"tensor {name!r}")
    if DTYPES[tensors[0].dtype].kind is Kind.PACKED:
        raise IncompatibleSources(
            f"is {tensors[0].dtype}: such numbers mean nothing without their scales and cannot be averaged",
            where=f"tensor {name!r} of {sources[0].label}",
            remedy="Dequantize the checkpoints first.",
        )
    stored = [leaf for tensor in tensors for leaf in _stored(tensor)]
    return Identical(stored[0].dtype, stored[0].shape, stored[0], tuple(stored[1:]))


def _stored(tensor: Expression) -> list[Stored]:
    return [tensor.first, *tensor.others] if isinstance(tensor, Identical) else list(tensor.leaves())


# ---- notes --------------------------------------------------------------------------------------------


def _notes_on_tensors(checkpoints: Sequence[Checkpoint]) -> list[str]:
    notes = []
    first = checkpoints[0]
    statistics = sum(1 for name in first.tensors if is_running_statistic(name))
    if statistics:
        notes.append(
            f"{statistics} running statistics of batch normalisation are those of {checkpoints[-1].label}: "
            "recompute them with a pass over training data before use"
        )
    mixed = [name for name in first.tensors if len({checkpoint.tensors[name].dtype for checkpoint in checkpoints}) > 1]
    if mixed:
        notes.append(
            f"{len(mixed)} tensors come in different dtypes and are written in one that holds them all, "
            f"{mixed[0]} first"
        )
    return notes


def _all_notes(checkpoints: Sequence[Checkpoint]) -> list[str]:
    return [note for checkpoint in checkpoints for note in checkpoint.notes]


def _unique(notes: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(notes))

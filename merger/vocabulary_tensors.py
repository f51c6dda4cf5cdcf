"""Tensors whose rows are tokens: which they are, and how their rows change. Knows names; knows nothing of files."""

import re
from collections.abc import Sequence

from merger.architecture import embedding_of, head_of, ties_embeddings
from merger.checkpoint import Checkpoint
from merger.dtypes import promote
from merger.errors import IncompatibleSources, UnsupportedModel
from merger.expression import Expression
from merger.gathered import Rows, gathered, padded
from merger.kernels import CODES

# Beside the embedding and the head: embeddings that a model has twice, heads of encoders, and biases.
_OTHERS = re.compile(
    r"(^|\.)shared\.weight$|(^|\.)(encoder|decoder)\.embed_tokens\.weight$|(^|\.)(lm_head|embed_out)\.bias$"
    r"|^cls\.predictions\.(decoder\.(weight|bias)|bias)$"
)
# Rows by token that are not rows of the first axis, or of another vocabulary.
_REFUSED = re.compile(r"(^|\.)(final_logits_bias|embed_tokens_per_layer\.weight)$")


def vocabulary_tensors(model: Checkpoint) -> list[str]:
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


def counterpart(name: str, other: Checkpoint, model: Checkpoint) -> Expression | None:
    """A model's tensor of this name; its embedding where the name is that of a head which is tied there."""
    if name in other.tensors:
        return other.tensors[name]
    embedding = embedding_of(other.tensors)
    is_tied = ties_embeddings(other.config) or "tie_word_embeddings" not in (other.config or {})
    return other.tensors[embedding] if name == head_of(model.tensors) and embedding and is_tied else None


def in_vocabulary(
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

"""Changes of low rank put into a model. Knows which stored tensor a module's name means; reads no weights."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from merger.architecture import embedding_of, head_of, ties_embeddings, with_ties
from merger.checkpoint import Checkpoint
from merger.errors import IncompatibleSources, UnsupportedModel
from merger.expression import Expression, Identical, Stored, combine
from merger.factors import product
from merger.kernels import CODES
from merger.quantized import dequantized

Graft = tuple[float, Expression, Expression, bool]  # weight, B, A, whether it is of an embedding
_CAUSAL = ("ForCausalLM", "LMHeadModel")
# Families with layers that hold [in, out]. PEFT's flag for it is that of the layer that it came to last.
_FAN_IN_FIRST = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_CONV1D = {"c_attn", "c_proj", "c_fc", "q_attn"}


def grafted(
    base: Checkpoint,
    changes: Mapping[str, Sequence[Graft]],
    values: Mapping[str, Sequence[tuple[float, Expression]]],
    copies: Mapping[str, Sequence[Expression]],
    *,
    fan_in_first: bool,
) -> Checkpoint:
    """The model with weight * B A added to modules, and with tensors that are replaced by means of others.

    `copies` are what the adapters hold of their base: seen to be what this one holds. Raises IncompatibleSources with
    what the model does not have, UnsupportedModel.
    """
    base = dequantized(base)
    wanted = {**{f"{module}.weight": module for module in changes}, **{name: name for name in values}}
    model, places = _with_own_head(base, wanted)
    tensors = dict(model.tensors)
    for module, grafts in changes.items():
        name = places[f"{module}.weight"]
        tensors[name] = _sum(tensors[name], grafts, name, model, _is_turned(module, model.config, fan_in_first))
    for value, terms in values.items():
        name = places[value]
        _check_shape(name, tensors[name].shape, terms[0][1].shape, model)
        tensors[name] = combine(terms, tensors[name].dtype)
    return replace(
        model, tensors=tensors, origin=None, optimizer={}, paragraphs=(), same=(*base.same, *_same(model, copies))
    )


# ---- names --------------------------------------------------------------------------------------------


def places_of(wanted: Iterable[str], names: Iterable[str], label: str) -> dict[str, str]:
    """The stored tensor that each name of a model in memory means: the same, or one that lacks the first part of the
    name or has one more (a model is stored with or without its head's prefix). Raises IncompatibleSources.
    """
    known = set(names)
    firsts = {name.partition(".")[0] for name in known}
    longer: dict[str, list[str]] = {}
    for name in sorted(known):
        longer.setdefault(name.partition(".")[2], []).append(name)
    found = {}
    for name in wanted:
        first, _, rest = name.partition(".")
        candidates = (
            [name] if name in known else [rest] if rest in known and first not in firsts else longer.get(name, [])
        )
        if len(candidates) != 1:
            raise IncompatibleSources(
                f"is changed by the adapters, and {label} has no such tensor",
                where=f"tensor {name!r}",
                remedy="Name the adapters' own base. Modules that are fused or renamed in memory only are not found in "
                "stored models: without `base` such adapters can be merged.",
            )
        found[name] = candidates[0]
    return found


def _with_own_head(base: Checkpoint, wanted: Iterable[str]) -> tuple[Checkpoint, dict[str, str]]:
    """The model, and where the wanted names are in it. Where one of them is the embedding or the head and both are one
    tensor, they become two: in PEFT the change of one does not reach the other.
    """
    embedding = embedding_of(base.tensors)
    if embedding is None or not ties_embeddings(base.config):
        return base, places_of(wanted, base.tensors, base.label)
    head = head_of(base.tensors) or "lm_head.weight"
    places = places_of(wanted, [*base.tensors, head], base.label)
    if not {embedding, head} & set(places.values()):
        return base, places
    kinds = (base.config or {}).get("architectures") or [""]
    if not str(kinds[0]).endswith(_CAUSAL):
        remedy = "Untie them first (tie_word_embeddings: false, both stored)."
        raise UnsupportedModel("ties its embeddings, of which one is changed", where=base.label, remedy=remedy)
    tensors = {**base.tensors, head: base.tensors.get(head, base.tensors[embedding])}
    apart = replace(base, tensors=tensors, config=with_ties(base.config or {}, False))
    return apart.noting(f"{head} is stored apart from {embedding}: the adapters change one of them"), places


# ---- tensors ------------------------------------------------------------------------------------------


def _is_turned(module: str, config: Mapping[str, Any] | None, fan_in_first: bool) -> bool:
    if (config or {}).get("model_type") in _FAN_IN_FIRST:
        return module.rpartition(".")[2] in _CONV1D
    return fan_in_first


def _sum(weight: Expression, grafts: Sequence[Graft], name: str, model: Checkpoint, turned: bool) -> Expression:
    if weight.dtype not in CODES:
        raise UnsupportedModel(
            f"is {weight.dtype}, in which merger does not calculate",
            where=f"{model.label}: tensor {name!r}",
            remedy="Convert the base to bfloat16 first.",
        )
    terms = [(1.0, weight)]
    for factor, b, a, is_embedding in grafts:
        shape = (b.shape[0], a.shape[1])
        rows_for_columns = is_embedding or (turned and weight.shape == shape[::-1])
        _check_shape(name, weight.shape, shape[::-1] if rows_for_columns else shape, model)
        terms.append((factor, product(b, a, turned=rows_for_columns)))
    return combine(terms, weight.dtype)


def _check_shape(name: str, own: tuple[int, ...], other: tuple[int, ...], model: Checkpoint) -> None:
    if own != other:
        raise IncompatibleSources(
            f"has the shape {list(own)} in {model.label} and {list(other)} in the adapters",
            where=f"tensor {name!r}",
            remedy="Name the base that the adapters were trained on; after new tokens, the one with more rows.",
        )


def _same(base: Checkpoint, copies: Mapping[str, Sequence[Expression]]) -> list[tuple[str, Identical]]:
    """The base's tensors with the adapters' copies of them, as far as both are stored in one dtype."""
    found = []
    for name, place in places_of(copies, base.tensors, base.label).items() if copies else ():
        own = base.tensors[place]
        for copy in copies[name]:
            _check_shape(place, own.shape, copy.shape, base)
        others = tuple(leaf for copy in copies[name] for leaf in copy.leaves() if leaf.dtype == own.dtype)
        if isinstance(own, Stored) and others:
            found.append((place, Identical(own.dtype, own.shape, own, others)))
    return found

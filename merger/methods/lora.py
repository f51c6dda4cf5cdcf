"""Sums of LoRA adapters, as an adapter or in their base. Knows what may be added; reads no weights.

A change of rank r is scale * B A. Sums of changes are no sums of factors: B1 A1 + B2 A2 is what the factors make that
stand beside each other, [B1 B2] times [A1; A2], of the rank r1 + r2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from merger.adapters import (
    REMEDY,
    Adapter,
    adapter_of,
    doubts,
    merged_config,
    name_of_copy,
    name_of_value,
    names_of,
)
from merger.checkpoint import Checkpoint, Part
from merger.errors import IncompatibleSources, RecipeError, UnsupportedModel
from merger.expression import Expression, Filled, Identical, Stored, cast, combine
from merger.factors import stacked, truncated
from merger.kernels import CODES
from merger.methods.fine_tunes import Entries, opened
from merger.methods.grafting import grafted
from merger.methods.method import Method, Source, Sources, open_source

Combine = Literal["exact", "factors"]


class Lora(Method):
    """LoRA adapters added up: to one adapter, exact or of a lower rank, or into their base."""

    method: Literal["lora"] = "lora"
    adapters: Entries = Field(description="PEFT folders: a pattern, or a list with or without a `weight` (1 without).")
    base: Source | None = Field(
        default=None, description="The model to add them to; without, the result is an adapter and no model is needed."
    )
    scale: float = Field(default=1.0, description="A factor for all weights.")
    rank: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="The most that the result's rank may be: the best approximation (SVD) where it is."
    )
    combine: Combine = Field(
        default="exact",
        description="exact: the sum of the changes. factors: the product of the summed factors, with cross terms, as "
        "LoraHub has it.",
    )

    paper: ClassVar[str] = "LoRA, arXiv 2106.09685; LoraHub, 2307.13269"
    example: ClassVar[str] = (
        "method: lora\nadapters:\n  - {source: adapters/code, weight: 0.7}\n"
        "  - {source: adapters/math, weight: 0.3}\nrank: 16\noutput: {path: out/adapter}"
    )

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.rank and self.base:
            raise ValueError("`rank` is for an adapter: into a base the sum goes as it is")
        if self.rank and self.combine == "factors":
            raise ValueError("combine: factors keeps the rank: leave `rank` out")
        return self

    def build(self, sources: Sources) -> Checkpoint:
        checkpoints, weights = opened(sources, self.adapters)
        base = open_source(sources, self.base) if self.base else None
        for checkpoint in checkpoints:
            if not checkpoint.is_adapter:
                remedy = "Whole fine-tunes of one model are added by `task_arithmetic` or `soup`."
                raise UnsupportedModel("is a model, not an adapter", where=checkpoint.label, remedy=remedy)
        pairs = [(found, weight) for found, weight in zip(checkpoints, weights, strict=True) if weight * self.scale]
        if not pairs and base is None:
            raise RecipeError("every weight is zero", where="adapters")
        if [self.scale * weight for _, weight in pairs] == [1.0] and base is None and self.rank is None:
            return pairs[0][0]
        total = Sum([adapter_of(found) for found, _ in pairs], [w for _, w in pairs], self.scale, self.combine)
        return total.in_base(base) if base else total.adapter(self.rank)


@dataclass(frozen=True)
class Sum:
    """Adapters and the weights, none of them 0, with which they count."""

    adapters: Sequence[Adapter]
    weights: Sequence[float]
    scale: float
    combine: Combine

    def terms(self) -> dict[str, list[tuple[float, Expression, Expression]]]:
        """For each module what is added up: weight, B, A. Raises IncompatibleSources."""
        modules = dict.fromkeys(module for adapter in self.adapters for module in adapter.changes)
        self._check(modules)
        return {module: self._factors(module) if self.combine == "factors" else self._sum(module) for module in modules}

    def is_embedding(self, module: str) -> bool:
        return next(a.changes[module].is_embedding for a in self.adapters if module in a.changes)

    def _sum(self, module: str) -> list[tuple[float, Expression, Expression]]:
        pairs = zip(self.adapters, self.weights, strict=True)
        found = [
            (weight * self.scale, adapter.changes[module]) for adapter, weight in pairs if module in adapter.changes
        ]
        return [(weight * change.scale, change.b, change.a) for weight, change in found]

    def _factors(self, module: str) -> list[tuple[float, Expression, Expression]]:
        changes = [adapter.changes.get(module) for adapter in self.adapters]
        kept = [change for change in changes if change]
        if len(kept) < len(changes) or len({(change.rank, change.scale) for change in kept}) > 1:
            raise IncompatibleSources(
                "has not the same rank and scale in all adapters: their factors cannot be added",
                where=f"combine: factors: {module}",
                remedy="With combine: exact ranks, scales and modules may differ.",
            )
        a, b = (self._total([getattr(change, side) for change in kept]) for side in ("a", "b"))
        return [(self.scale * kept[0].scale, b, a)]

    def _total(self, factors: Sequence[Expression]) -> Expression:
        """The weighted sum, which may be of nothing: an adapter that is named twice, for and against."""
        nothing = Filled("F64", factors[0].shape)
        return combine([*zip(self.weights, factors, strict=True), (1.0, nothing)], "F64")

    def _check(self, modules: Mapping[str, None]) -> None:
        """See that the adapters change one model: the same kinds of modules in the same shapes."""
        tasks = {
            str(adapter.config["task_type"]): adapter for adapter in self.adapters if adapter.config.get("task_type")
        }
        if len(tasks) > 1:
            (task, first), (other_task, other) = list(tasks.items())[:2]
            raise IncompatibleSources(
                f"is {task} in {first.label} and {other_task} in {other.label}",
                where="adapter_config.json: task_type",
                remedy="Adapters for other tasks sit on models with other heads.",
            )
        for module in modules:
            having = [adapter for adapter in self.adapters if module in adapter.changes]
            shapes = [_shape(adapter, module) for adapter in having]
            for other, shape in zip(having, shapes, strict=True):
                if shape != shapes[0]:
                    raise IncompatibleSources(
                        f"has the shape {shapes[0][:2]} in {having[0].label} and {shape[:2]} in {other.label}",
                        where=f"module {module!r}",
                        remedy="Only adapters for one base can be added.",
                    )

    # ---- what is whole

    def values(self) -> dict[str, list[tuple[float, Expression]]]:
        """Whole tensors that were trained, with the weights of their mean. Raises IncompatibleSources."""
        names = dict.fromkeys(name for adapter in self.adapters for name in adapter.values)
        weights = [weight * self.scale for weight in self.weights]
        for name in names:
            lacking = [adapter.label for adapter in self.adapters if name not in adapter.values]
            if lacking or abs(sum(weights) - 1.0) > 1e-6:
                why = f"{lacking[0]} has none" if lacking else f"the weights sum to {sum(weights):g}, not to 1"
                raise IncompatibleSources(
                    f"is a whole tensor (a bias or a saved module), not a change: only its mean makes sense, and {why}",
                    where=f"tensor {name!r}",
                    remedy="Let the weights sum to 1, of adapters that all have it.",
                )
            odd = {adapter.values[name].dtype for adapter in self.adapters} - CODES.keys()
            if odd:
                raise UnsupportedModel(
                    f"is {min(odd)}, of which there is no mean", where=f"tensor {name!r}", remedy=REMEDY
                )
            shapes = {adapter.values[name].shape for adapter in self.adapters}
            if len(shapes) > 1:
                raise IncompatibleSources(f"has the shapes {sorted(shapes)}", where=f"tensor {name!r}", remedy=REMEDY)
        return {
            name: [(w, adapter.values[name]) for w, adapter in zip(weights, self.adapters, strict=True)]
            for name in names
        }

    def copies(self) -> dict[str, list[Expression]]:
        """Copies of the base's tensors, of which all that are stored alike must be the same."""
        found: dict[str, list[Expression]] = {}
        for adapter in self.adapters:
            for name, tensor in adapter.copies.items():
                found.setdefault(name, []).append(tensor)
        return found

    # ---- results

    def adapter(self, most: int | None) -> Checkpoint:
        """The sum as an adapter, of a rank of at most `most`."""
        terms = self.terms()
        ranks = {module: sum(a.shape[0] for *_, a in found) for module, found in terms.items()}
        rank = min(max(ranks.values()), most or max(ranks.values()))
        dtype = "F64" if any(t.dtype == "F64" for adapter in self.adapters for t in _stored(adapter)) else "F32"
        tensors: dict[str, Expression] = {}
        for module, found in terms.items():
            b, a = truncated(*stacked(found), rank) if ranks[module] > rank else stacked(found, rank)
            names = names_of(module, self.is_embedding(module))
            tensors |= zip(names, (cast(a, dtype), cast(b, dtype)), strict=True)
        for name, values in self.values().items():
            tensors[name_of_value(name, terms)] = combine(values, values[0][1].dtype)
        tensors |= {name_of_copy(name): identical(copies) for name, copies in self.copies().items()}
        config = merged_config([adapter.config for adapter in self.adapters], terms, rank)
        return self._result(tensors, config, self._notes_on(ranks, rank))

    def in_base(self, base: Checkpoint) -> Checkpoint:
        """The sum in a model."""
        if base.is_adapter:
            raise UnsupportedModel("is an adapter, not a model", where=base.label, remedy="Name the model as `base`.")
        if not self.adapters:
            return base
        changes = {
            module: [(weight, b, a, self.is_embedding(module)) for weight, b, a in found]
            for module, found in self.terms().items()
        }
        fan_in_first = any(adapter.config.get("fan_in_fan_out") for adapter in self.adapters)
        made = grafted(base, changes, self.values(), self.copies(), fan_in_first=fan_in_first)
        mine = self._result({}, {}, [])
        return replace(
            made,
            parts=(*mine.parts, *base.parts),
            notes=(*base.notes, *made.notes[len(base.notes) :], *mine.notes),
            warnings=(*base.warnings, *mine.warnings),
        )

    def _result(self, tensors: Mapping[str, Expression], config: Mapping[str, Any], notes: Sequence[str]) -> Checkpoint:
        first = self.adapters[0].checkpoint
        pairs = list(zip(self.adapters, self.weights, strict=True))
        return Checkpoint(
            tensors,
            config,
            first.side_files,
            tuple(Part(p.source, w * self.scale * p.weight) for a, w in pairs for p in a.checkpoint.parts),
            notes=tuple(dict.fromkeys([*(n for a, _ in pairs for n in a.checkpoint.notes), *self._bases(), *notes])),
            warnings=tuple(
                dict.fromkeys(d for a, _ in pairs for d in (*a.checkpoint.warnings, *doubts(a.config, a.label)))
            ),
            label=first.label,
        )

    def _bases(self) -> list[str]:
        """A path tells little: the same model lies in other places on other machines."""
        names = {str(adapter.config.get("base_model_name_or_path")): adapter.label for adapter in self.adapters}
        if len(names) < 2:
            return []
        told = ", ".join(f"{name} ({label})" for name, label in names.items())
        return [f"the adapters name their base differently: {told}; see that it is one model"]

    def _notes_on(self, ranks: Mapping[str, int], rank: int) -> list[str]:
        less, more = sum(r < rank for r in ranks.values()), sum(r > rank for r in ranks.values())
        notes = ["factors are written in float32, whatever they are stored in; `output.dtype` narrows them"]
        notes += [f"{less} of {len(ranks)} modules are filled up with zeros to the one rank {rank}"] if less else []
        notes += [f"{more} of {len(ranks)} modules are approximated to rank {rank}"] if more else []
        return notes


def with_adapter(model: Checkpoint, adapter: Checkpoint) -> Checkpoint:
    """The model with an adapter in it, as mergekit's `model+lora` means it: W + scale * B A, block by block; config,
    tokenizer and other side files are the model's.

    Raises UnsupportedModel for what is no plain LoRA adapter, IncompatibleSources with the adapter and the tensor where
    it is one for another model.
    """
    if not adapter.is_adapter:
        remedy = "In `model+lora` the part after the plus is a PEFT folder with an adapter_config.json."
        raise UnsupportedModel("is a model, not an adapter", where=adapter.label, remedy=remedy)
    try:
        made = Sum([adapter_of(adapter)], [1.0], 1.0, "exact").in_base(model)
    except IncompatibleSources as error:
        where = f"{model.label}+{adapter.label}: {error.where}"
        raise IncompatibleSources(error.message, where=where, remedy=error.remedy) from error
    return made.named(f"{model.label}+{adapter.label}")


def _shape(adapter: Adapter, module: str) -> tuple[int, int, bool]:
    change = adapter.changes[module]
    return change.b.shape[0], change.a.shape[1], change.is_embedding


def _stored(adapter: Adapter) -> list[Expression]:
    return [factor for change in adapter.changes.values() for factor in (change.a, change.b)]


def _all_stored(tensor: Expression) -> list[Stored]:
    return [tensor.first, *tensor.others] if isinstance(tensor, Identical) else list(tensor.leaves())


def identical(tensors: Sequence[Expression]) -> Expression:
    """Copies of one tensor: the first, once all that have its dtype are seen to hold the same bytes."""
    leaves = [leaf for tensor in tensors for leaf in _all_stored(tensor)]
    alike = tuple(leaf for leaf in leaves[1:] if leaf.dtype == leaves[0].dtype)
    return Identical(leaves[0].dtype, leaves[0].shape, leaves[0], alike)

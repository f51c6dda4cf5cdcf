"""Mixtures of experts in the order of another's experts, so that they can be averaged. Knows recipes; compares nothing.

What is found stands in the settled recipe as numbers: which expert of the source takes each place of each layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from merger.checkpoint import Checkpoint, Origin
from merger.configs import resolved
from merger.errors import IncompatibleSources, RecipeError, UnsupportedModel
from merger.evaluation import Alignment, Measured
from merger.layers import Layers, split
from merger.methods.method import Choice, Means, Method, Source, Sources, open_source
from merger.mixtures import by_expert, has_experts, reordered


class AlignExperts(Method):
    """A mixture with its experts in the places of those of another that are most like them; computes what it did."""

    method: Literal["align_experts"] = "align_experts"
    source: Source = Field(description="The mixture whose experts change places, their rows of the routers with them.")
    like: Source = Field(description="The mixture of the same shape whose experts keep theirs.")
    orders: list[list[int]] | None = Field(
        default=None,
        description="For each layer the expert of the source that takes each place; the run finds them without.",
    )

    paper: ClassVar[str] = "Git Re-Basin, arXiv 2209.04836, section 3.2 (weight matching), of whole experts"
    example: ClassVar[str] = (
        "method: align_experts\nsource: models/moe-b\nlike: models/moe-a\noutput: {path: out/aligned}"
    )

    def evaluations(self) -> tuple[Measured, ...]:
        return () if self.orders is not None else (Alignment(),)

    def chosen(self, means: Means) -> tuple[Method, tuple[Choice, ...]]:
        if self.orders is not None:
            return self, ()
        found = means.judge.score(self.source, Alignment(), along=[self.like])
        return self.model_copy(update={"orders": [list(order) for order in found.orders]}), ()

    def build(self, sources: Sources) -> Checkpoint:
        source, like = open_source(sources, self.source), open_source(sources, self.like)
        config = resolved(source.config, source.label)
        layers, others = split(source.tensors, config, source.label)
        _check_alike(source, like, layers)
        orders = self._orders(layers)
        result = dict(others)
        for index, layer in enumerate(layers.tensors):
            made = reordered(layer, orders[index]) if orders[index] else layer
            result |= {layers.named(index, rest): tensor for rest, tensor in made.items()}
        origin = Origin(
            source, "close", "experts and their rows of the routers move together", tuple(range(len(layers)))
        )
        return replace(source, tensors=result, origin=origin, optimizer={}, notes=(*source.notes, self._note(orders)))

    def _orders(self, layers: Layers) -> Sequence[Sequence[int]]:
        """One for each layer; those that are not known yet leave everything where it is. Raises RecipeError."""
        counts = [_count(layer) for layer in layers.tensors]
        if self.orders is None:
            return [range(count) for count in counts]
        wrong = [i for i, order in enumerate(self.orders[: len(counts)]) if sorted(order) != list(range(counts[i]))]
        if wrong or len(self.orders) != len(counts):
            what = f"that of layer {wrong[0]} is no order of its experts" if wrong else "are not as many as layers"
            raise RecipeError(what, where="orders", remedy="Leave them out: the run finds them.")
        return self.orders

    def _note(self, orders: Sequence[Sequence[int]]) -> str:
        if self.orders is None:
            return "which expert goes to which place is found in the run"
        moved = sum(expert != place for order in orders for place, expert in enumerate(order))
        return f"{moved} of {sum(map(len, orders))} experts have changed their places"


def _count(layer: Mapping[str, Any]) -> int:
    return len(next(iter(by_expert(layer).values()))) if has_experts(layer) else 0


def _check_alike(source: Checkpoint, like: Checkpoint, layers: Layers) -> None:
    """See that both are mixtures of one shape. Raises IncompatibleSources and UnsupportedModel."""
    if not any(has_experts(layer) for layer in layers.tensors):
        raise UnsupportedModel("has no experts", where=source.label)
    odd = sorted(source.tensors.keys() ^ like.tensors.keys())
    odd = odd or [name for name, tensor in source.tensors.items() if tensor.shape != like.tensors[name].shape]
    if odd:
        raise IncompatibleSources(
            f"is not the same in {source.label} and {like.label}",
            where=f"tensor {odd[0]!r}",
            remedy="Experts of mixtures of one shape can be compared.",
        )

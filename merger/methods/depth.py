"""Methods that change how many layers a model has: block expansion and stacking.

Knows which layers go where; the names of tensors and the keys of configs are in `merger.layers`.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from merger.architecture import differences
from merger.checkpoint import Checkpoint, Origin
from merger.configs import resolved
from merger.errors import IncompatibleSources, RecipeError, UnsupportedModel
from merger.expression import Expression, Filled
from merger.layers import (
    Layers,
    belongs_to_layers,
    check_positions_do_not_count,
    count_of,
    is_sparse,
    outputs_of,
    per_layer_lists_joined,
    prefix_of,
    scalars_of,
    split,
    with_layers,
)
from merger.methods.method import Method, Source, Sources, open_source
from merger.methods.optimizer import CARRY, Carry, carried


@dataclass(frozen=True)
class Block:
    """A layer of the result: the source's layer that it is made from, and whether it adds nothing at first."""

    source: int
    is_identity: bool = False


def rebuilt(origin: Checkpoint, blocks: Sequence[Block], carry: Carry) -> Checkpoint:
    """The model with these layers; nothing is claimed of it yet. Raises UnsupportedModel."""
    where = origin.label
    config = resolved(origin.config, where)
    check_positions_do_not_count(config, where)
    layers, _ = split(origin.tensors, config, where)
    sparse = [is_sparse(layers.tensors[block.source]) for block in blocks]
    return replace(
        origin,
        tensors=arranged(origin.tensors, config, blocks, where),
        config=with_layers(config, [block.source for block in blocks], sparse, where),
        origin=Origin(origin, "none", "", tuple(None if block.is_identity else block.source for block in blocks)),
        optimizer=carried(carry, origin, lambda moments: _moments(moments.tensors, config, blocks, where)),
    )


def arranged(
    tensors: Mapping[str, Expression], config: Mapping[str, Any], blocks: Sequence[Block], where: str
) -> dict[str, Expression]:
    """The tensors of a model with these blocks: everything outside the layers as it is, then layer by layer."""
    layers, others = split(tensors, config, where)
    made = dict(others)
    for index, block in enumerate(blocks):
        layer = layers.tensors[block.source]
        zeroed = _outputs(layer, where) if block.is_identity else ()
        ones = scalars_of(layer) if block.is_identity else ()
        for rest, tensor in layer.items():
            made[layers.named(index, rest)] = _filled(tensor, rest, zeroed, ones)
    return made


def _filled(tensor: Expression, rest: str, zeroed: Collection[str], ones: Collection[str]) -> Expression:
    if rest in zeroed or rest in ones:
        return Filled(tensor.dtype, tensor.shape, 0.0 if rest in zeroed else 1.0)
    return tensor


def _outputs(layer: Mapping[str, Expression], where: str) -> list[str]:
    found = outputs_of(layer)
    if not found:
        raise UnsupportedModel(
            f"its layers have no output projections that merger knows (among {', '.join(sorted(layer)[:4])}, ...)",
            where=where,
            remedy="Blocks can be added to the families that docs/surgery.md lists.",
        )
    return found


def _moments(
    moments: Mapping[str, Expression], config: Mapping[str, Any], blocks: Sequence[Block], where: str
) -> dict[str, Expression]:
    """Moments move with their layers; those of a block that adds nothing begin anew."""
    made = arranged(moments, config, [Block(block.source) for block in blocks], where)
    new = [str(index) for index, block in enumerate(blocks) if block.is_identity]
    fresh = re.compile(rf"^(.*?\.)?(layers|h|blocks)\.({'|'.join(new)})\.") if new else None
    return {name: Filled(t.dtype, t.shape) if fresh and fresh.match(name) else t for name, t in made.items()}


class Expand(Method):
    """Block expansion: copies of layers whose output projections are zero, so that the model computes what it did."""

    method: Literal["expand"] = "expand"
    source: Source = Field(description="The model: a folder or a recipe.")
    groups: int | None = Field(default=None, ge=1, description="How many groups of equal size the layers fall into.")
    added_per_group: int = Field(default=1, ge=1, description="How many copies of its top layers each group gets.")
    insert: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None, description="Instead of groups: the layers (from 0) after each of which a copy of it comes."
    )
    placement: Literal["interleaved", "suffix"] = Field(
        default="interleaved", description="New blocks above their group (as in the paper), or all of them on top."
    )
    optimizer: Carry = Field(default="drop", description=CARRY)

    paper: ClassVar[str] = "LLaMA Pro: progressive LLaMA with block expansion, arXiv 2401.02415"
    example: ClassVar[str] = "method: expand\nsource: models/tiny\ngroups: 4\noutput: {path: out/expanded}"

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.groups is None) == (self.insert is None):
            raise ValueError("needs exactly one of groups and insert")
        if self.insert is not None and not self.insert:
            raise ValueError("insert names no layer")
        return self

    def build(self, sources: Sources) -> Checkpoint:
        origin = open_source(sources, self.source)
        blocks = self.blocks(count_of(resolved(origin.config, origin.label), origin.label))
        result = rebuilt(origin, blocks, self.optimizer)
        new = [index for index, block in enumerate(blocks) if block.is_identity]
        named = ", ".join(map(str, new))
        pattern = rf"^{re.escape(prefix_of(result.tensors))}\.({'|'.join(map(str, new))})\."
        assert result.origin
        return replace(
            result,
            origin=replace(
                result.origin, claim="equal", reason=f"the new layers {named} add zero to the residual stream"
            ),
            texts={**result.texts, "trainable.json": json.dumps(_trainable(result, new, pattern), indent=2) + "\n"},
            paragraphs=(*result.paragraphs, _training_advice(pattern, new)),
            notes=(*result.notes, f"layers {named} of {len(blocks)} are new and add nothing yet: train these only"),
        )

    def blocks(self, count: int) -> Sequence[Block]:
        """The layers of the result for a source of `count` layers. Raises RecipeError."""
        new = self._copied(count)
        if self.placement == "suffix":
            return [*map(Block, range(count)), *(Block(layer, True) for layers in new.values() for layer in layers)]
        blocks: list[Block] = []
        for layer in range(count):
            blocks += [Block(layer), *(Block(copied, True) for copied in new.get(layer, ()))]
        return blocks

    def _copied(self, count: int) -> dict[int, list[int]]:
        """After which layer copies of which layers come."""
        if self.insert is not None:
            outside = [layer for layer in self.insert if layer >= count]
            if outside:
                raise RecipeError(f"{outside[0]} is no layer: the source has 0 to {count - 1}", where="insert")
            return {layer: [layer] * self.insert.count(layer) for layer in sorted(set(self.insert))}
        groups = self.groups or 1
        if count % groups:
            divisors = [str(n) for n in range(1, count + 1) if count % n == 0]
            raise RecipeError(
                f"{groups} does not divide the {count} layers of the source",
                where="groups",
                remedy=f"Choose one of {', '.join(divisors)}.",
            )
        size = count // groups
        if self.added_per_group > size:
            raise RecipeError(
                f"{self.added_per_group} is more than the {size} layers of a group", where="added_per_group"
            )
        return {top: list(range(top - self.added_per_group + 1, top + 1)) for top in range(size - 1, count, size)}


def _trainable(result: Checkpoint, new: Sequence[int], pattern: str) -> dict[str, Any]:
    """What trainers need to freeze everything but the new layers."""
    return {
        "layers": list(new),
        "pattern": pattern,
        "tensors": [name for name in result.tensors if re.match(pattern, name)],
    }


def _training_advice(pattern: str, new: Sequence[int]) -> str:
    return f"""## Training the new layers

The layers {", ".join(map(str, new))} are new and add nothing yet. Train these and freeze the rest
(`trainable.json` has the pattern too):

```python
import re

for name, parameter in model.named_parameters():
    parameter.requires_grad = bool(re.match(r"{pattern}", name))
```

With PEFT:

```python
from peft import LoraConfig

config = LoraConfig(target_modules="all-linear", layers_to_transform={list(new)})
```
"""


class Slice(BaseModel):
    """Layers of a model, a part of `stack`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Source = Field(description="The model: a folder or a recipe.")
    layers: str | int | list[int] = Field(
        description="A number from 0, a range such as 8-31 with both ends, or a list."
    )

    @field_validator("layers")
    @classmethod
    def _a_range(cls, value: str | int | list[int]) -> str | int | list[int]:
        if isinstance(value, str) and not re.fullmatch(r"\d+\s*-\s*\d+|\d+", value):
            raise ValueError("must be a number, a range such as 8-31, or a list of numbers")
        return value

    def numbers(self) -> list[int]:
        """The layers one by one, in their order."""
        if isinstance(self.layers, list):
            return self.layers
        first, _, last = str(self.layers).partition("-")
        return list(range(int(first), int(last or first) + 1))


class Stack(Method):
    """Layers of one model or several in any order, as in depth up-scaling. Nothing is claimed about the result."""

    method: Literal["stack"] = "stack"
    slices: list[Slice] = Field(
        min_length=1,
        description="What comes one above the other: a source and its layers. "
        "Everything but the layers comes from the first source.",
    )
    optimizer: Carry = Field(default="drop", description=CARRY)

    paper: ClassVar[str] = "SOLAR 10.7B: depth up-scaling, arXiv 2312.15166"
    example: ClassVar[str] = (
        "method: stack\nslices:\n  - {source: models/tiny, layers: 0-5}\n  - {source: models/tiny, layers: 2-7}\n"
        "output: {path: out/stacked}"
    )

    def build(self, sources: Sources) -> Checkpoint:
        opened = [open_source(sources, part.source) for part in self.slices]
        counts = [count_of(resolved(model.config, model.label), model.label) for model in opened]
        blocks, first = [], 0
        for part, count in zip(self.slices, counts, strict=True):
            numbers = part.numbers()
            outside = [number for number in numbers if not 0 <= number < count]
            if outside or not numbers:
                what = f"{outside[0]} is no layer: there are 0 to {count - 1}" if outside else "names no layer"
                raise RecipeError(what, where="slices.layers")
            blocks += [Block(first + number) for number in numbers]
            first += count
        result = rebuilt(concatenated(opened), blocks, self.optimizer)
        assert result.origin
        reason = "layers were put together that were not trained together"
        return replace(result, origin=replace(result.origin, reason=reason))


def concatenated(models: Sequence[Checkpoint]) -> Checkpoint:
    """One model with the layers of all, one model above the other; the rest comes from the first.

    Raises IncompatibleSources where they are not of one kind.
    """
    first = models[0]
    if len(models) == 1:
        return first
    configs = [resolved(model.config, model.label) for model in models]
    layers = [split(model.tensors, config, model.label)[0] for model, config in zip(models, configs, strict=True)]
    for model, config, own in zip(models, configs, layers, strict=True):
        _check_of_a_kind(first, configs[0], layers[0], model, config, own)
    tensors = dict(split(first.tensors, configs[0], first.label)[1])
    stacked = [layer for own in layers for layer in own.tensors]
    tensors |= {layers[0].named(i, rest): tensor for i, layer in enumerate(stacked) for rest, tensor in layer.items()}
    parts = dict.fromkeys(part for model in models for part in model.parts)
    config = per_layer_lists_joined(configs)
    return replace(first, tensors=tensors, config=config, parts=tuple(parts), optimizer={}, label=first.label)


def _check_of_a_kind(
    first: Checkpoint, config: Mapping[str, Any], layers: Layers, other: Checkpoint, its: Mapping[str, Any], own: Layers
) -> None:
    if layers.prefix != own.prefix:
        raise IncompatibleSources(
            f"layers are called {layers.prefix} in {first.label} and {own.prefix} in {other.label}", where="slices"
        )
    apart = {key for key in differences(config, its) if not belongs_to_layers(key, config)}
    if apart:
        key = sorted(apart)[0]
        raise IncompatibleSources(
            f"{key} is {config.get(key)!r} in {first.label} and {its.get(key)!r} in {other.label}", where="config.json"
        )
    known: dict[str, set[tuple[int, ...]]] = {}
    for layer in layers.tensors:
        for rest, tensor in layer.items():
            known.setdefault(rest, set()).add(tensor.shape)
    for layer in own.tensors:
        for rest, tensor in layer.items():
            if tensor.shape not in known.get(rest, {tensor.shape}):
                shapes = " or ".join(str(list(shape)) for shape in sorted(known[rest]))
                raise IncompatibleSources(
                    f"has the shape {shapes} in {first.label} and {list(tensor.shape)} in {other.label}",
                    where=f"tensor {rest!r}",
                )

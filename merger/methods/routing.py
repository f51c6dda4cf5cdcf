"""Mixture of Depths: routers that let tokens skip layers, as an export.

transformers runs no such models; `examples/mixture_of_depths.py` does. Knows the routers' names and config key.
"""

from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from merger.checkpoint import Checkpoint, Origin
from merger.configs import resolved
from merger.errors import RecipeError
from merger.expression import Filled
from merger.layers import split
from merger.methods.method import Method, Source, Sources, open_source

_ADVICE = """## Running the depth routers

Each routed layer has a vector `mod_router.weight` of zeros, which lets every token through with the weight
2 sigmoid(0) = 1. `examples/mixture_of_depths.py` of merger runs and trains the model; transformers alone leaves the
routers out. Begin at capacity 1.0, where the logits are those of the source, and bring it down while you train.
"""


class Mod(Method):
    """Mixture of Depths: a router for each of some layers, which at first changes nothing."""

    method: Literal["mod"] = "mod"
    source: Source = Field(description="The model: a folder or a recipe.")
    every: int | None = Field(default=None, ge=1, description="Route layers n, 2 n, ... counted from 1; 2 without.")
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, description="Instead: these, from 0.")
    capacity: float = Field(
        default=0.125, gt=0, le=1, description="The share of tokens that a routed layer takes, after training."
    )

    paper: ClassVar[str] = "Mixture-of-Depths, arXiv 2404.02258"
    example: ClassVar[str] = "method: mod\nsource: models/tiny\nevery: 2\noutput: {path: out/mod}"

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.every is not None and self.layers is not None:
            raise ValueError("takes one of every and layers")
        return self

    def build(self, sources: Sources) -> Checkpoint:
        origin = open_source(sources, self.source)
        config = resolved(origin.config, origin.label)
        layers, _ = split(origin.tensors, config, origin.label)
        routed = self.layers or [i for i in range(len(layers)) if (i + 1) % (self.every or 2) == 0]
        outside = [layer for layer in routed if layer >= len(layers)]
        if outside or not routed:
            what = (
                f"{outside[0]} is no layer: there are 0 to {len(layers) - 1}" if outside else "there are fewer layers"
            )
            raise RecipeError(what, where="layers" if outside else "every")
        size, dtype = config["hidden_size"], next(iter(layers.tensors[0].values())).dtype
        routers = {layers.named(layer, "mod_router.weight"): Filled(dtype, (1, size)) for layer in routed}
        return replace(
            origin,
            tensors={**origin.tensors, **routers},
            config={**config, "mod": {"layers": routed, "capacity": self.capacity}},
            origin=Origin(origin, "equal", "every token passes the routers with weight 1", tuple(range(len(layers)))),
            notes=(
                *origin.notes,
                f"layers {', '.join(map(str, routed))} have depth routers (capacity {self.capacity})",
            ),
            paragraphs=(*origin.paragraphs, _ADVICE),
        )

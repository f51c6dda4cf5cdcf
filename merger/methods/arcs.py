"""Merges that take tensors for vectors: along arcs, by angles. Knows the recipes' fields; the weights are in
`merger.curves`.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from merger.blends import blended
from merger.checkpoint import Checkpoint
from merger.curves import ModelStock as ModelStockCurve
from merger.dtypes import promote
from merger.errors import RecipeError
from merger.expression import Expression
from merger.methods.fine_tunes import Entries, opened
from merger.methods.merges import Definition, OnBase, by_rule, check_count, fine_tunes_merged
from merger.methods.merging import RULES
from merger.methods.method import Method, Source, Sources, open_source


class ModelStock(OnBase):
    """Model Stock: towards the mean of fine-tunes, as far as the angles between them say."""

    method: Literal["model_stock"] = "model_stock"
    rows: bool = Field(default=False, description="Whether each row of a matrix has an angle of its own.")
    definition: Definition = Field(
        default="paper", description="paper: never beyond the base. mergekit: also where fine-tunes point apart."
    )

    paper: ClassVar[str] = "Model Stock, arXiv 2403.19522"
    example: ClassVar[str] = "method: model_stock\nbase: models/base\nmodels: runs/tuned-*\noutput: {path: out/stock}"

    def merged(self, base: Checkpoint, models: Sequence[Checkpoint], weights: Sequence[float]) -> Checkpoint:
        if set(weights) != {1.0}:
            raise RecipeError("are the same for all: leave them out", where="models: weight")
        check_count(RULES["model_stock"], len(models), True)
        curve = ModelStockCurve(len(models), clamp=self.definition == "paper")

        def merge(_name: str, tensors: Sequence[Expression]) -> Expression:
            *tuned, origin = tensors
            dtype = promote(frozenset(tensor.dtype for tensor in tensors))
            return blended(tuned, origin, curve, dtype, by_row=self.rows)

        return fine_tunes_merged(models, base, merge, [*[1.0 / len(models)] * len(models), 1.0])


class Slerp(Method):
    """Spherical interpolation: a model on the arc between two, each tensor a vector."""

    method: Literal["slerp"] = "slerp"
    sources: list[Source] = Field(min_length=2, max_length=2, description="The two models, of one origin.")
    t: float = Field(default=0.5, description="0 is the first model, 1 the second.")

    paper: ClassVar[str] = "Shoemake 1985, Animating rotation with quaternion curves"
    example: ClassVar[str] = "method: slerp\nsources: [models/a, models/b]\nt: 0.3\noutput: {path: out/slerp}"

    def build(self, sources: Sources) -> Checkpoint:
        first, second = (open_source(sources, source) for source in self.sources)
        shares = [1.0 - self.t, self.t]  # the rule's base is the second: it begins there
        return by_rule(RULES["slerp"], [first], second, {"t": shares[0]}, {}, shares=shares)


class MultiSlerp(Method):
    """Spherical interpolation among several models: weighted mean directions, and mean norms."""

    method: Literal["multislerp"] = "multislerp"
    models: Entries = Field(description="The models: a pattern, or a list with or without a `weight`.")
    base: Source | None = Field(default=None, description="Where it is given, what they differ by from it is meant.")

    paper: ClassVar[str] = "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea"
    example: ClassVar[str] = (
        "method: multislerp\nmodels: [models/a, models/b, models/c]\noutput: {path: out/multislerp}"
    )

    def build(self, sources: Sources) -> Checkpoint:
        models, weights = opened(sources, self.models)
        base = open_source(sources, self.base) if self.base else None
        return by_rule(RULES["multislerp"], models, base, {}, {"weight": weights})


class Karcher(Method):
    """The Karcher mean: the point on the sphere closest to all models, times their mean norm."""

    method: Literal["karcher"] = "karcher"
    models: Entries = Field(description="The models: a pattern or a list.")
    steps: int = Field(default=10, ge=1, description="The most steps towards it.")

    paper: ClassVar[str] = "Karcher 1977, Riemannian center of mass; as a merge arXiv 2603.04972"
    example: ClassVar[str] = "method: karcher\nmodels: [models/a, models/b, models/c]\noutput: {path: out/karcher}"

    def build(self, sources: Sources) -> Checkpoint:
        models, weights = opened(sources, self.models)
        if set(weights) != {1.0}:
            raise RecipeError("are the same for all: leave them out", where="models: weight")
        return by_rule(RULES["karcher"], models, None, {"max_iter": self.steps}, {})


class NearSwap(Method):
    """NearSwap: the base's weights, those of another model where the two are close."""

    method: Literal["nearswap"] = "nearswap"
    base: Source = Field(description="The model that is kept where they differ.")
    other: Source = Field(description="The model that is taken where they are close.")
    t: float = Field(ge=0, description="Up to this difference a weight is all the other's.")

    paper: ClassVar[str] = "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001"
    example: ClassVar[str] = (
        "method: nearswap\nbase: models/a\nother: models/b\nt: 0.0001\noutput: {path: out/nearswap}"
    )

    def build(self, sources: Sources) -> Checkpoint:
        base, other = open_source(sources, self.base), open_source(sources, self.other)
        return by_rule(RULES["nearswap"], [other], base, {"t": self.t}, {}).with_side_files_of(base)

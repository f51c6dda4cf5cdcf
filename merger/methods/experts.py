"""Sparse upcycling: a dense model becomes a mixture of experts.

Knows how experts are made from an MLP; how families name them is in `merger.families`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self, Union

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from merger.checkpoint import Checkpoint, Claim, Origin
from merger.configs import made, resolved
from merger.drawn import Redrawn, noise, redrawn
from merger.errors import RecipeError, UnsupportedModel
from merger.expression import Expression, Filled, combine, join, scaled
from merger.families import Family, Sizes, family_for
from merger.kernels import CODES
from merger.layers import Layers, is_sparse, split
from merger.layout import Experts, Mlp, head_size, mlp_of, split_fused, without_mlp
from merger.methods.combination import weighted_sum
from merger.methods.growth import grown
from merger.methods.method import Method, Source, Sources, open_source
from merger.methods.optimizer import CARRY, Carry, Moments, carried
from merger.noise import choose, key_of
from merger.shaping import columns, rows

_NOT_TRAINED = ("e_score_correction_bias", "expert_bias", "layer_scalar")


class Router(BaseModel):
    """The router's first weights: normal with this standard deviation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Literal["normal"] = "normal"
    std: float = Field(
        default=0.02, gt=0, description="Zero would tie all experts: the same ones would get every token."
    )


class Some(BaseModel):
    """A choice of layers: every n-th, or the last n."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: int | None = Field(default=None, ge=1, description="Layers n, 2 n, ... counted from 1.")
    last: int | None = Field(default=None, ge=1, description="The n layers on top.")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.every is None) == (self.last is None):
            raise ValueError("needs exactly one of every and last")
        return self


def _kind_of_choice(value: Any) -> str:
    if isinstance(value, list):
        return "list"
    return "all" if isinstance(value, str) else "some"


Choice = Annotated[
    Union[Annotated[Literal["all"], Tag("all")], Annotated[Some, Tag("some")], Annotated[list[int], Tag("list")]],
    Discriminator(_kind_of_choice),
]


class Upcycle(Method):
    """Sparse upcycling: the MLPs of a dense model become experts, with a new router to choose among them."""

    method: Literal["upcycle"] = "upcycle"
    source: Source | None = Field(default=None, description="The model: a folder or a recipe.")
    experts_from: list[Source] | None = Field(
        default=None,
        min_length=2,
        description="Instead of source: fine-tunes of one model. Expert i comes from model i, everything else "
        "is their mean (Branch-Train-MiX).",
    )
    experts: int | None = Field(default=None, ge=2, description="How many experts a layer gets.")
    experts_per_token: int | None = Field(
        default=None, ge=1, description="How many of them a token takes; 2 without, times granularity."
    )
    layers: Choice = Field(
        default="all", description="Which layers: all, {every: 2}, {last: 6}, or a list of numbers from 0."
    )
    target: str | None = Field(default=None, description="The family of the result, where there is a choice.")
    router: Router = Field(default=Router(), description="The router's first weights.")
    normalize: bool = Field(default=True, description="Whether the weights of a token's experts are made to sum to 1.")
    granularity: int = Field(default=1, ge=1, description="Into how many experts each MLP is divided.")
    expansion: int | None = Field(
        default=None, ge=1, description="How often each part is there: experts = expansion * granularity."
    )
    scale: Literal["down", "nvidia"] = Field(
        default="down",
        description="What makes up for the division: the output matrix (exact), or all three matrices (as published).",
    )
    drop: float = Field(
        default=0.0, ge=0, le=1, description="The share of each expert's neurons that is drawn anew (Drop-Upcycling)."
    )
    noise: float = Field(default=0.0, ge=0, description="Standard deviation of noise that is added to each expert.")
    shared_experts: int = Field(
        default=0, ge=0, le=1, description="1: a copy of the MLP that every token takes, beside the chosen ones."
    )
    seed: int = Field(default=0, ge=0, description="Of the router, of noise and of what is drawn anew.")
    optimizer: Carry = Field(default="drop", description=CARRY)

    paper: ClassVar[str] = (
        "Sparse upcycling, arXiv 2212.05055; virtual groups, 2410.07524; Drop-Upcycling, 2502.19261; "
        "Branch-Train-MiX, 2403.07816; growing, 2604.19835"
    )
    example: ClassVar[str] = (
        "method: upcycle\nsource: models/tiny\nexperts: 8\nexperts_per_token: 2\noutput: {path: out/moe}"
    )

    @field_validator("router", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if value in ("zero", "zeros", 0):
            raise ValueError(
                "a router of zeros ties all experts: the same few would get every token and every gradient"
            )
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.source is None) == (self.experts_from is None):
            raise ValueError("needs exactly one of source and experts_from")
        if self.experts is None and self.expansion is None:
            raise ValueError("needs experts, or expansion with granularity")
        if self.experts is not None and self.experts % self.granularity:
            raise ValueError(f"experts: {self.experts} is not a multiple of granularity {self.granularity}")
        if self.experts is not None and self.expansion is not None and self.experts != self.count:
            raise ValueError(
                f"experts: {self.experts} is not expansion {self.expansion} * granularity {self.granularity}"
            )
        if self.experts_per_token is not None and self.experts_per_token > self.count:
            raise ValueError(f"experts_per_token: {self.experts_per_token} is more than the {self.count} experts")
        return self

    @property
    def count(self) -> int:
        """The number of experts."""
        return self.expansion * self.granularity if self.expansion is not None else self.experts or 0

    @property
    def per_token(self) -> int:
        """How many experts a token takes."""
        return self.experts_per_token or min(2 * self.granularity, self.count)

    def build(self, sources: Sources) -> Checkpoint:
        models = [open_source(sources, source) for source in self.experts_from or [self.source or ""]]
        base = weighted_sum(models, [1 / len(models)] * len(models)) if self.experts_from else models[0]
        config = resolved(base.config, base.label)
        layers, _ = split(base.tensors, config, base.label)
        if any(is_sparse(layer) for layer in layers.tensors):
            return grown(self, base, config, layers)
        return _Upcycling(self, base, models, config, layers).result()


@dataclass(frozen=True)
class _Upcycling:
    """One dense model on its way: what the recipe asks, the mean of the models, the models, and the (full) config."""

    recipe: Upcycle
    base: Checkpoint
    models: Sequence[Checkpoint]
    config: Mapping[str, Any]
    layers: Layers

    def result(self) -> Checkpoint:
        recipe, base = self.recipe, self.base
        sparse = self._sparse()
        family = family_for(self.config, recipe.target, partial=not all(sparse), where=base.label)
        if self.layers.prefix != "model.layers":
            raise UnsupportedModel(
                f"its layers are called {self.layers.prefix}: only causal language models can be upcycled",
                where=base.label,
            )
        self._check(family)
        width = self._mlp(self.layers.tensors[0]).width
        sizes = Sizes(recipe.count, recipe.per_token, recipe.normalize, width // recipe.granularity, width, sparse)
        claim, reason = self._claim(family)
        result = replace(
            base,
            tensors=self._tensors(family, sparse, [model.tensors for model in self.models], base.tensors, 0),
            config=config_of(family, self.config, sizes),
            origin=Origin(base, claim, reason, tuple(range(len(sparse))), family.tolerance),
            optimizer=carried(recipe.optimizer, base, lambda moments: self._moments(family, sparse, moments)),
        )
        notes = [*base.notes, *self._notes(family)]
        return replace(result, notes=tuple(notes), paragraphs=(*base.paragraphs, _ADVICE))

    # ---- what is asked

    def _sparse(self) -> list[bool]:
        count, choice = len(self.layers), self.recipe.layers
        if isinstance(choice, list):
            outside = [layer for layer in choice if not 0 <= layer < count]
            if outside or not choice:
                what = f"{outside[0]} is no layer: there are 0 to {count - 1}" if outside else "names no layer"
                raise RecipeError(what, where="layers")
            return [layer in choice for layer in range(count)]
        if isinstance(choice, Some):
            every, last = choice.every, choice.last
            if max(every or 0, last or 0) > count:
                raise RecipeError(f"there are only {count} layers", where="layers")
            return [bool((layer + 1) % every == 0 if every else layer >= count - (last or 0)) for layer in range(count)]
        return [True] * count

    def _check(self, family: Family) -> None:
        recipe = self.recipe
        width = self._mlp(self.layers.tensors[0]).width
        if self._dtype not in CODES:
            raise UnsupportedModel(
                f"its MLPs are {self._dtype}, in which merger does not calculate",
                where=self.base.label,
                remedy="Convert the model to bfloat16 first.",
            )
        if width % recipe.granularity:
            raise RecipeError(f"{recipe.granularity} does not divide d_ff {width}", where="granularity")
        if recipe.experts_from and recipe.count % len(self.models):
            raise RecipeError(f"{recipe.count} is not a multiple of the {len(self.models)} models", where="experts")
        if not recipe.normalize and family.normalize == "always":
            raise UnsupportedModel(f"{family.kind} always makes the weights sum to 1", where="normalize")
        if recipe.shared_experts and family.shared == "none":
            having = "qwen2_moe and glm4_moe have one"
            raise UnsupportedModel(f"{family.kind} has no shared expert ({having})", where="shared_experts")
        if not family.copies and (recipe.granularity > 1 or recipe.drop or recipe.noise or recipe.experts_from):
            raise UnsupportedModel(f"experts of {family.kind} can only begin with a zero output", where="target")

    def _claim(self, family: Family) -> tuple[Claim, str]:
        recipe = self.recipe
        exactly_scaled = math.log2(recipe.granularity).is_integer() or self._dtype == "F32"
        every_token_takes_all = recipe.per_token == recipe.count
        doubts = {
            "experts are drawn anew in part (drop)": recipe.drop > 0,
            "noise was added to the experts": recipe.noise > 0,
            "experts come from several models": recipe.experts_from is not None,
            "the weights of a token's experts do not sum to 1": not (recipe.normalize or every_token_takes_all),
            "a token takes parts of MLPs, not whole ones": recipe.per_token % recipe.granularity != 0,
            "gate and up are scaled before the activation": recipe.scale == "nvidia" and recipe.granularity > 1,
            f"granularity {recipe.granularity} is no power of two, so scaling rounds": not exactly_scaled,
        }
        found = [doubt for doubt, holds in doubts.items() if holds]
        if found:
            return "none", "; ".join(found)
        if not family.copies or (family.shared != "none" and not recipe.shared_experts):
            return "close", "the experts' weights sum to 1, and what is beside them adds zero or the rest"
        return "close", "all experts of a token are the same MLP and their weights sum to 1"

    @property
    def _dtype(self) -> str:
        return self._mlp(self.layers.tensors[0]).gate.dtype

    def _notes(self, family: Family) -> list[str]:
        recipe = self.recipe
        notes = [f"{recipe.count} experts a layer, {recipe.per_token} a token, as {family.kind}"]
        if recipe.per_token % recipe.granularity:
            notes.append(
                f"experts_per_token {recipe.per_token} is no multiple of granularity {recipe.granularity}: "
                "tokens take parts of MLPs"
            )
        return notes

    # ---- tensors

    def _mlp(self, layer: Mapping[str, Expression]) -> Mlp:
        return mlp_of(layer, self.config, self.base.label)

    def _tensors(
        self,
        family: Family,
        sparse: Sequence[bool],
        models: Sequence[Mapping[str, Expression]],
        base: Mapping[str, Expression],
        power: int,
    ) -> dict[str, Expression]:
        """The tensors of the result: of weights (power 0), or of moments of that power."""
        split_models = [split(tensors, self.config, self.base.label)[0] for tensors in models]
        layers, others = split(base, self.config, self.base.label)
        result = dict(others)
        for index, layer in enumerate(layers.tensors):
            plain = split_fused(layer, self.config) if "mlp.gate_up_proj.weight" in layer else layer
            plain = family.attention(plain, self.config)
            if sparse[index]:
                mlps = [self._mlp(model.tensors[index]) for model in split_models]
                experts = self._experts(family, layers.named(index, ""), mlps, self._mlp(plain), power)
                plain = {**without_mlp(plain), **family.layout(experts)}
            result |= {layers.named(index, rest): tensor for rest, tensor in plain.items()}
        return result

    def _experts(self, family: Family, name: str, mlps: Sequence[Mlp], mean: Mlp, power: int) -> Experts:
        recipe = self.recipe
        share = 0.5 if recipe.shared_experts and family.shared in ("plain", "gated") else 1.0
        routed = []
        for e in range(recipe.count // recipe.granularity):
            mlp = mlps[e % len(mlps)]
            for s in range(recipe.granularity):
                part = self._part(mlp, s)
                part = self._changed(part, f"{name}experts.{e * recipe.granularity + s}", power)
                routed.append(self._scaled(part, share, power) if family.copies else _silent(part))
        kept = 1.0 if family.shared in ("gated", "beside") or not family.copies else 0.5
        with_shared = recipe.shared_experts or family.shared == "beside" or not family.copies
        shared = replace(mean, down=scaled(mean.down, kept ** _sign(power))) if with_shared else _silent(mean)
        return Experts(self._router(f"{name}router", mean, power), routed, shared)

    def _part(self, mlp: Mlp, s: int) -> Mlp:
        width = mlp.width // self.recipe.granularity
        first, last = s * width, (s + 1) * width
        return Mlp(rows(mlp.gate, first, last), rows(mlp.up, first, last), columns(mlp.down, first, last))

    def _changed(self, part: Mlp, name: str, power: int) -> Mlp:
        """An expert with some neurons drawn anew, and noise; of moments, the drawn ones begin at zero."""
        recipe = self.recipe
        chosen = choose(key_of(recipe.seed, f"{name}.dropped"), recipe.drop, part.width) if recipe.drop else None

        def change(which: str, tensor: Expression, axis: int) -> Expression:
            if chosen is not None:
                tensor = redrawn(tensor, chosen, axis, key_of(recipe.seed, f"{name}.{which}.drawn"))
                if power and isinstance(tensor, Redrawn):
                    tensor = replace(tensor, found=(0.0, 0.0))
            if recipe.noise and not power:
                added = noise(tensor.shape, key_of(recipe.seed, f"{name}.{which}.noise"))
                tensor = combine([(1.0, tensor), (recipe.noise, added)], tensor.dtype)
            return tensor

        return Mlp(change("gate", part.gate, 0), change("up", part.up, 0), change("down", part.down, 1))

    def _scaled(self, part: Mlp, share: float, power: int) -> Mlp:
        recipe = self.recipe
        factor = self._alpha()
        if recipe.scale == "nvidia" and factor != 1.0:
            root = (factor ** (1 / 3)) ** _sign(power)
            down = scaled(part.down, root * share ** _sign(power))
            return Mlp(scaled(part.gate, root), scaled(part.up, root), down)
        return replace(part, down=scaled(part.down, (factor * share) ** _sign(power)))

    def _alpha(self) -> float:
        """What an expert's output is multiplied by (arXiv 2410.07524, equation 2)."""
        recipe = self.recipe
        if recipe.normalize or recipe.per_token == recipe.count:
            return float(recipe.granularity)
        if recipe.granularity == 1:
            return 1.0
        return recipe.count * recipe.granularity / recipe.per_token

    def _router(self, name: str, mlp: Mlp, power: int) -> Expression:
        """One row a copy of the MLP: all of its parts have the same."""
        recipe = self.recipe
        copies, size, dtype = recipe.count // recipe.granularity, mlp.gate.shape[1], mlp.gate.dtype
        if power:
            return Filled(dtype, (recipe.count, size))
        drawn = combine([(recipe.router.std, noise((copies, size), key_of(recipe.seed, name)))], dtype)
        if recipe.granularity == 1:
            return drawn
        repeated = [rows(drawn, e, e + 1) for e in range(copies) for _ in range(recipe.granularity)]
        return join(repeated, (recipe.count, size))

    # ---- moments

    def _moments(self, family: Family, sparse: Sequence[bool], moments: Moments) -> dict[str, Expression]:
        made = self._tensors(family, sparse, [moments.tensors] * len(self.models), moments.tensors, moments.power)
        trained = {name: tensor for name, tensor in made.items() if not name.endswith(_NOT_TRAINED)}
        return {name: Filled(t.dtype, t.shape) if isinstance(t, Filled) else t for name, t in trained.items()}


def config_of(family: Family, dense: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """The config of a mixture of experts of this family, from the (full) one of the dense model."""
    config = made(family.kind, {**dense, **family.fields(dense, sizes)})
    size, heads = dense["hidden_size"], dense["num_attention_heads"]
    if "head_dim" not in config and head_size(dense) != size // heads:
        config["head_dim"] = head_size(dense)  # read by the model though its config does not name it
    kept = {key: dense[key] for key in ("dtype", "mod") if key in dense}
    return {**config, "architectures": [family.architecture], **kept}


def _sign(power: int) -> int:
    """The exponent of a weight's factor: 1 for the weight itself, minus the power for its moments."""
    return -power if power else 1


def _silent(mlp: Mlp) -> Mlp:
    """The MLP with a zero output; it gets gradients all the same, by its output matrix first."""
    return replace(mlp, down=Filled(mlp.down.dtype, mlp.down.shape))


_ADVICE = """## Training the experts

The router is new and the experts are alike: tokens are spread by chance until the experts drift apart. Train with an
auxiliary loss that balances them (`output_router_logits=True`, `router_aux_loss_coef` 0.001 to 0.01), keep the router
in float32, and warm the learning rate up again to near its peak.
"""

"""The tensors of a mixture of experts out of several dense models: one MLP of each model an expert.

Knows tensors and what is told of the result. The definitions of noise and scales are those of mergekit/moe/common.py,
the names those of hub checkpoints.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from merger.checkpoint import Checkpoint, Origin, Part, in_dtype
from merger.configs import resolved
from merger.drawn import noise
from merger.dtypes import FROM_TORCH
from merger.errors import IncompatibleSources, UnsupportedModel
from merger.expression import Expression, Filled, cast, combine
from merger.families import Family, Sizes
from merger.kernels import CODES
from merger.layers import Layers, is_sparse, split
from merger.layout import Experts, Mlp, mlp_of, split_fused, without_mlp
from merger.methods.gates import Gates
from merger.methods.method import Sources, open_source
from merger.methods.outputs import config_for
from merger.noise import key_of

if TYPE_CHECKING:
    from merger.methods.moe import Expert, Moe

# ---- sources ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Donor:
    """A model that gives an expert, and where the recipe names it."""

    expert: "Expert"
    checkpoint: Checkpoint
    layers: Layers
    where: str


def donors_of(recipe: "Moe", sources: Sources, config: Mapping[str, Any], base: Layers) -> Iterator[Donor]:
    """The models of the experts and of the shared one, all of them like the base. Raises RequestError."""
    for field, experts in (("experts", recipe.experts), ("shared_experts", recipe.shared)):
        for i, expert in enumerate(experts):
            where = f"{field}[{i}].source_model"
            model = open_source(sources, expert.source_model)
            own = resolved(model.config, model.label)
            if own["model_type"] != config["model_type"]:
                raise IncompatibleSources(
                    f"{model.label} is a {own['model_type']} and the base a {config['model_type']}",
                    where=where,
                    remedy="All models must be of one family.",
                )
            for key in ("hidden_act", "mlp_bias"):
                if own.get(key) != config.get(key):
                    what = f"{key} is {own.get(key)!r} in {model.label} and {config.get(key)!r} in the base"
                    raise IncompatibleSources(what, where=where, remedy="Experts of one layer compute alike.")
            layers, _ = split(model.tensors, own, model.label)
            _check_alike(layers, base, model, where, own)
            yield Donor(expert, model, layers, where)


def _check_alike(layers: Layers, base: Layers, model: Checkpoint, where: str, config: Mapping[str, Any]) -> None:
    if len(layers) != len(base):
        raise IncompatibleSources(f"{model.label} has {len(layers)} layers and the base {len(base)}", where=where)
    for i, (own, other) in enumerate(zip(layers.tensors, base.tensors, strict=True)):
        if is_sparse(own) or is_sparse(other):
            raise UnsupportedModel("has experts already", where=where, remedy="`method: upcycle` grows mixtures.")
        a, b = mlp_of(own, config, model.label), mlp_of(other, config, "base_model")
        for name in ("gate", "up", "down"):
            mine, theirs = getattr(a, name), getattr(b, name)
            if mine.shape != theirs.shape:
                raise IncompatibleSources(
                    f"layer {i} of {model.label} has a matrix {name} {list(mine.shape)}, the base {list(theirs.shape)}",
                    where=where,
                )
            if mine.dtype not in CODES:
                remedy = "Convert the model to bfloat16 first."
                raise UnsupportedModel(
                    f"is {mine.dtype}, in which merger does not calculate", where=where, remedy=remedy
                )


# ---- the result ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Assembly:
    """A mixture on its way: what the recipe asks, the base with its (full) config and layers, the experts' models."""

    recipe: "Moe"
    base: Checkpoint
    donors: Sequence[Donor]
    config: Mapping[str, Any]
    layers: Layers
    others: Mapping[str, Expression]
    family: Family

    def result(self) -> Checkpoint:
        """The mixture, in the dtype that the recipe or the base's config tells."""
        recipe, base, config = self.recipe, self.base, self.config
        width = mlp_of(self.layers.tensors[0], config, base.label).width
        shared = width if recipe.shared or self.family.kind != "deepseek" else 0
        count, sparse = len(recipe.experts), [True] * len(self.layers)
        sizes = Sizes(count, recipe.experts_per_token, True, width, shared, sparse)
        gates = self._gates()
        made = replace(
            base,
            tensors=self._tensors(gates),
            config=config_for(self.family, config, sizes),
            parts=self._parts(),
            notes=(*base.notes, *self._notes()),
            warnings=(*base.warnings, *self._warnings(gates)),
            kin=(),
            origin=self._origin(),
            optimizer={},
        )
        return in_dtype(made, self._dtype)

    def _gates(self) -> Gates:
        recipe = self.recipe
        size = mlp_of(self.layers.tensors[0], self.config, self.base.label).gate.shape[1]
        return Gates(recipe.gate_mode, recipe.seed, (len(self.layers), len(recipe.gated), size), recipe.gates)

    @property
    def _dtype(self) -> str:
        """The recipe's, that of the base's config, or that in which the base is stored."""
        told = self.recipe.dtype or self.config.get("dtype") or self.config.get("torch_dtype")
        stored = mlp_of(self.layers.tensors[0], self.config, self.base.label).gate.dtype
        return FROM_TORCH.get(str(told).removeprefix("torch."), stored)

    # ---- tensors

    def _tensors(self, gates: Gates) -> dict[str, Expression]:
        result = dict(self.others)
        for index, layer in enumerate(self.layers.tensors):
            name = self.layers.named(index, "")
            plain = self.family.attention(self._split(layer), self.config)
            plain = {**without_mlp(plain), **self._mixture(name, index, gates)}
            result |= {f"{name}{rest}": tensor for rest, tensor in plain.items()}
        return result

    def _split(self, layer: Mapping[str, Expression]) -> Mapping[str, Expression]:
        return split_fused(layer, self.config) if "mlp.gate_up_proj.weight" in layer else layer

    def _mixture(self, name: str, index: int, gates: Gates) -> dict[str, Expression]:
        """The tensors of one layer's experts, under their names within the layer."""
        count = len(self.recipe.experts)
        mlps = [self._changed(donor, index, name, i) for i, donor in enumerate(self.donors)]
        router = cast(gates.rows(index, name, 0, count), self._dtype)
        silent = replace(mlps[0], down=Filled(self._dtype, mlps[0].down.shape))
        made = self.family.layout(Experts(router, mlps[:count], mlps[count] if self.recipe.shared else silent))
        if self.family.kind == "deepseek" and not self.recipe.shared:
            return {rest: tensor for rest, tensor in made.items() if "shared_experts" not in rest}
        if self.family.shared == "gated" and self.recipe.shared:
            gate = gates.rows(index, f"{name}shared_", count, count + 1)
            made["mlp.shared_expert_gate.weight"] = cast(gate, self._dtype)
        return made

    def _changed(self, donor: Donor, index: int, layer: str, place: int) -> Mlp:
        """The MLP of an expert: (weight + noise), its output matrix times the residual scale."""
        mlp = mlp_of(donor.layers.tensors[index], self.config, donor.where)
        scale = donor.expert.residual_scale

        def change(which: str, factor: float) -> Expression:
            weight: Expression = getattr(mlp, which)
            deviation = factor * (donor.expert.noise_scale or 0.0)
            if factor == 0.0:
                return Filled(self._dtype, weight.shape)
            drawn = noise(weight.shape, key_of(self.recipe.seed, f"{layer}experts.{place}.{which}.noise"))
            return combine([(factor, weight), (deviation, drawn)], self._dtype)

        return Mlp(change("gate", 1.0), change("up", 1.0), change("down", 1.0 if scale is None else scale))

    # ---- what is told

    def _parts(self) -> tuple[Part, ...]:
        models = [self.base, *(donor.checkpoint for donor in self.donors)]
        return tuple(Part(part.source, part.weight / len(models)) for model in models for part in model.parts)

    def _are_copies(self) -> bool:
        plain = all(not donor.expert.noise_scale and donor.expert.residual_scale is None for donor in self.donors)
        return plain and all(donor.checkpoint.tensors == self.base.tensors for donor in self.donors)

    def _origin(self) -> Origin | None:
        if self.family.kind == "deepseek":
            return None  # its own code alone can run it
        layers = tuple(range(len(self.layers)))
        if self._are_copies() and not self.recipe.shared:
            return Origin(self.base, "close", "all experts are the base's MLP", layers, self.family.tolerance)
        return Origin(self.base, "none", "experts come from several models", layers, self.family.tolerance)

    def _notes(self) -> Iterator[str]:
        recipe, count = self.recipe, len(self.recipe.experts)
        yield f"{count} experts a layer, {recipe.experts_per_token} a token, as {self.family.kind}"
        if recipe.evaluations():
            yield "the routers are zero here: the run makes them from the prompts"
        if count & (count - 1):
            yield f"{count} is no power of two: llama.cpp does not run such mixtures"

    def _warnings(self, gates: Gates) -> Iterator[str]:
        if len(self.recipe.experts) > 1 and len({str(e.source_model) for e in self.recipe.experts}) == 1:
            yield "all experts are the same model: the result is of use only after training"
        if self.family.kind == "deepseek" and self.config.get("sliding_window"):
            yield "sliding_window is left out: deepseek has none, so texts longer than it come out otherwise"
        weak = gates.degenerate()
        if weak:
            yield (
                f"the routers of layers {', '.join(map(str, weak))} have rows that are nearly dependent: "
                "prompts are too alike, and some experts will get few tokens"
            )

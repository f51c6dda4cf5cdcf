"""Growing a mixture of experts: every expert and its row of the router stands there several times.

Knows which tensors have an entry an expert. The model computes what it did if a token takes as many times more experts
(arXiv 2604.19835 keeps their number instead, and trains).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merger.checkpoint import Checkpoint, Claim, Origin
from merger.errors import RecipeError, UnsupportedModel
from merger.expression import Expression, join
from merger.layers import Layers, split
from merger.methods.optimizer import carried
from merger.mixtures import BY_EXPERT, EXPERT, has_experts
from merger.sizes import COUNTS, PER_TOKEN, number_of

if TYPE_CHECKING:
    from merger.methods.experts import Upcycle

_ONLY_FOR_DENSE = ("experts_from", "expansion", "target", "drop", "noise", "shared_experts")


def grown(recipe: "Upcycle", base: Checkpoint, config: Mapping[str, Any], layers: Layers) -> Checkpoint:
    """The mixture with `recipe.count` experts a layer. Raises RecipeError and UnsupportedModel."""
    _check_fields(recipe)
    count, per_token = _number(COUNTS, config, base.label), _number(PER_TOKEN, config, base.label)
    if recipe.count <= count or recipe.count % count:
        raise RecipeError(f"{recipe.count} is not 2, 3, ... times the {count} experts of the source", where="experts")
    if config.get("n_group", 1) not in (None, 1):
        raise UnsupportedModel("its experts are chosen within groups", where=f"{base.label}: config n_group")
    times = recipe.count // count
    taken = recipe.experts_per_token or times * per_token
    claim, reason = _claim(config, taken, times * per_token)
    return replace(
        base,
        tensors=_multiplied(base.tensors, config, times, base.label),
        config={**config, **_told(COUNTS, config, recipe.count), **_told(PER_TOKEN, config, taken)},
        origin=Origin(base, claim, reason, tuple(range(len(layers)))),
        optimizer=carried(
            recipe.optimizer, base, lambda moments: _multiplied(moments.tensors, config, times, base.label)
        ),
        notes=(
            *base.notes,
            f"{recipe.count} experts a layer instead of {count}, {taken} a token instead of {per_token}",
        ),
    )


def _check_fields(recipe: "Upcycle") -> None:
    fields = type(recipe).model_fields
    for name in (*_ONLY_FOR_DENSE, "granularity", "layers", "router"):
        if getattr(recipe, name) != fields[name].default:
            raise RecipeError("is for dense sources; this one has experts already", where=name)


def _number(keys: tuple[str, ...], config: Mapping[str, Any], where: str) -> int:
    number = number_of(keys, config)
    if not number:
        raise UnsupportedModel(f"its config has none of {', '.join(keys)} as a number", where=where)
    return number


def _told(keys: tuple[str, ...], config: Mapping[str, Any], number: int) -> dict[str, int]:
    """The number under every key that the config has for it."""
    return {key: number for key in keys if isinstance(config.get(key), int)}


def _claim(config: Mapping[str, Any], taken: int, exact: int) -> tuple[Claim, str]:
    if taken != exact:
        return "none", f"a token takes {taken} experts; {exact} would compute what the source did"
    if "routed_scaling_factor" in config and not config.get("norm_topk_prob"):
        return "none", "the weights of a token's experts are neither shares nor made to sum to 1"
    return "close", "every expert stands there as often as a token takes more of them"


def _multiplied(
    tensors: Mapping[str, Expression], config: Mapping[str, Any], times: int, where: str
) -> dict[str, Expression]:
    layers, others = split(tensors, config, where)
    result = dict(others)
    for index, layer in enumerate(layers.tensors):
        grown_layer = _multiplied_layer(layer, times) if has_experts(layer) else layer
        result |= {layers.named(index, rest): tensor for rest, tensor in grown_layer.items()}
    return result


def _multiplied_layer(layer: Mapping[str, Expression], times: int) -> dict[str, Expression]:
    count = 1 + max((int(match[2]) for match in map(EXPERT.match, layer) if match), default=-1)
    made: dict[str, Expression] = {}
    for name, tensor in layer.items():
        match = EXPERT.match(name)
        if match:
            copies = (f"{match[1]}.{int(match[2]) + copy * count}.{match[3]}" for copy in range(times))
            made |= dict.fromkeys(copies, tensor)
        elif BY_EXPERT.search(name):
            made[name] = join([tensor] * times, _times(tensor.shape, times))
        else:
            made[name] = tensor
    return made


def _times(shape: tuple[int, ...], times: int) -> tuple[int, ...]:
    """The axis of the experts is the first, or the second after one of length 1."""
    return (1, shape[1] * times) if len(shape) == 2 and shape[0] == 1 else (shape[0] * times, *shape[1:])

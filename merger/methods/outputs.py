"""What family a mixture out of dense models can be: mergekit-moe's choice among its four, and our other families.

Knows families and their configs; knows nothing of tensors.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from merger.errors import RecipeError, UnsupportedModel
from merger.families import DEEPSEEK, FAMILIES, REFUSED, Family, Sizes
from merger.methods.experts import config_of
from merger.methods.gates import MEASURED

if TYPE_CHECKING:
    from merger.methods.moe import Moe

# What mergekit-moe calls them, in the order in which it takes them.
_NAMES = {"Mixtral": "mixtral", "DeepSeek MoE": "deepseek", "Qwen MoE": "qwen2_moe", "Qwen3 MoE": "qwen3_moe"}
_BY_KIND = {family.kind: family for family in (DEEPSEEK, *FAMILIES)}
_CODE = "deepseek-ai/deepseek-moe-16b-base--"

Why = tuple[str, str]  # the field at fault, and what is wrong


def output_for(recipe: "Moe", config: Mapping[str, Any], label: str) -> Family:
    """The first family that can hold what the recipe asks for. Raises RecipeError and UnsupportedModel."""
    kind = config["model_type"]
    if config.get("mlp_bias"):
        raise UnsupportedModel("mlp_bias is true and no family has experts with biases", where=label)
    candidates = _candidates(recipe.architecture)
    takers = [family for family in candidates if kind in family.sources]
    if not takers:
        if recipe.architecture:
            raise RecipeError(f"{kind} cannot become {recipe.architecture}", where="architecture")
        reason = REFUSED.get(kind, "no family with experts is known that has its layers")
        raise UnsupportedModel(f"{kind}: {reason}", where=label)
    faults = [_fault(family, recipe, config) for family in takers]
    for family, fault in zip(takers, faults, strict=True):
        if fault is None:
            return family
    found = [fault for fault in faults if fault]
    where = next((field for field, _ in found if field != "base_model"), "base_model")
    told = "; ".join(f"{family.kind} {why}" for family, (_, why) in zip(takers, found, strict=True))
    raise RecipeError(f"no family fits: {told}", where=where)


def _candidates(architecture: str | None) -> list[Family]:
    """The families that a name stands for: those whose name in mergekit begins so, or the one of ours."""
    if architecture is None:
        kinds = [*_NAMES.values(), *(f.kind for f in FAMILIES if not f.by_name and f.kind not in _NAMES.values())]
        return [_BY_KIND[kind] for kind in kinds]
    found = [kind for name, kind in _NAMES.items() if name.lower().startswith(architecture.lower())]
    if not found and architecture in _BY_KIND:
        found = [architecture]
    if not found:
        names = ", ".join([*_NAMES, *(kind for kind in _BY_KIND if kind not in _NAMES.values())])
        raise RecipeError(f"{architecture!r} is no architecture", where="architecture", remedy=f"There are {names}.")
    return [_BY_KIND[kind] for kind in found]


def _fault(family: Family, recipe: "Moe", config: Mapping[str, Any]) -> Why | None:
    """Why a family cannot be what the recipe asks for, or None."""
    count, prompts = len(recipe.shared), any(expert.positive_prompts for expert in recipe.shared)
    any_prompts = prompts or any(expert.negative_prompts for expert in recipe.shared)
    refusal = family.refusal(config)
    checks: list[tuple[bool, str, str]] = [
        (bool(refusal), "base_model", f"does not fit: {refusal}"),
        (not family.copies or family.shared == "beside", "architecture", "has experts that are none of their own"),
        (family.shared == "none" and count > 0, "shared_experts", "has no shared experts"),
        (family.shared == "gated" and count != 1, "shared_experts", f"needs exactly one shared expert, not {count}"),
        (family.shared == "plain" and count > 1, "shared_experts", f"has at most one shared expert, not {count}"),
        (
            family.shared == "plain" and any_prompts,
            "shared_experts[0].positive_prompts",
            "has no gate before its shared expert",
        ),
        (
            family.shared == "gated" and not prompts and recipe.gate_mode in MEASURED,
            "shared_experts[0].positive_prompts",
            "needs prompts for the gate of its shared expert",
        ),
    ]
    return next(((where, why) for holds, where, why in checks if holds), None)


def config_for(family: Family, dense: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """The config of the result."""
    if family is not DEEPSEEK:
        return config_of(family, dense, sizes)
    code = {
        "AutoConfig": f"{_CODE}configuration_deepseek.DeepseekConfig",
        "AutoModel": f"{_CODE}modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": f"{_CODE}modeling_deepseek.DeepseekForCausalLM",
    }
    fields = {**dense, **family.fields(dense, sizes), "model_type": family.kind, "auto_map": code}
    return {**fields, "architectures": [family.architecture]}

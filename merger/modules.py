"""The modules of a model (text, vision, encoder, ...) and their stacks of layers, by the names of tensors on disk.

Knows names as many families have them, whether transformers knows the family or not; knows no values and no configs
but the keys under which modules have theirs.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

# The first number after such a name is the layer's, as in `model.layers.3.mlp...` or `encoder.block.0.layer.1...`.
_LAYER = re.compile(r"^((?:.*?\.)?(?:layers?|h|blocks?))\.(\d+)\.(.+)$")
# What stands before the first layer; everything else outside the layers comes after the last.
_BEFORE = re.compile(r"embed(?!_out)|(^|\.)(wte|wpe|word_embeddings|patch_conv|class_token|project_in)(\.|$)")

_PROJECTOR = re.compile(r"(^|\.)(\w*projector|\w*merger\w*|connector|aligner|multi_modal_projection)\.")
_VISION = re.compile(r"(^|\.)(visual|vision\w*|image_\w+|vit)\.")
_AUDIO = re.compile(r"(^|\.)(audio\w*|speech\w*)\.")
_ENCODER, _DECODER = re.compile(r"(^|\.)encoder\."), re.compile(r"(^|\.)(decoder|lm_head|proj_out)\.")

WHOLE = "default"  # what mergekit calls the module of a model that has one
_ALSO_CALLED = {"vision_model": "vision_tower", "language_model": "text_decoder", "audio_model": "audio_tower"}
_SECTIONS: Mapping[str, tuple[str, ...]] = {
    WHOLE: ("text_config",),
    "text_decoder": ("text_config", "llm_config", "language_config"),
    "vision_tower": ("vision_config",),
    "audio_tower": ("audio_config",),
}


class Place(NamedTuple):
    """Where a tensor of a layer is: what comes before the layer's number, the number, the name within the layer."""

    prefix: str
    layer: int
    rest: str


def place_of(name: str) -> Place | None:
    """The place of a tensor; None where it belongs to no layer."""
    match = _LAYER.match(name)
    return Place(match[1], int(match[2]), match[3]) if match else None


def is_before_layers(name: str) -> bool:
    """Whether a tensor outside the layers works before the first of them, as embeddings do."""
    return bool(_BEFORE.search(name))


@dataclass(frozen=True)
class Anatomy:
    """The names of a module's tensors: those before its layers, those of each layer under their names within it, those
    after; `prefix` comes before the numbers of layers.
    """

    prefix: str
    before: tuple[str, ...]
    layers: tuple[Mapping[str, str], ...]
    after: tuple[str, ...]


def anatomy_of(names: Iterable[str]) -> Anatomy:
    """The parts of a module. Raises ValueError where it has not exactly one stack of layers, none of them missing."""
    stacks: dict[str, dict[int, dict[str, str]]] = {}
    outside = []
    for name in names:
        place = place_of(name)
        if place:
            stacks.setdefault(place.prefix, {}).setdefault(place.layer, {})[place.rest] = name
        else:
            outside.append(name)
    if len(stacks) != 1:
        raise ValueError(f"has {len(stacks)} stacks of layers ({', '.join(sorted(stacks)) or 'none'})")
    [(prefix, layers)] = stacks.items()
    if sorted(layers) != list(range(len(layers))):
        raise ValueError(f"lacks some of the layers {prefix}.0 to {prefix}.{max(layers)}")
    before = tuple(name for name in outside if is_before_layers(name))
    after = tuple(name for name in outside if not is_before_layers(name))
    return Anatomy(prefix, before, tuple(layers[i] for i in range(len(layers))), after)


def stacks_of(names: Iterable[str]) -> dict[str, int]:
    """How many layers each stack has, by what comes before their numbers."""
    counts: dict[str, int] = {}
    for place in filter(None, map(place_of, names)):
        counts[place.prefix] = max(counts.get(place.prefix, 0), place.layer + 1)
    return counts


def modules_of(names: Collection[str]) -> dict[str, list[str]]:
    """The tensors of each module, by the names that mergekit gives to modules."""
    stacks = stacks_of(names)
    if len(stacks) < 2:
        return {WHOLE: list(names)}
    translates = any(_ENCODER.search(f"{p}.") and not _VISION.search(f"{p}.") for p in stacks) and any(
        _DECODER.search(f"{p}.") for p in stacks
    )
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_module_of(name, translates=translates), []).append(name)
    return found if len(found) > 1 else {WHOLE: list(names)}


def _module_of(name: str, *, translates: bool) -> str:
    for pattern, module in (
        (_PROJECTOR, "multi_modal_projector"),
        (_VISION, "vision_tower"),
        (_AUDIO, "audio_tower"),
    ):
        if pattern.search(name):
            return module
    if not translates:
        return "text_decoder"
    return "encoder" if _ENCODER.search(name) else "decoder" if _DECODER.search(name) else "shared"


def called(module: str, there_are: Collection[str]) -> str | None:
    """Which of a model's modules a name means; None where it means none."""
    if set(there_are) == {WHOLE} and module in (WHOLE, "text_decoder"):
        return WHOLE
    return next((name for name in (module, _ALSO_CALLED.get(module)) if name in there_are), None)


def section_of(config: Mapping[str, Any], module: str) -> str | None:
    """The key under which a config has that of a module; None where it is the config itself."""
    return next((key for key in _SECTIONS.get(module, ()) if isinstance(config.get(key), Mapping)), None)

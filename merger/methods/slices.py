"""Which layers of which models become which layers of a result, and what its config says of them.

Knows names of tensors, modules, slices and configs; knows no rules and no values.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merger.checkpoint import Checkpoint
from merger.configs import resolved
from merger.errors import IncompatibleSources, RecipeError, UnsupportedModel
from merger.expression import Expression
from merger.layers import (
    check_positions_do_not_count,
    count_in,
    count_of,
    is_sparse,
    per_layer_lists_joined,
    with_layers,
)
from merger.mergekit_config import Configuration, InputModel, OutputSlice, Reference, reference_of
from merger.mergekit_settings import Scope
from merger.methods.settings import suggestion, with_base
from merger.modules import WHOLE, Anatomy, anatomy_of, called, modules_of, place_of, section_of, stacks_of

Models = Mapping[Reference, Checkpoint]


@dataclass(frozen=True)
class Share:
    """What one model gives to a region: tensors under the names of the result, and what they are called in the model
    (`names`, where that is another name), with the settings for this model.
    """

    model: Checkpoint
    names: Mapping[str, str]
    scope: Scope
    is_base: bool

    def own_name(self, name: str) -> str:
        """What the model itself calls a tensor of the result."""
        return self.names.get(name, name)


@dataclass(frozen=True)
class Region:
    """Tensors of the result that are made alike: a slice of its layers, or a module. `scopes` are the settings for all
    models, those that count more first; `has_base` whether there is a base to take part.
    """

    shares: tuple[Share, ...]
    scopes: tuple[Scope, ...]
    depth: Callable[[str], float]
    has_base: bool

    def names(self) -> list[str]:
        """The tensors of the result, in the order of the models' files."""
        return list(dict.fromkeys(name for share in self.shares for name in share.model.tensors))


@dataclass(frozen=True)
class Laid:
    """A layer of the result: the model that its entries in lists of the config come from, the layer there, and whether
    it has experts.
    """

    model: Checkpoint
    index: int
    sparse: bool


@dataclass(frozen=True)
class Layout:
    """All regions of a result; `layers` are those of the modules whose layers do not stay what they were."""

    regions: tuple[Region, ...]
    layers: Mapping[str, tuple[Laid, ...]]


def layout_of(config: Configuration, models: Models, donor: Checkpoint) -> Layout:
    """The regions of a result. Raises RecipeError, IncompatibleSources and UnsupportedModel."""
    names = list(dict.fromkeys(name for model in models.values() for name in model.tensors))
    split = modules_of(names)
    regions: list[Region] = []
    layers: dict[str, tuple[Laid, ...]] = {}
    for path, module in _modules(config, split):
        own = split[module] if module is not None else names
        made = config.made[path]
        scopes = (*([Scope(path, made.parameters or {})] if path else []), Scope("", config.parameters or {}))
        base = reference_of(config.base_model) if config.base_model else None
        view = models if module is None or len(split) == 1 else {ref: _only(m, own) for ref, m in models.items()}
        if made.models:
            regions.append(_whole(path, made.models, view, base, scopes))
        else:
            found, laid = _sliced(path, made.slices or [], view, base, scopes, donor)
            regions += found
            layers |= {module or WHOLE: laid} if laid else {}
    return Layout(tuple(regions), layers)


def _modules(config: Configuration, split: Mapping[str, Collection[str]]) -> Iterator[tuple[str, str | None]]:
    """The parts that a configuration makes, by the path of their field; None is a whole model, of several modules."""
    if config.modules is None:
        if config.slices and len(split) > 1:
            remedy = "Say `modules:`, each with `models` or `slices` of its own."
            raise RecipeError(f"the models have several modules: {', '.join(split)}", where="slices", remedy=remedy)
        yield "", WHOLE if len(split) == 1 else None
        return
    found: dict[str, str] = {}
    for name in config.modules:
        module = called(name, split)
        if module is None or module in found.values():
            raise RecipeError(f"is no module of these models{suggestion(name, split)}", where=f"modules.{name}")
        found[name] = module
    lacking = [module for module in split if module not in found.values()]
    if lacking:
        remedy = "Name every module, or the result would lack its tensors; `models` merges all of them."
        raise RecipeError(f"does not say where {', '.join(lacking)} comes from", where="modules", remedy=remedy)
    yield from ((f"modules.{name}", module) for name, module in found.items())


def _only(model: Checkpoint, names: Collection[str]) -> Checkpoint:
    return replace(model, tensors={name: model.tensors[name] for name in names if name in model.tensors})


# ---- whole models -------------------------------------------------------------------------------------


def _whole(
    path: str, inputs: Sequence[InputModel], models: Models, base: Reference | None, scopes: tuple[Scope, ...]
) -> Region:
    start = f"{path}." if path else ""
    settings = {
        reference_of(given.model): Scope(f"{start}models[{i}]", given.parameters or {})
        for i, given in enumerate(inputs)
    }
    order = with_base(list(settings), base)
    shares = [Share(models[ref], {}, settings.get(ref, Scope("base_model", {})), ref == base) for ref in order]
    counts = _counts([share.model for share in shares], f"{start}models")
    return Region(tuple(shares), scopes, lambda name: _depth(name, counts), base is not None)


def _counts(models: Sequence[Checkpoint], where: str) -> dict[str, int]:
    """How many layers each stack of the models has. Raises IncompatibleSources where they have different numbers."""
    first = _stacks(models[0])
    for other in models[1:]:
        for prefix, count in _stacks(other).items():
            if first.setdefault(prefix, count) != count:
                raise IncompatibleSources(
                    f"{models[0].label} has {first[prefix]} layers ({prefix}) and {other.label} {count}",
                    where=where,
                    remedy="`slices` say which layers to merge with which.",
                )
    return first


def _stacks(model: Checkpoint) -> dict[str, int]:
    """How many layers each stack has: by the files, or fewer where the config of a model with one stack says so, as
    some keep layers there that only training uses.
    """
    counts = stacks_of(model.tensors)
    said = count_in(model.config or {})
    return {prefix: min(count, said or count) if len(counts) == 1 else count for prefix, count in counts.items()}


def _depth(name: str, counts: Mapping[str, int]) -> float:
    place = place_of(name)
    if place is None:
        return 0.0
    return _share(place.layer, counts[place.prefix])


def _share(index: int, count: int) -> float:
    """How deep a layer is in a slice, from 0 to 1; the only one of a slice counts as its last, as in mergekit."""
    return min(1.0, index / (count - 1)) if count > 1 else 1.0


# ---- slices -------------------------------------------------------------------------------------------


def _sliced(
    path: str,
    slices: Sequence[OutputSlice],
    models: Models,
    whole_base: Reference | None,
    scopes: tuple[Scope, ...],
    donor: Checkpoint,
) -> tuple[list[Region], tuple[Laid, ...]]:
    """The regions of a stack, and its layers unless they are what they were in the model that gives the config."""
    used = dict.fromkeys(reference_of(source.model) for part in slices for source in part.sources)
    parts = {ref: _anatomy(models[ref]) for ref in used}
    prefix = _one_prefix(models, parts)
    regions, laid, first = [], [], 0
    for i, part in enumerate(slices):
        where = f"{path}{'.' if path else ''}slices[{i}]"
        _check_ranges(part, parts, models, where)
        base = reference_of(part.base_model) if part.base_model else whole_base
        count = part.sources[0].layer_range[1] - part.sources[0].layer_range[0]
        shares = []
        for j, source in enumerate(part.sources):
            ref = reference_of(source.model)
            ends = (i == 0, i == len(slices) - 1)
            names = _renamed(parts[ref], source.layer_range, first, ends, prefix)
            scope = Scope(f"{where}.sources[{j}]", source.parameters or {})
            shares.append(_share_of(models[ref], names, scope, is_base=ref == base))
        depth = _depth_from(first, count)
        regions.append(Region(tuple(shares), (Scope(where, part.parameters or {}), *scopes), depth, base is not None))
        laid += _laid(part, models, parts, donor)
        first += count
    return regions, () if _stays(slices, parts, donor, models) else tuple(laid)


def _anatomy(model: Checkpoint) -> Anatomy:
    try:
        return anatomy_of(model.tensors)
    except ValueError as error:
        raise UnsupportedModel(str(error), where=model.label, remedy="`models` merges it without slices.") from error


def _one_prefix(models: Models, parts: Mapping[Reference, Anatomy]) -> str:
    (first, a), *others = parts.items()
    for ref, b in others:
        if a.prefix != b.prefix:
            raise IncompatibleSources(
                f"layers are called {a.prefix} in {models[first].label} and {b.prefix} in {models[ref].label}",
                where="slices",
            )
    return a.prefix


def _check_ranges(part: OutputSlice, parts: Mapping[Reference, Anatomy], models: Models, where: str) -> None:
    first = part.sources[0].layer_range
    for j, source in enumerate(part.sources):
        ref, (start, stop) = reference_of(source.model), source.layer_range
        count = len(parts[ref].layers)
        place = f"{where}.sources[{j}].layer_range"
        if stop > count:
            raise RecipeError(
                f"[{start}, {stop}] exceeds the {count} layers of {models[ref].label}",
                where=place,
                remedy="A range names the first layer, from 0, and the one after the last.",
            )
        if stop - start != first[1] - first[0]:
            raise RecipeError(
                f"[{start}, {stop}] has {stop - start} layers, and sources[0] has {first[1] - first[0]}",
                where=place,
                remedy="All sources of a slice have equally many layers.",
            )


def _renamed(
    anatomy: Anatomy, layers: tuple[int, int], first: int, ends: tuple[bool, bool], prefix: str
) -> dict[str, str]:
    """The names of a slice's tensors in the result, with those in the model: its layers, from number `first` on, what
    comes before them in the first slice and after them in the last.
    """
    names = {name: name for name in anatomy.before if ends[0]}
    for index in range(*layers):
        new = first + index - layers[0]
        names |= {f"{prefix}.{new}.{rest}": name for rest, name in anatomy.layers[index].items()}
    return names | {name: name for name in anatomy.after if ends[1]}


def _share_of(model: Checkpoint, names: Mapping[str, str], scope: Scope, *, is_base: bool) -> Share:
    tensors: dict[str, Expression] = {new: model.tensors[old] for new, old in names.items()}
    return Share(replace(model, tensors=tensors), names, scope, is_base)


def _depth_from(first: int, count: int) -> Callable[[str], float]:
    def depth(name: str) -> float:
        place = place_of(name)
        return _share(place.layer - first, count) if place else 0.0

    return depth


def _laid(part: OutputSlice, models: Models, parts: Mapping[Reference, Anatomy], donor: Checkpoint) -> list[Laid]:
    """The layers of a slice, as the config counts them: from the model that gives the config where it is among them."""
    given = next((s for s in part.sources if models[reference_of(s.model)].label == donor.label), part.sources[0])
    ref = reference_of(given.model)
    return [Laid(models[ref], i, is_sparse(parts[ref].layers[i])) for i in range(*given.layer_range)]


def _stays(
    slices: Sequence[OutputSlice],
    parts: Mapping[Reference, Anatomy],
    donor: Checkpoint,
    models: Models,
) -> bool:
    """Whether layer i of the result is made of layers i alone, and there are as many as in the config's model."""
    first = 0
    for part in slices:
        if any(source.layer_range[0] != first for source in part.sources):
            return False
        first = part.sources[0].layer_range[1]
    counts = [len(anatomy.layers) for ref, anatomy in parts.items() if models[ref].label == donor.label]
    return first == (counts[0] if counts else count_in(donor.config or {}))


# ---- configs ------------------------------------------------------------------------------------------


def config_of(layout: Layout, donor: Checkpoint) -> Mapping[str, Any] | None:
    """The config of the result, with every default written out where layers were added, left out or moved.

    Raises UnsupportedModel.
    """
    if not layout.layers or donor.config is None:
        return donor.config
    config: Mapping[str, Any] = resolved(donor.config, donor.label)
    for module, laid in layout.layers.items():
        key = section_of(config, module)
        if key is None and module not in (WHOLE, "text_decoder"):
            reason = f"its config does not tell the layers of {module} by themselves: they can be merged, not moved"
            raise UnsupportedModel(reason, where=donor.label)
        section = config if key is None else config[key]
        changed = _with_layers(section, module, laid, donor)
        config = changed if key is None else {**config, key: changed}
    return config


def _with_layers(section: Mapping[str, Any], module: str, laid: Sequence[Laid], donor: Checkpoint) -> dict[str, Any]:
    check_positions_do_not_count(section, donor.label)
    sections = {donor.label: section}
    for layer in laid:
        if layer.model.label not in sections:
            full = resolved(layer.model.config, layer.model.label)
            sections[layer.model.label] = full if (key := section_of(full, module)) is None else full[key]
    firsts, first = {}, 0
    for label, own in sections.items():
        firsts[label] = first
        count = count_of(own, label)
        first += count
        beyond = [layer.index for layer in laid if layer.model.label == label and layer.index >= count]
        if beyond:
            raise UnsupportedModel(f"has {count} layers by its config, and slices name layer {beyond[0]}", where=label)
    order = [firsts[layer.model.label] + layer.index for layer in laid]
    joined = per_layer_lists_joined(list(sections.values()))
    return with_layers(joined, order, [layer.sparse for layer in laid], donor.label)

"""Groups of tensors by a rule: which meet under one name, with which numbers, and what becomes of those that some
models lack. Knows rules and regions; reads no weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from merger.architecture import kept_in_float32
from merger.checkpoint import Checkpoint, Part
from merger.dtypes import DTYPES, FROM_TORCH, promote
from merger.errors import IncompatibleSources, RecipeError
from merger.expression import Expression, WeightedSum, cast, join
from merger.mergekit_config import Configuration
from merger.methods.combination import merged
from merger.methods.rules import Group, Rule
from merger.methods.settings import numbers_of
from merger.methods.slices import Layout, Region, Share
from merger.mixtures import fused, number_of
from merger.shaping import stretch

Shares = Sequence[tuple[Checkpoint, float]]  # models with the weights that a configuration gives them


@dataclass(frozen=True)
class Tied:
    """The heads, by their models' labels, that all models store beside the embeddings to which they tie them."""

    name: str
    embedding: str
    heads: Mapping[str, Expression]


@dataclass(frozen=True)
class Merging:
    """How the tensors of a result are made. `said` takes the weights of the models by the tensors' names."""

    rule: Rule
    config: Configuration
    donor: Checkpoint
    seed: int
    fused: bool = False  # experts of a layer as one tensor
    said: dict[str, Shares] = field(default_factory=dict)

    def tensors(self, layout: Layout) -> tuple[dict[str, Expression], list[str]]:
        """All tensors, and warnings about those that some models lack."""
        made: dict[str, Expression] = {}
        lacked: dict[str, str] = {}
        for region in layout.regions:
            together = fused(region.names()) if self.fused else {}
            for whole, names in together.items():
                made |= self._divided(whole, names, region)
            for name in region.names():
                if name in made:
                    continue
                having = [share for share in region.shares if name in share.model.tensors]
                if len(having) < len(region.shares):
                    lacked[name] = next(s.model.label for s in region.shares if name not in s.model.tensors)
                tensor = self._tensor(name, region, having)
                if tensor is not None:
                    made[name] = tensor
        return made, _lacked_warnings(lacked, made)

    def tied(self, tied: Tied, layout: Layout) -> dict[str, Expression]:
        """The head, made as the embedding is, by its name and of the same models, so that equal ones stay equal.

        Some files say that they tie them and hold different ones; transformers believes the tensors.
        """
        region = next((region for region in layout.regions if tied.embedding in region.names()), None)
        if region is None:
            return {}
        shares = [
            replace(share, model=replace(share.model, tensors={tied.embedding: tied.heads[share.model.label]}))
            for share in region.shares
            if tied.embedding in share.model.tensors
        ]
        made = self._tensor(tied.embedding, replace(region, shares=tuple(shares)), shares)
        return {tied.name: made} if made else {}

    def _divided(self, whole: str, names: Sequence[str], region: Region) -> dict[str, Expression]:
        """Experts' tensors, parts of the one that is made of all of them. Raises RequestError."""
        shares = [_with_fused(share, whole, names) for share in region.shares]
        tensor = self._tensor(whole, replace(region, shares=tuple(shares)), shares)
        assert tensor is not None  # all have it
        parts, first = {}, 0
        for name in names:
            shape = region.shares[0].model.tensors[name].shape
            parts[name] = stretch(tensor, first, shape)
            if whole in self.said:
                self.said[name] = self.said[whole]
            first += math.prod(shape)
        return parts

    def _tensor(self, name: str, region: Region, having: Sequence[Share]) -> Expression | None:
        """The tensor of a name, None where there are too few to make one. Raises RequestError."""
        goes_through = self._alone(region, having)
        if goes_through is None:
            return None
        shares = goes_through or having
        checkpoints = [share.model for share in shares]
        if goes_through:
            return merged(name, checkpoints, lambda tensors: cast(tensors[0], self._dtypes(name, tensors)[1]))
        self._check_having(name, region, having)
        return merged(name, checkpoints, lambda tensors: self._made(name, region, shares, tensors))

    def _alone(self, region: Region, having: Sequence[Share]) -> Sequence[Share] | None:
        """The one that goes through as it is, of tensors that some models lack; nobody where they are to be merged,
        None where nothing comes of them.
        """
        bases = [share for share in having if share.is_base]
        if len(having) == len(region.shares):
            return ()
        if self.rule.absent == "single" and len(having) == 1:
            return having
        if self.rule.absent == "refused" and self.rule.base == "required" and having == bases:
            return bases  # nothing is added to it
        if self.rule.absent == "base" and having == bases:
            return having
        if self.rule.absent == "stock" and len(having) < self.rule.least + (self.rule.base == "required"):
            return bases or None
        return ()

    def _check_having(self, name: str, region: Region, having: Sequence[Share]) -> None:
        has_base = any(share.is_base for share in having)
        if len(having) == len(region.shares):
            return
        lacking = next(share.model.label for share in region.shares if name not in share.model.tensors)
        if region.has_base and self.rule.base != "ignored" and not has_base:
            raise IncompatibleSources(f"is missing in the base {lacking}", where=f"tensor {name!r}")
        try:
            self.rule.check_count(len(having) - (has_base and self.rule.base != "ignored"), has_base)
        except ValueError as error:
            raise IncompatibleSources(f"is missing in {lacking}: {error}", where=f"tensor {name!r}") from error

    def _dtypes(self, name: str, tensors: Sequence[Expression]) -> tuple[str, str]:
        """The dtype that mergekit would compute in, and the result's."""
        found = promote(frozenset(tensor.dtype for tensor in tensors))
        if found == "F32" and kept_in_float32(name, self.donor.config):
            return found, found
        work = FROM_TORCH.get(self.config.dtype or "", found)
        return work, self.config.result_dtype or work

    def _made(self, name: str, region: Region, shares: Sequence[Share], tensors: Sequence[Expression]) -> Expression:
        t = region.depth(name)
        is_apart = self.rule.base != "ignored"
        base = next((x for share, x in zip(shares, tensors, strict=True) if share.is_base and is_apart), None)
        merging = [(s, x) for s, x in zip(shares, tensors, strict=True) if not (s.is_base and is_apart)]
        numbers = [self._numbers(region, share, name, t) for share, _ in merging]
        work, dtype = self._dtypes(name, tensors)
        group = Group(
            name=name,
            tensors=tuple(tensor for _, tensor in merging),
            base=base,
            shared=numbers_of(self.rule.shared, region.scopes, name, t, ""),
            each={key: tuple(found[key] for found in numbers) for key in self.rule.each},
            dtype=dtype,
            work_dtype=work,
            seed=self.seed,
        )
        models = [*(share.model for share, _ in merging), *(s.model for s in shares if s.is_base and is_apart)]
        self.said[name] = list(zip(models, self._weights(group), strict=True))
        try:
            return self.rule.make(group)
        except ValueError as error:
            raise RecipeError(str(error), where=f"tensor {name!r}", remedy="Change the numbers for it.") from error

    def _weights(self, group: Group) -> list[float]:
        """What the models count, and the base where it stands apart, as far as the settings say so; else 1."""
        if self.rule.name == "slerp":  # of the way from the base to the other
            return [group.number("t"), 1 - group.number("t")]
        each = group.numbers("weight") if "weight" in group.each else (1.0,) * len(group.tensors)
        return [*each, *([1.0] if group.base else [])]

    def _numbers(self, region: Region, share: Share, name: str, t: float) -> Mapping[str, Any]:
        scopes = (share.scope, *region.scopes)
        return numbers_of(self.rule.each, scopes, share.own_name(name), t, f" of {share.model.label}")


def _with_fused(share: Share, whole: str, names: Sequence[str]) -> Share:
    """What a model gives, with its experts' tensors as one. Raises IncompatibleSources where it lacks some."""
    remedy = "Leave `expert_granularity` out: each expert is merged by itself then."
    lacking = [name for name in names if name not in share.model.tensors]
    if lacking:
        raise IncompatibleSources(f"is missing in {share.model.label}", where=f"tensor {lacking[0]!r}", remedy=remedy)
    tensors = [share.model.tensors[name] for name in names]
    shapes, dtypes = {tensor.shape for tensor in tensors}, {tensor.dtype for tensor in tensors}
    if len(shapes) > 1 or len(dtypes) > 1 or not DTYPES[tensors[0].dtype].is_float:
        problem = f"the experts of {share.model.label} are not matrices of one shape and one floating dtype"
        raise IncompatibleSources(problem, where=f"tensor {whole!r}", remedy=remedy)
    each = len(tensors) // len({number_of(name) for name in names})
    rows, *others = tensors[0].shape
    joined = join(tensors, (len(tensors) // each, each * rows, *others))
    own = next(iter(fused([share.own_name(name) for name in names])))
    return replace(share, model=replace(share.model, tensors={whole: joined}), names={whole: own})


def parts_of(
    tensors: Mapping[str, Expression], said: Mapping[str, Shares], models: Sequence[Checkpoint]
) -> tuple[Part, ...]:
    """The stored models with their weights in a result: the mean, over its elements, of the factors that their elements
    have in it; of what is no sum, of the weights that were `said`.
    """
    sources = dict.fromkeys(part.source for model in models for part in model.parts)
    owners = {file: source for source in sources for file in source.files}
    factors = dict.fromkeys(sources, 0.0)
    for name, tensor in tensors.items():
        if name in said and not isinstance(tensor, WeightedSum):
            for part, weight in ((part, weight) for model, weight in said[name] for part in model.parts):
                factors[part.source] += weight * part.weight * tensor.size
            continue
        for factor, term in tensor.terms if isinstance(tensor, WeightedSum) else ((1.0, tensor),):
            for source in {owners[leaf.file]: None for leaf in term.leaves() if leaf.file in owners}:
                factors[source] += factor * tensor.size
    size = sum(tensor.size for tensor in tensors.values())
    return tuple(Part(source, factor / size) for source, factor in factors.items())


def _lacked_warnings(lacked: Mapping[str, str], made: Mapping[str, Expression]) -> list[str]:
    """What is said of tensors that some models lack: the first of them, by the kind of what came of it."""
    warnings = []
    for verb, names in (
        ("made without it", [name for name in lacked if name in made]),
        ("left out", [name for name in lacked if name not in made]),
    ):
        if names:
            more = f" (and {len(names) - 1} more tensors)" if len(names) > 1 else ""
            warnings.append(f"{names[0]} is missing in {lacked[names[0]]} and {verb}{more}")
    return warnings

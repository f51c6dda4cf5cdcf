"""mergekit's configurations as recipes: every tensor by the rule and the numbers that they say.

Knows which tensors meet and what becomes of those that some models lack; the rules are in `merger.methods.merging`,
layers in `merger.methods.slices`. Reads no weights.

Against mergekit 0.1.5 (`docs/mergekit.md`): models count in the order in which they are named, unknown keys are errors,
inputs are not rounded to `dtype` before they are merged, tensors keep the names that they have on disk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import Field, model_validator

from merger.architecture import embedding_of, head_of, kept_in_float32, ties_embeddings, with_dtype, with_ties
from merger.checkpoint import Checkpoint, Kin
from merger.dtypes import TORCH_NAMES, promote
from merger.errors import IncompatibleSources, RecipeError
from merger.expression import Expression, cast
from merger.mergekit_config import Configuration, Reference, reference_of, references
from merger.methods.combination import check_models, check_vocabularies, config_warnings, merged, same_head
from merger.methods.merging import RULES
from merger.methods.method import Method, Source, Sources, open_source
from merger.methods.rules import Group, Parameter, Rule
from merger.methods.settings import check, numbers_of, rule_of
from merger.methods.slices import Layout, Region, Share, config_of, layout_of
from merger.storage.reference import SCHEME, looks_remote
from merger.storage.reference import Reference as OnHub

TEXT = "mergekit_config.yml"
_FEWEST_OF_STOCK = 3  # mergekit's model_stock takes no fewer, the base among them


class Mergekit(Method):
    """A mergekit configuration: models, slices or modules, merged by one of its merge methods."""

    method: Literal["mergekit"] = "mergekit"
    config: Configuration = Field(description="What the mergekit file says; a document may be such a file itself.")
    merges: dict[str, Source] = Field(
        default_factory=dict, description="Recipes, or models, by the names that the configuration has for them."
    )
    seed: int = Field(default=0, ge=0, description="Of the merge methods that draw at random.")

    paper: ClassVar[str] = "Arcee's MergeKit, arXiv 2403.13257"
    example: ClassVar[str] = (
        "merge_method: linear\nmodels:\n  - {model: models/a, parameters: {weight: 0.7}}\n"
        "  - {model: models/b, parameters: {weight: [0, 0.6]}}\ndtype: bfloat16\noutput: {path: out/merged}"
    )

    @model_validator(mode="after")
    def _fits_its_rule(self) -> Self:
        check(self.config)
        return self

    @classmethod
    def more(cls) -> str:
        return "\n".join(["Merge methods", *(line for rule in RULES.values() for line in described(rule))])

    def build(self, sources: Sources) -> Checkpoint:
        rule = rule_of(self.config)
        given = self._opened(sources)
        check_models(list(given.values()))
        given = in_one_vocabulary(self.config, given)
        heads, notes = same_head(list(given.values()))
        models = dict(zip(given, heads, strict=True))
        donor = models[reference_of(self.config.base_model)] if self.config.base_model else next(iter(models.values()))
        layout = layout_of(self.config, models, donor)
        _check_embeddings(layout, donor)
        merging = _Merging(rule, self.config, donor, self.seed)
        tensors, warnings = merging.tensors(layout)
        parts = dict.fromkeys(part for model in models.values() for part in model.parts)
        return replace(
            donor,
            tensors=tensors,
            config=self._config(layout, donor, list(models.values()), tensors),
            parts=tuple(parts),
            notes=tuple(dict.fromkeys([*(note for model in models.values() for note in model.notes), *notes])),
            warnings=tuple(
                dict.fromkeys(
                    [
                        *(warning for model in models.values() for warning in model.warnings),
                        *_warnings_on_configs(layout, donor, list(models.values())),
                        *warnings,
                    ]
                )
            ),
            kin=(*(kin for model in models.values() for kin in model.kin), *_kin(rule, layout)),
            texts={**donor.texts, TEXT: "---\n".join(_as_text(document) for document in self._documents())},
            label="",
            origin=None,
            optimizer={},
            paragraphs=(),
        )

    def _opened(self, sources: Sources) -> dict[Reference, Checkpoint]:
        """The models in the order in which they are named, each once."""
        models: dict[Reference, Checkpoint] = {}
        for where, ref in references(self.config):
            reference = reference_of(ref)
            if reference not in models:
                models[reference] = opened_reference(sources, reference, self.merges, where).named(str(reference))
        return models

    def _config(
        self, layout: Layout, donor: Checkpoint, models: Sequence[Checkpoint], tensors: Mapping[str, Expression]
    ) -> Mapping[str, Any] | None:
        config = config_of(layout, donor)
        if config and self.config.result_dtype:
            config = with_dtype(config, TORCH_NAMES[self.config.result_dtype])
        has_own_head = head_of(tensors) is not None and not all(ties_embeddings(model.config) for model in models)
        return with_ties(config, False) if config and has_own_head and ties_embeddings(config) else config

    def _documents(self) -> list[dict[str, Any]]:
        """The configuration as a mergekit file says it, those that it builds on first."""
        found: dict[str, dict[str, Any]] = {}
        for name, merge in self.merges.items():
            if isinstance(merge, Mergekit):
                for document in merge._documents():
                    found.setdefault(document.get("name", name), {"name": name, **document})
        return [*found.values(), self.config.model_dump(mode="json", exclude_none=True)]


def _as_text(document: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(document), sort_keys=False, default_flow_style=None, allow_unicode=True, width=120))


def described(rule: Rule) -> list[str]:
    """A rule, what it takes and its parameters, for people."""
    bases = {"required": "a base_model", "optional": "with or without a base_model", "ignored": "no base"}
    most = {None: " or more", rule.least: ""}.get(rule.most, f" to {rule.most}")
    paper = f" ({rule.paper})" if rule.paper else ""
    lines = [f"  {rule.name}: {rule.title}; {rule.least}{most} models, {bases[rule.base]}{paper}"]
    for parameters, whose in ((rule.each, "for each model"), (rule.shared, "for all")):
        lines += [f"      {name}: {_range(parameter)}, {whose}" for name, parameter in parameters.items()]
    return lines


def _range(parameter: Parameter) -> str:
    default = "required" if parameter.required else f"default {str(parameter.default).lower()}"
    bounds = {
        "at least": parameter.least,
        "above": parameter.above,
        "at most": parameter.most,
        "below": parameter.below,
    }
    said = [f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None]
    return ", ".join([{float: "number", int: "whole number", bool: "true or false"}[parameter.kind], *said, default])


# ---- models -------------------------------------------------------------------------------------------


def opened_reference(
    sources: Sources, reference: Reference, merges: Mapping[str, str | Method], where: str
) -> Checkpoint:
    """The model that a reference means: one of `merges` where it has that name. Raises RequestError."""
    if reference.lora:
        raise RecipeError(
            f"adapters in references do not work yet ({reference})",
            where=where,
            remedy="`method: lora` with `base` makes a model of one; say it under `merges` by a name of yours.",
        )
    if reference.path in merges and reference.revision is None:
        return open_source(sources, merges[reference.path])
    if reference.revision is None or reference.path.startswith(SCHEME):
        return open_source(sources, str(reference))
    if not looks_remote(reference.path):
        raise RecipeError(f"{reference.path} is a folder, which has no revision", where=where)
    return open_source(sources, str(OnHub(reference.path, reference.revision)))


def in_one_vocabulary(config: Configuration, models: Mapping[Reference, Checkpoint]) -> dict[Reference, Checkpoint]:
    """The models with embeddings, heads and tokenizers of the vocabulary that a configuration asks for. Raises
    RecipeError.
    """
    for field in ("tokenizer", "tokenizer_source", "chat_template"):
        if getattr(config, field) is not None:
            remedy = "Without it the result has the tokenizer of the base, or of the first model."
            raise RecipeError("does not work yet", where=field, remedy=remedy)
    return dict(models)


def _check_embeddings(layout: Layout, donor: Checkpoint) -> None:
    """See that all that embeddings and heads are made of count tokens as the result's tokenizer does."""
    models: dict[str, Checkpoint] = {donor.label: donor}
    for share in (share for region in layout.regions for share in region.shares):
        names = share.model.tensors
        if embedding_of(names) or head_of(names) or not embedding_of(donor.tensors):
            models.setdefault(share.model.label, share.model)
    check_vocabularies(list(models.values()))


def _warnings_on_configs(layout: Layout, donor: Checkpoint, models: Sequence[Checkpoint]) -> list[str]:
    warnings = config_warnings([donor, *(model for model in models if model is not donor)])
    return warnings if not layout.layers else [text for text in warnings if "layer" not in text.partition(" is ")[0]]


def _kin(rule: Rule, layout: Layout) -> tuple[Kin, ...]:
    """Models of which whole tensors meet under one name: their experts must stand in one order."""
    whole = [region for region in layout.regions if len(region.shares) > 1 and not any(s.names for s in region.shares)]
    return tuple(Kin(tuple(share.model for share in region.shares)) for region in whole) if rule.most != 1 else ()


# ---- tensors ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Merging:
    """How the tensors of a result are made."""

    rule: Rule
    config: Configuration
    donor: Checkpoint
    seed: int

    def tensors(self, layout: Layout) -> tuple[dict[str, Expression], list[str]]:
        """All tensors, and warnings about those that some models lack."""
        made: dict[str, Expression] = {}
        lacked: dict[str, str] = {}
        for region in layout.regions:
            for name in region.names():
                having = [share for share in region.shares if name in share.model.tensors]
                if len(having) < len(region.shares):
                    lacked[name] = next(s.model.label for s in region.shares if name not in s.model.tensors)
                tensor = self._tensor(name, region, having)
                if tensor is not None:
                    made[name] = tensor
        return made, _lacked_warnings(lacked, made)

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
        if self.rule.absent == "base" and having == bases:
            return having
        if self.rule.absent == "stock" and len(having) < _FEWEST_OF_STOCK:
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
        work = {torch: ours for ours, torch in TORCH_NAMES.items()}.get(self.config.dtype or "", found)
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
        try:
            return self.rule.make(group)
        except ValueError as error:
            raise RecipeError(str(error), where=f"tensor {name!r}", remedy="Change the numbers for it.") from error

    def _numbers(self, region: Region, share: Share, name: str, t: float) -> Mapping[str, Any]:
        scopes = (share.scope, *region.scopes)
        return numbers_of(self.rule.each, scopes, share.own_name(name), t, f" of {share.model.label}")


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

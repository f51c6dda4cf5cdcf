"""mergekit's configurations as recipes: every tensor by the rule and the numbers that they say.

Knows models, configs and vocabularies; which layers meet is in `merger.methods.slices`, which tensors in
`merger.methods.grouping`, what a setting comes to in `merger.methods.settings`. Reads no weights.

Against mergekit 0.1.5 (`docs/mergekit.md`): models count in the order in which they are named, unknown keys are errors,
inputs are not rounded to `dtype` before they are merged, tensors keep the names that they have on disk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import Field, model_validator

from merger.architecture import embedding_of, head_of, ties_embeddings, with_dtype, with_ties
from merger.chat_templates import chosen_template, with_chat_template
from merger.checkpoint import Checkpoint, Kin
from merger.dtypes import TORCH_NAMES
from merger.errors import RecipeError
from merger.expression import Expression
from merger.mergekit_config import Configuration, Model, Reference, reference_of, references
from merger.methods.combination import check_models, check_vocabularies, config_warnings, same_head
from merger.methods.grouping import Merging, Tied, parts_of
from merger.methods.lora import with_adapter
from merger.methods.merging import RULES
from merger.methods.method import Method, Source, Sources, open_source
from merger.methods.rules import Parameter, Rule
from merger.methods.settings import check, rule_of
from merger.methods.slices import Layout, Region, config_of, layout_of
from merger.storage.reference import SCHEME, looks_remote
from merger.storage.reference import Reference as OnHub
from merger.vocabularies import united

CONFIGURATION = "mergekit_config.yml"


class Mergekit(Method):
    """A mergekit configuration: models, slices or modules, merged by one of its merge methods."""

    method: Literal["mergekit"] = "mergekit"
    config: Configuration = Field(description="What the mergekit file says; a document may be such a file itself.")
    merges: dict[str, Source] = Field(
        default_factory=dict, description="Recipes, or models, by the names that the configuration has for them."
    )
    seed: int = Field(default=0, ge=0, description="Of the merge methods that draw at random.")
    expert_granularity: Literal["expert", "fused"] = Field(
        default="expert", description="Experts are merged each by itself, or all of a layer as one (mergekit does so)."
    )

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
        heads, tied = _without_tied_heads(heads)
        models = dict(zip(given, heads, strict=True))
        donor = models[reference_of(self.config.base_model)] if self.config.base_model else next(iter(models.values()))
        layout = layout_of(self.config, models, donor)
        _check_embeddings(layout, donor)
        merging = Merging(rule, self.config, donor, self.seed, self.expert_granularity == "fused")
        tensors, warnings = merging.tensors(layout)
        if tied:
            tensors |= merging.tied(tied, layout)
        made = replace(
            donor,
            tensors=tensors,
            config=self._config(layout, donor, list(models.values()), tensors),
            parts=parts_of(tensors, merging.said, list(models.values())),
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
            texts={**donor.texts, CONFIGURATION: "---\n".join(_as_text(document) for document in self._documents())},
            label="",
            origin=None,
            optimizer={},
            paragraphs=(),
        )
        return self._with_chat_template(made, given)

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

    def _with_chat_template(self, made: Checkpoint, models: Mapping[Reference, Checkpoint]) -> Checkpoint:
        if self.config.chat_template is None:
            return made
        base = list(models).index(reference_of(self.config.base_model)) if self.config.base_model else None
        template = chosen_template(self.config.chat_template, list(models.values()), base)
        if template is None:
            raise RecipeError(
                "no model has a template to choose", where="chat_template", remedy="Leave it out, or write one."
            )
        return with_chat_template(made, template)

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
        alone = Reference(reference.path, reference.revision)
        adapter = Reference(reference.lora, reference.lora_revision)
        model = opened_reference(sources, alone, merges, where)
        return with_adapter(model, opened_reference(sources, adapter, {}, where))
    if reference.path in merges and reference.revision is None:
        return open_source(sources, merges[reference.path])
    if reference.revision is None or reference.path.startswith(SCHEME):
        return open_source(sources, str(reference))
    if not looks_remote(reference.path):
        raise RecipeError(f"{reference.path} is a folder, which has no revision", where=where)
    return open_source(sources, str(OnHub(reference.path, reference.revision)))


def in_one_vocabulary(config: Configuration, models: Mapping[Reference, Checkpoint]) -> dict[Reference, Checkpoint]:
    """The models with embeddings, heads and tokenizers of the vocabulary that a configuration asks for. Raises
    RequestError.
    """
    settings, order = config.vocabulary, list(models)
    if settings is None:
        return dict(models)

    def index_of(ref: str | dict[str, Any]) -> int:
        reference = reference_of(ref if isinstance(ref, str) else Model.model_validate(ref))
        if reference not in models:
            names = ", ".join(map(str, order))
            raise RecipeError(
                f"{reference} is none of the models: {names}", where="tokenizer", remedy="Name one of them."
            )
        return order.index(reference)

    base = order.index(reference_of(config.base_model)) if config.base_model else None
    made, _ = united(list(models.values()), base, settings, index_of)
    return dict(zip(order, made, strict=True))


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


def _without_tied_heads(models: Sequence[Checkpoint]) -> tuple[Sequence[Checkpoint], Tied | None]:
    """Models without heads that all of them store and tie, and these: with settings by name, head and embedding would
    come out different.
    """
    head, embedding = head_of(models[0].tensors), embedding_of(models[0].tensors)
    if head is None or embedding is None or not all(ties_embeddings(model.config) for model in models):
        return models, None
    kept = [{name: tensor for name, tensor in model.tensors.items() if name != head} for model in models]
    made = [replace(model, tensors=tensors) for model, tensors in zip(models, kept, strict=True)]
    return made, Tied(head, embedding, {model.label: model.tensors[head] for model in models})


def _kin(rule: Rule, layout: Layout) -> tuple[Kin, ...]:
    """Models of which tensors of one name meet: their experts must stand in one order."""
    meeting = [tuple(share.model for share in region.shares) for region in layout.regions if _meets(region)]
    return tuple(Kin(models) for models in meeting) if rule.most != 1 else ()


def _meets(region: Region) -> bool:
    stays = all(new == old for share in region.shares for new, old in share.names.items())
    return stays and len(region.shares) > 1

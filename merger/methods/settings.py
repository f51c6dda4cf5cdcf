"""The settings of a configuration against the rule that it names: what must hold before a model is opened, and the
numbers of a tensor. Knows rules and configurations; knows no checkpoints.
"""

import difflib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from merger.errors import RecipeError
from merger.mergekit_config import Configuration, Model, Module, Reference, reference_of, references
from merger.mergekit_settings import Scalar, Scope, evaluated, scalars_of
from merger.methods.merging import RULES
from merger.methods.rules import Parameter, Rule, Value

_REMEDY = "`merger methods mergekit` lists the merge methods with their parameters."
_TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def rule_of(config: Configuration) -> Rule:
    """The rule that a configuration names. Raises RecipeError."""
    if config.merge_method not in RULES:
        raise RecipeError(
            f"{config.merge_method!r} is no merge method{suggestion(config.merge_method.replace('-', '_'), RULES)}",
            where="merge_method",
            remedy=_REMEDY,
        )
    return RULES[config.merge_method]


def suggestion(name: str, known: Collection[str]) -> str:
    """What may be meant by a name, or what there is."""
    close = difflib.get_close_matches(name, known, 1, 0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known) or 'none'}"


@cache
def checker_of(parameter: Parameter) -> Callable[[Scalar], Value]:
    """What makes a parameter's kind of a scalar, as `evaluate` takes it. A number may come as text, as YAML's 1e-5."""

    def checked(value: Scalar) -> Value:
        made: Any = value
        if isinstance(value, str):
            made = _TRUTHS.get(value.lower(), value) if parameter.kind is bool else _number_in(value)
        if isinstance(made, float) and not math.isfinite(made):
            raise ValueError(f"must be a number, not {value!r}")
        return parameter.checked(made)

    return checked


def _number_in(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


# ---- before models are opened -------------------------------------------------------------------------


def check(config: Configuration) -> None:
    """See that a configuration fits its rule: parameters and their values, how many models there are, the base.

    Raises RecipeError with the field's path.
    """
    rule = rule_of(config)
    for where, ref in references(config):
        _referred(where, ref)
    for scope, is_shared in scopes_in(config):
        _check_scope(rule, scope, is_shared=is_shared)
    for where, models, base in _groups(config):
        _check_group(rule, where, models, base)


def _referred(where: str, ref: str | Model) -> Reference:
    try:
        return reference_of(ref)
    except ValueError as error:
        raise RecipeError(str(error), where=where, remedy="Write path, org/name@revision or model+adapter.") from error


def scopes_in(config: Configuration) -> Iterator[tuple[Scope, bool]]:
    """All settings with their places, and whether they may speak of all tensors of a name, not of one model's."""
    yield Scope("", config.parameters or {}), True
    for path, made in config.made.items():
        if isinstance(made, Module):
            yield Scope(path, made.parameters or {}), True
        start = f"{path}." if path else ""
        for i, model in enumerate(made.models or ()):
            yield Scope(f"{start}models[{i}]", model.parameters or {}), False
        for i, part in enumerate(made.slices or ()):
            yield Scope(f"{start}slices[{i}]", part.parameters or {}), True
            for j, source in enumerate(part.sources):
                yield Scope(f"{start}slices[{i}].sources[{j}]", source.parameters or {}), False


def _check_scope(rule: Rule, scope: Scope, *, is_shared: bool) -> None:
    known = {**rule.shared, **rule.each}
    for name, setting in scope.settings.items():
        where = scope.field(name)
        if name not in known:
            raise RecipeError(f"is no parameter of {rule.name}{suggestion(name, known)}", where=where, remedy=_REMEDY)
        if name not in rule.each and not is_shared:
            place = "`parameters` of the slice, the module or the configuration"
            raise RecipeError("holds for all models together, not for one", where=where, remedy=f"Say it in {place}.")
        for value in scalars_of(setting):
            try:
                checker_of(known[name])(value)
            except ValueError as error:
                raise RecipeError(str(error), where=where, remedy=_REMEDY) from error


def _groups(config: Configuration) -> Iterator[tuple[str, list[Reference], Reference | None]]:
    """The models of which each part of the result is made, in their order, and its base."""
    whole_base = reference_of(config.base_model) if config.base_model else None
    for path, made in config.made.items():
        start = f"{path}." if path else ""
        if made.models:
            models = [reference_of(model.model) for model in made.models]
            yield f"{start}models", with_base(models, whole_base), whole_base
        for i, part in enumerate(made.slices or ()):
            base = reference_of(part.base_model) if part.base_model else whole_base
            yield f"{start}slices[{i}].sources", [reference_of(source.model) for source in part.sources], base


def with_base(models: Sequence[Reference], base: Reference | None) -> list[Reference]:
    """Models that are merged whole, the base among them: where it is not named it comes last, as in mergekit."""
    return [*models, *([base] if base and base not in models else [])]


def _check_group(rule: Rule, where: str, models: Sequence[Reference], base: Reference | None) -> None:
    for i, model in enumerate(models):
        if model in models[:i]:
            raise RecipeError(f"{model} stands twice", where=f"{where}[{i}].model", remedy="Name each model once.")
    has_base = base in models
    if base and not has_base and rule.base != "ignored":
        raise RecipeError(f"the base {base} is not among them", where=where, remedy="Name layers of it too.")
    try:
        rule.check_count(len(models) - (has_base and rule.base != "ignored"), has_base)
    except ValueError as error:
        raise RecipeError(str(error), where=where, remedy=_REMEDY) from error


# ---- the numbers of a tensor --------------------------------------------------------------------------


def numbers_of(
    parameters: Mapping[str, Parameter], scopes: Sequence[Scope], name: str, t: float, whose: str
) -> dict[str, Value]:
    """The numbers of a tensor that lies at `t` of its slice; `whose` says for people of which model it is.

    Raises RecipeError with the field's path.
    """
    return {key: _number_of(key, parameter, scopes, name, t, whose) for key, parameter in parameters.items()}


def _number_of(key: str, parameter: Parameter, scopes: Sequence[Scope], name: str, t: float, whose: str) -> Value:
    found = evaluated(scopes, key, name, t, checker_of(parameter))
    if found is None and parameter.required:
        raise RecipeError(
            f"is missing for {name!r}{whose}",
            where=scopes[0].field(key),
            remedy="It has no default: give a value, or a filter's last line without a `filter`.",
        )
    return parameter.default if found is None else found

"""Rules: how the tensors of one name are merged into one. Knows what a rule needs and takes; knows no recipes.

A rule is what mergekit calls a merge method. It sees the tensors of one name from several models, maybe that of a base
among them, and numbers: some for all of them, some for each. Whoever reads recipes finds these numbers, has them
checked here, and gets an expression.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from merger.expression import Expression

Value = float | int | bool | None
Base = Literal["required", "optional", "ignored"]  # ignored: a base counts as one of the models
Absent = Literal["refused", "single", "base", "stock"]


@dataclass(frozen=True)
class Parameter:
    """A number of a rule: what it is where nobody says (`required`: somebody must), and between what it must lie.

    `above` and `below` are bounds that are not reached themselves.
    """

    kind: type[float] | type[int] | type[bool]
    default: Value = None
    required: bool = False
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def checked(self, value: object) -> Value:
        """The value as this parameter's kind. Raises ValueError that says what it must be."""
        if value is None and not self.required and self.default is None:
            return None
        if self.kind is bool:
            if value not in (0, 1):
                raise ValueError(f"must be true or false, not {value!r}")
            return bool(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise ValueError(f"must be a number, not {value!r}")
        if self.kind is int and value != int(value):
            raise ValueError(f"must be a whole number, not {value!r}")
        self._check_bounds(float(value))
        return self.kind(value)

    def _check_bounds(self, value: float) -> None:
        bounds = (
            (self.least, "at least", value.__ge__),
            (self.most, "at most", value.__le__),
            (self.above, "above", value.__gt__),
            (self.below, "below", value.__lt__),
        )
        for bound, words, holds in bounds:
            if bound is not None and not holds(bound):
                raise ValueError(f"must be {words} {bound:g}, not {value:g}")


@dataclass(frozen=True)
class Group:
    """The floating tensors of one name, all of one shape, and the numbers to merge them by.

    `tensors` come in the order in which the recipe names their models, without the base, which is `base`; a rule that
    ignores bases has that one among them. `each` has one value per tensor. `dtype` is the result's; `work_dtype` the
    one that mergekit would compute in, for those rules that it computes; `seed` the recipe's, for random ones.
    """

    name: str
    tensors: tuple[Expression, ...]
    base: Expression | None
    shared: Mapping[str, Value]
    each: Mapping[str, tuple[Value, ...]]
    dtype: str
    work_dtype: str
    seed: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.base or self.tensors[0]).shape

    def number(self, name: str) -> float:
        """A number that holds for all tensors."""
        value = self.shared[name]
        assert value is not None
        return float(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """The numbers of the tensors, one each."""
        return tuple(float(value or 0.0) for value in self.each[name])


@dataclass(frozen=True)
class Rule:
    """What a rule is called, which tensors it takes (`least` and `most` without the base), its parameters, those for
    all tensors (`shared`) and those for `each`, and what it does where some models lack a tensor that they may lack:

    refused: merges those that have it, but not without a base that is required; single: one alone goes through;
    base: one alone goes through where it is the base; stock: too few give the base's, or nothing.

    `make` builds the result of a group whose numbers were checked; it raises ValueError where they do not go together.
    """

    name: str
    title: str
    base: Base
    make: Callable[[Group], Expression]
    shared: Mapping[str, Parameter]
    each: Mapping[str, Parameter]
    least: int = 1
    most: int | None = None
    absent: Absent = "refused"
    paper: str = ""

    def check_count(self, count: int, has_base: bool) -> None:
        """See that so many models, without a base, can be merged. Raises ValueError with how many there must be."""
        if self.base == "required" and not has_base:
            raise ValueError(f"{self.name} needs a base_model")
        what = "models beside the base" if self.base != "ignored" else "models"
        if self.most == self.least and count != self.least:
            raise ValueError(f"{self.name} merges exactly {self.least} {what}, not {count}")
        if count < self.least or (self.most is not None and count > self.most):
            bound = f"at least {self.least}" if count < self.least else f"at most {self.most}"
            raise ValueError(f"{self.name} merges {bound} {what}, not {count}")


def table(*rules: Rule) -> dict[str, Rule]:
    """Rules by their names."""
    return {rule.name: rule for rule in rules}

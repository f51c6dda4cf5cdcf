"""The settings of mergekit's configurations: values, gradients, filters, what they come to. Pure: knows no rules and
no models.

They come to what `mergekit/config.py` and `mergekit/parameter_resolver.py` (0.1.5) make of them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from merger.errors import RecipeError

Scalar = bool | int | float | str
T = TypeVar("T")


class Part(BaseModel):
    """A mapping of a configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def _plain(value: Any) -> Any:
    if not isinstance(value, Scalar):
        raise ValueError(f"must be a number, a truth or a text, not {value!r}")
    return value


Plain = Annotated[Scalar, BeforeValidator(_plain)]


class Conditional(Part):
    """A value for the tensors whose names contain `filter`; for all without one."""

    value: Annotated[
        Union[Annotated[Plain, Tag("scalar")], Annotated[list[Plain], Field(min_length=1), Tag("gradient")]],
        Discriminator(lambda value: "gradient" if isinstance(value, list) else "scalar"),
    ]
    filter: str | None = None

    def holds(self, name: str) -> bool:
        """Whether it speaks of a tensor of this name."""
        return self.filter is None or self.filter == "*" or self.filter in name


def _kind_of_setting(value: Any) -> str:
    if isinstance(value, list):
        return "conditions" if any(isinstance(part, Mapping | Conditional) for part in value) else "gradient"
    return "condition" if isinstance(value, Mapping | Conditional) else "scalar"


Setting = Annotated[
    Union[
        Annotated[Plain, Tag("scalar")],
        Annotated[list[Plain], Field(min_length=1), Tag("gradient")],
        Annotated[Conditional, Tag("condition")],
        Annotated[list[Conditional], Tag("conditions")],
    ],
    Discriminator(_kind_of_setting),
]
Parameters = dict[str, Setting]


def scalars_of(setting: Any) -> Iterator[Scalar]:
    """All single values in a setting."""
    match setting:
        case list():
            for part in setting:
                yield from scalars_of(part)
        case Conditional():
            yield from scalars_of(setting.value)
        case _:
            yield setting


def evaluate(setting: Any, name: str, t: float, checked: Callable[[Scalar], T]) -> T | None:
    """What a setting comes to for a tensor of this name at `t`, from 0 to 1; None where no filter speaks of it.

    The first filter that the name contains counts. Numbers of a gradient lie at equal distances, with lines between
    them; of others one is picked. `checked` makes the parameter's kind of a scalar, and raises ValueError.
    """
    match setting:
        case list() if any(isinstance(part, Conditional) for part in setting):
            chosen = next((part for part in setting if part.holds(name)), None)
            return None if chosen is None else evaluate(chosen.value, name, t, checked)
        case Conditional():
            return evaluate([setting], name, t, checked)
        case list():
            return _along([checked(value) for value in setting], t, checked)
    return checked(setting)


def _along(values: list[T], t: float, checked: Callable[[Any], T]) -> T:
    place = t * (len(values) - 1)
    low = int(place)
    a, b = values[low], values[min(len(values) - 1, low + 1)]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return a
    share = place - low
    return checked((1 - share) * a + share * b)  # type: ignore[operator]


@dataclass(frozen=True)
class Scope:
    """Settings, and the field of the configuration in which they stand; `where` is empty for the configuration."""

    where: str
    settings: Mapping[str, Any]

    def field(self, name: str) -> str:
        """The path of a parameter."""
        return f"{self.where}{'.' if self.where else ''}parameters.{name}"


def evaluated(scopes: Iterable[Scope], parameter: str, name: str, t: float, checked: Callable[[Scalar], T]) -> T | None:
    """What a parameter comes to for a tensor: by the first of the scopes that says something of it; None where none
    does. Raises RecipeError with the field's path.
    """
    for scope in scopes:
        if parameter in scope.settings:
            try:
                found = evaluate(scope.settings[parameter], name, t, checked)
            except ValueError as error:
                raise RecipeError(f"{error} (for {name!r})", where=scope.field(parameter)) from error
            if found is not None:
                return found
    return None

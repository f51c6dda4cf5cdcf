"""What a method is: a recipe that builds a checkpoint from sources.

Knows the shape of recipes; reads nothing itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Union

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    SerializeAsAny,
    Tag,
    ValidatorFunctionWrapHandler,
    model_validator,
)
from pydantic_core import PydanticCustomError

from merger.checkpoint import Checkpoint


@dataclass(frozen=True)
class Member:
    """One of the checkpoints that a recipe names: a stored model, or a recipe within the recipe, and its training
    step.
    """

    origin: "str | Method"
    step: int | None

    def __str__(self) -> str:
        return self.origin if isinstance(self.origin, str) else f"({self.origin.method})"


class Sources(ABC):
    """Where methods get their checkpoints from."""

    @abstractmethod
    def members(self, checkpoints: "str | Sequence[str | Method]") -> tuple[Member, ...]:
        """What a pattern or a list names, a pattern's matches in natural order.

        Raises SourceError where nothing matches.
        """

    @abstractmethod
    def open(self, member: Member) -> Checkpoint:
        """The checkpoint, its headers read. Raises SourceError."""


class Method(BaseModel, ABC):
    """A recipe, without its output. `Method.model_validate` makes the kind that its `method` names."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    by_name: ClassVar[dict[str, type["Method"]]] = {}
    paper: ClassVar[str] = ""
    example: ClassVar[str] = ""

    method: str

    @classmethod
    def __pydantic_init_subclass__(cls, **_kwargs: Any) -> None:
        name = cls.model_fields["method"].default
        if isinstance(name, str):
            cls.by_name[name] = cls

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_kind(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        if cls is not Method or isinstance(value, Method):
            return handler(value) if cls is not Method else value
        name = value.get("method") if isinstance(value, dict) else None
        if name not in cls.by_name:
            raise PydanticCustomError("unknown_method", "names no known method: {name}", {"name": name})
        return cls.by_name[name].model_validate(value)

    @abstractmethod
    def build(self, sources: Sources) -> Checkpoint:
        """The checkpoint that this recipe makes. Raises RequestError where it cannot be made."""


def _kind_of_source(value: Any) -> str:
    return "reference" if isinstance(value, str) else "recipe"


def _kind_of_checkpoints(value: Any) -> str:
    return "pattern" if isinstance(value, str) else "list"


# Tagged unions, so that a mistake is reported for what was meant and not for every alternative.
Source = Annotated[
    Union[Annotated[str, Tag("reference")], Annotated[SerializeAsAny[Method], Tag("recipe")]],  # noqa: UP007
    Discriminator(_kind_of_source),
]
Checkpoints = Annotated[
    Union[Annotated[str, Tag("pattern")], Annotated[list[Source], Tag("list")]],  # noqa: UP007
    Discriminator(_kind_of_checkpoints),
]

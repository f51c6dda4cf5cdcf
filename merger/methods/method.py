"""What a method is: a recipe that builds a checkpoint from sources.

Knows the shape of recipes; reads nothing itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
from merger.errors import RecipeError
from merger.evaluation import Measured, Score
from merger.quantized import dequantized
from merger.stages import Training


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

    @abstractmethod
    def admit(self, path: Path) -> None:
        """See that a file of data may be read. Raises SourceError."""


@dataclass(frozen=True)
class Tried:
    """A candidate, what it measured, and whether it was taken (None where that was not the question)."""

    name: str
    metrics: Mapping[str, float]
    taken: bool | None = None


@dataclass(frozen=True)
class Choice:
    """A choice that scores have made: by which metric, what each model scores alone (or the recipe as it stands), and
    what was tried in turn.
    """

    title: str
    metric: str
    alone: tuple[Tried, ...]
    steps: tuple[Tried, ...]

    @property
    def taken(self) -> tuple[Tried, ...]:
        """What was taken in the end."""
        return tuple(tried for tried in (*self.alone, *self.steps) if tried.taken)


class Judge(ABC):
    """Whoever measures candidates, each a model's reference or a recipe."""

    @abstractmethod
    def score(
        self,
        candidate: "str | Method",
        evaluation: Measured,
        key: str | None = None,
        along: "Sequence[str | Method]" = (),
    ) -> Score:
        """The score of one; `key` where the caller knows better than its path what it is. With the slopes of its loss
        along the models of `along`: by how much it grows for each unit of theirs that is added to its weights.

        Raises RequestError and JobError.
        """

    def scores(self, candidates: "Sequence[str | Method]", evaluation: Measured) -> list[Score]:
        """The scores of all, in their order."""
        return [self.score(candidate, evaluation) for candidate in candidates]


class Trainer(ABC):
    """Whoever fine-tunes models."""

    @abstractmethod
    def trained(self, training: Training, models: Sequence[str]) -> tuple[list[str], list[str]]:
        """The auxiliary models, and those to average, that a training makes of stored `models`, all finished.

        Raises RequestError and JobError.
        """


@dataclass(frozen=True)
class Means:
    """What a recipe may use before it is planned: to open models, to measure them, to train them."""

    sources: Sources
    judge: Judge
    trainer: Trainer


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
        value = _unfolded(value)
        name = value.get("method") if isinstance(value, dict) else None
        if name not in cls.by_name:
            raise PydanticCustomError("unknown_method", "names no known method: {name}", {"name": name})
        try:
            return cls.by_name[name].model_validate(value)
        except RecipeError as error:  # so that pydantic adds where this recipe stands in others
            said = {"message": error.message, "where": error.where, "remedy": error.remedy}
            raise PydanticCustomError("recipe", "{message}", said) from error

    @classmethod
    def more(cls) -> str:
        """What people should know of this kind beside its fields."""
        return ""

    @abstractmethod
    def build(self, sources: Sources) -> Checkpoint:
        """The checkpoint that this recipe makes. Raises RequestError where it cannot be made."""

    @property
    def trains(self) -> Training | None:
        """What this recipe, not those within it, trains before it can be planned."""
        return None

    def starts(self, _sources: Sources) -> list[str]:
        """The stored models that its training begins with. Raises SourceError."""
        return []

    def folders(self) -> tuple[Path, ...]:
        """Where this recipe, not those within it, writes something beside its result."""
        return (Path(self.trains.folder).expanduser(),) if self.trains else ()

    @property
    def is_open(self) -> bool:
        """Whether this recipe has models to train or choices to make before it can be planned."""
        return bool(self.evaluations()) or self.trains is not None

    def evaluations(self) -> tuple[Measured, ...]:
        """By what this recipe, not those within it, chooses."""
        return ()

    def chosen(self, _means: Means) -> "tuple[Method, tuple[Choice, ...]]":
        """This recipe, not those within it, with its models trained and all choices made that scores decide.

        Raises RequestError and JobError.
        """
        return self, ()


BESIDE = ("merges", "seed", "expert_granularity")  # our own fields beside those of a mergekit configuration


def _unfolded(value: Any) -> Any:
    """A mergekit configuration as the recipe that it is."""
    if not isinstance(value, Mapping) or "merge_method" not in value or "method" in value:
        return value
    config = {key: part for key, part in value.items() if key not in BESIDE}
    return {"method": "mergekit", "config": config, **{key: value[key] for key in BESIDE if key in value}}


def within(value: Any) -> "Iterator[Method]":
    """The recipes in a field's value, those within them not."""
    match value:
        case Method():
            yield value
        case list() | tuple():
            for part in value:
                yield from within(part)
        case dict():
            yield from within(list(value.values()))
        case BaseModel():
            for name in type(value).model_fields:
                yield from within(getattr(value, name))


def all_of(recipe: Method) -> Iterator[Method]:
    """A recipe and all within it."""
    yield recipe
    for name in type(recipe).model_fields:
        for inner in within(getattr(recipe, name)):
            yield from all_of(inner)


def path_of(value: Any, inner: object, path: str = "") -> str:
    """The path of the field of a recipe in which another one stands; empty where it stands in none."""
    if value is inner:
        return path.removeprefix(".")
    match value:
        case BaseModel():
            parts = [(f"{path}.{name}", getattr(value, name)) for name in type(value).model_fields]
        case dict():
            parts = [(f"{path}.{key}", part) for key, part in value.items()]
        case list() | tuple():
            parts = [(f"{path}[{i}]", part) for i, part in enumerate(value)]
        case _:
            parts = []
    return next((found for place, part in parts if (found := path_of(part, inner, place))), "")


def all_evaluations(recipe: Method) -> Iterator[Measured]:
    """By what a recipe and those within it choose."""
    return (evaluation for part in all_of(recipe) for evaluation in part.evaluations())


def is_open(recipe: Method) -> bool:
    """Whether a recipe, or one within it, has models to train or choices to make before it can be planned."""
    return any(part.is_open for part in all_of(recipe))


def settled(recipe: Method, means: Means) -> tuple[Method, tuple[Choice, ...]]:
    """A recipe with all choices made, those of the recipes within it first. Raises RequestError and JobError."""
    choices: list[Choice] = []

    def settle(value: Any) -> Any:
        match value:
            case Method():
                made, found = settled(value, means)
                choices.extend(found)
                return made
            case list():
                return [settle(part) for part in value]
            case dict():
                return {key: settle(part) for key, part in value.items()}
            case BaseModel() if any(within(value)):
                return value.model_copy(update={n: settle(getattr(value, n)) for n in type(value).model_fields})
        return value

    if not is_open(recipe):
        return recipe, ()
    inner = recipe.model_copy(update={name: settle(getattr(recipe, name)) for name in type(recipe).model_fields})
    outer, found = inner.chosen(means)
    return outer, (*choices, *found)


def _kind_of_source(value: Any) -> str:
    return "reference" if isinstance(value, str) else "recipe"


def _kind_of_checkpoints(value: Any) -> str:
    return "pattern" if isinstance(value, str) else "list"


# Tagged unions, so that a mistake is reported for what was meant and not for every alternative.
Source = Annotated[
    Union[Annotated[str, Tag("reference")], Annotated[SerializeAsAny[Method], Tag("recipe")]],
    Discriminator(_kind_of_source),
]
Checkpoints = Annotated[
    Union[Annotated[str, Tag("pattern")], Annotated[list[Source], Tag("list")]],
    Discriminator(_kind_of_checkpoints),
]


def open_source(sources: Sources, source: "str | Method") -> Checkpoint:
    """The one checkpoint that a reference or a recipe names, in weights that can be computed with: dequantized where it
    is quantized. Raises RequestError.
    """
    [member] = sources.members([source])
    return dequantized(sources.open(member))


def open_all(sources: Sources, checkpoints: "str | Sequence[str | Method]") -> list[Checkpoint]:
    """The checkpoints that a pattern or a list names, dequantized like that. Raises RequestError."""
    return [dequantized(sources.open(member)) for member in sources.members(checkpoints)]

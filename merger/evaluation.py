"""What a model is measured by, what came out, and what was asked of it. Pure: measures nothing (`merger.scoring` does).

A score keeps every item (a window of text, an example, a pair) with its size, so that two models can be compared item
by item: the error of their difference is much smaller than the error of either.
"""

import hashlib
import json
import math
import operator
import re
from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from merger.errors import SourceError

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "bits_per_byte", "word_perplexity", "byte_perplexity"})
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_CONDITION = re.compile(r"\s*(<=|>=|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")


class Measured(BaseModel, ABC):
    """What every evaluation has: data, how it is computed, and what is required of its outcome."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    metric: str = Field(default="", description="By which metric models are compared; the task's first without.")
    limit: int | None = Field(default=None, ge=1, description="The most items to look at; all without.")
    batch_size: int = Field(default=16, ge=1, description="Items at a time.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where; auto takes a GPU if there is one."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="In which dtype.")
    require: dict[str, str] = Field(
        default_factory=dict, description="What the result must reach, as in {loss: '<= 2.31'}, or it is not published."
    )
    connect: int = Field(
        default=5, ge=0, description="Models on each line between neighbouring fine-tunes in the report; 0: no lines."
    )
    better_than: list[str] = Field(
        default_factory=list,
        description="Models that the result must beat by the metric; `sources` stands for all that it is made of.",
    )

    metrics: ClassVar[tuple[str, ...]] = ()

    @field_validator("require")
    @classmethod
    def _conditions(cls, require: dict[str, str]) -> dict[str, str]:
        for metric, condition in require.items():
            if not _CONDITION.fullmatch(condition):
                raise ValueError(f"{metric}: {condition!r} is not a condition such as '<= 2.31'")
            if cls.metrics and metric not in cls.metrics:
                raise ValueError(f"{metric!r} is not measured; there are {', '.join(cls.metrics)}")
        return require

    @field_validator("metric")
    @classmethod
    def _a_metric(cls, metric: str) -> str:
        if metric and cls.metrics and metric not in cls.metrics:
            raise ValueError(f"{metric!r} is not measured; there are {', '.join(cls.metrics)}")
        return metric

    @field_validator("better_than", mode="before")
    @classmethod
    def _one_or_many(cls, models: Any) -> Any:
        return [models] if isinstance(models, str) else models

    @property
    def by(self) -> str:
        """The metric that counts."""
        return self.metric or self.metrics[0]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read."""
        return ()

    @property
    def lower_is_better(self) -> bool:
        """Whether less of the metric is better."""
        return self.by.rpartition("/")[2] in LOWER_IS_BETTER

    def better(self, a: float, b: float) -> bool:
        """Whether value `a` of the metric is better than `b`."""
        return a < b if self.lower_is_better else a > b

    def key(self) -> str:
        """A digest of everything that the figures depend on beside the model: settings and contents of the data.

        Raises SourceError where the data cannot be read.
        """
        settings = self.model_dump(mode="json", exclude={"require", "better_than", "metric", "batch_size", "connect"})
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for path in self.files:
            try:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise SourceError(f"cannot be read: {error.strerror}", where=str(path)) from error
        return digest.hexdigest()


class _OnData(Measured):
    data: list[str] = Field(min_length=1, description="A file, or several.")

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_many_files(cls, data: Any) -> Any:
        return [data] if isinstance(data, str) else data

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(Path(path).expanduser() for path in self.data)


class Text(_OnData):
    """How well a causal language model predicts text: nats per token, perplexity, bits per byte."""

    task: Literal["text"] = Field(default="text", description="What the data are.")
    field: str = Field(default="text", description="The field of a JSONL row that holds the text.")
    context: int = Field(default=512, ge=2, description="Tokens of a window; windows do not overlap or cross texts.")
    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "bits_per_byte")


class Classification(_OnData):
    """How often a sequence classifier is right. Rows of JSONL: `text` or `input_ids`, `label`, perhaps `text_pair`."""

    task: Literal["classification"] = Field(default="classification", description="What the data are.")
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss")


class Preferences(_OnData):
    """How often a reward model prefers what was preferred. Rows of JSONL: `chosen`, `rejected`, perhaps `prompt`."""

    task: Literal["preferences"] = Field(default="preferences", description="What the data are.")
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss")


class Harness(Measured):
    """Any task of lm-evaluation-harness, which must be installed (`pip install 'merger[harness]'`)."""

    task: Literal["harness"] = Field(default="harness", description="Whose tasks they are.")
    tasks: list[str] = Field(min_length=1, description="Names of its tasks.")
    include_path: str | None = Field(default=None, description="A folder with tasks of your own (they may run code).")
    num_fewshot: int | None = Field(default=None, ge=0, description="Examples in the prompt.")
    metric: str = Field(min_length=1, description="As in `arc_easy/acc_norm`: what models are compared by.")

    @property
    def files(self) -> tuple[Path, ...]:
        own = Path(self.include_path).expanduser().rglob("*") if self.include_path else ()
        return tuple(sorted(path for path in own if path.is_file()))


class Prompts(Measured):
    """Where prompts lie in the space of a model's hidden states or embeddings: rows of routers. No task for recipes;
    `mode` and the formulas are those of mergekit-moe (mergekit/moe/router.py).
    """

    task: Literal["prompts"] = Field(default="prompts", description="What the data are.")
    mode: Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed"] = Field(description="What is taken of them.")
    prompts: list[tuple[list[str], list[str]]] = Field(description="For each row what is added, and what subtracted.")
    metrics: ClassVar[tuple[str, ...]] = ("rows",)


class Alignment(Measured):
    """Which expert of one mixture is which of another, from their values alone. No task for recipes."""

    task: Literal["alignment"] = Field(default="alignment", description="What is compared.")
    metrics: ClassVar[tuple[str, ...]] = ("moved",)


Evaluation = Annotated[
    Union[Text, Classification, Preferences, Harness],
    Field(discriminator="task"),
]


def _only_chooses(evaluation: Measured) -> Measured:
    if evaluation.require or evaluation.better_than:
        raise ValueError("`require` and `better_than` are said of the result: write them in `evaluate`")
    return evaluation


# By what candidates are compared.
Chooser = Annotated[Evaluation, AfterValidator(_only_chooses)]

TASKS: dict[str, type[Measured]] = {
    "text": Text,
    "classification": Classification,
    "preferences": Preferences,
    "harness": Harness,
}


@dataclass(frozen=True)
class Score:
    """What an evaluation came to: metrics; of the items the sums (nats, hits) and the sizes (tokens, 1), in the order
    of the data, whose ratio is the task's first metric. `unit` says what a size counts. `slopes` are those of the loss
    along models, where they were asked for; `rows` are routers' rows [layers, rows, d] where prompts were measured, as
    text (`merger.given`); `orders` those of the experts of each layer where mixtures were compared.
    """

    metrics: Mapping[str, float]
    unit: str
    sums: tuple[float, ...]
    sizes: tuple[float, ...]
    slopes: tuple[float, ...] = ()
    rows: str = ""
    orders: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Score":
        """The score from its fields as JSON has them. Raises KeyError and TypeError."""
        lists = {name: tuple(data[name]) for name in ("sums", "sizes", "slopes")}
        orders = tuple(tuple(order) for order in data.get("orders", ()))
        return cls(metrics=data["metrics"], unit=data["unit"], **lists, rows=data.get("rows", ""), orders=orders)

    @property
    def count(self) -> int:
        return int(sum(self.sizes))

    @property
    def error(self) -> float:
        """The standard error of the first metric (ratio of means, from the spread of the items)."""
        return _ratio_error(self.sums, self.sizes)

    def minus(self, other: "Score") -> tuple[float, float]:
        """The difference of the first metric on the same items and its standard error."""
        if self.sizes != other.sizes:
            raise ValueError("the two scores are not of the same items")
        differences = [a - b for a, b in zip(self.sums, other.sums, strict=True)]
        return math.fsum(differences) / sum(self.sizes), _ratio_error(differences, self.sizes)

    def as_data(self) -> dict[str, Any]:
        """For JSON, without the items."""
        error = self.error
        known = None if math.isnan(error) else error
        return {"metrics": dict(self.metrics), "error": known, "count": self.count, "unit": self.unit}


def _ratio_error(sums: "tuple[float, ...] | list[float]", sizes: tuple[float, ...]) -> float:
    n, total = len(sizes), sum(sizes)
    if n < 2:
        return math.nan
    ratio = math.fsum(sums) / total
    spread = math.fsum((a - ratio * b) ** 2 for a, b in zip(sums, sizes, strict=True))
    return math.sqrt(spread * n / (n - 1)) / total


@dataclass(frozen=True)
class Verdict:
    """One thing that was required of a result, and whether it holds."""

    passed: bool
    says: str


def verdicts(evaluation: Measured, score: Score, others: Mapping[str, Score]) -> list[Verdict]:
    """What was required: every condition, and being better than each of the `others` (by their references)."""
    found = []
    for metric, condition in evaluation.require.items():
        match = _CONDITION.fullmatch(condition)
        if match is None or metric not in score.metrics:
            found.append(Verdict(False, f"{metric} was not measured; there are {', '.join(score.metrics)}"))
            continue
        value = score.metrics[metric]
        found.append(Verdict(_OPERATORS[match[1]](value, float(match[2])), f"{metric} {value:.4f} {condition.strip()}"))
    for name, other in others.items():
        a, b = score.metrics[evaluation.by], other.metrics[evaluation.by]
        difference, error = score.minus(other)
        is_first = evaluation.by == next(iter(score.metrics))
        paired = f", {difference:+.4f} ± {error:.4f} on the same items" if is_first and error == error else ""
        found.append(Verdict(evaluation.better(a, b), f"{evaluation.by} {a:.4f} against {b:.4f} of {name}{paired}"))
    return found

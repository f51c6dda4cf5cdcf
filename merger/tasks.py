"""What a fine-tuning learns: how rows become examples, and the loss of a batch. The interface for tasks of your own.

A package brings a task through the entry-point group `merger.training`; a recipe names it by `task`. Order of batches,
settings, what is kept and resumed stay with `merger.training`. Knows rows and losses; imports torch only where a loss
is computed.
"""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from merger.errors import MergerError, NotInstalled, RecipeError
from merger.rows import field_of, ids_of, pair_of

if TYPE_CHECKING:
    import torch

GROUP = "merger.training"
Example = TypeVar("Example")
Row = tuple[str, Mapping[str, Any]]  # where it stands, and its fields


@dataclass(frozen=True)
class Encoding:
    """What rows are read with: the model's tokenizer (None where it has none), the labels of the data, and the tokens
    of a window of text.
    """

    tokenizer: Any
    labels: tuple[str, ...]
    context: int

    def ids(self, row: Mapping[str, Any], name: str, where: str) -> tuple[int, ...]:
        """The tokens of a row's field, which may hold tokens already. Raises SourceError."""
        return tuple(ids_of(self.tokenizer, row, name, where))

    def pair(self, row: Mapping[str, Any], where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens of a row's `chosen` and `rejected`, each behind its `prompt`. Raises SourceError."""
        chosen, rejected = pair_of(self.tokenizer, row, where)
        return tuple(chosen), tuple(rejected)


class Task(ABC, Generic[Example]):
    """A task to train on. An instance is made without arguments and keeps nothing between calls: what a step computes
    may follow from its batch and torch's random state alone, or a resumed stage would come to another model.
    """

    #: The Auto class of transformers that makes the model.
    kind: ClassVar[str] = "AutoModelForSequenceClassification"
    #: Whether the model has a head that the base does not: a fresh one, trained alone first (linear probing).
    has_head: ClassVar[bool] = True

    def labels(self, rows: Iterable[Row]) -> tuple[str, ...]:  # noqa: ARG002
        """The names of the head's outputs in their order; none: the base's config stays. Raises SourceError."""
        return ()

    def config(self, config: Mapping[str, Any], labels: tuple[str, ...]) -> dict[str, Any]:
        """What to change in the base's config."""
        if not labels:
            return {}
        names = dict(enumerate(labels))
        changes = {"num_labels": len(names), "id2label": names, "label2id": {v: k for k, v in names.items()}}
        return changes if config.get("pad_token_id") is not None else {**changes, "pad_token_id": 0}

    @abstractmethod
    def examples(self, row: Mapping[str, Any], where: str, encoding: Encoding) -> Iterable[Example]:
        """The examples of a row: one, several or none. Raises SourceError, which tells `where`."""

    @abstractmethod
    def loss(self, model: Any, batch: Sequence[Example]) -> "torch.Tensor":
        """The loss of a batch, a scalar in float32 with its gradient."""


def padded(model: Any, sequences: Sequence[Sequence[int]]) -> "tuple[torch.Tensor, torch.Tensor]":
    """Tokens and attention mask on the model's device, (sequences, longest) each, padded at the end."""
    import torch

    longest = max(map(len, sequences))
    pad = model.config.get_text_config().pad_token_id or 0
    tokens = [[*ids, *[pad] * (longest - len(ids))] for ids in sequences]
    mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences]
    return torch.tensor(tokens, device=model.device), torch.tensor(mask, device=model.device)


# ---- ready ones ---------------------------------------------------------------------------------------


class Text(Task[tuple[int, ...]]):
    """Causal language modelling: nats per token of windows of text."""

    kind = "AutoModelForCausalLM"
    has_head = False

    def examples(self, row: Mapping[str, Any], where: str, encoding: Encoding) -> Iterable[tuple[int, ...]]:
        ids, size = encoding.ids(row, "text", where), encoding.context
        return (ids[at : at + size] for at in range(0, len(ids) - 1, size) if len(ids[at : at + size]) > 1)

    def loss(self, model: Any, batch: Sequence[tuple[int, ...]]) -> "torch.Tensor":
        from torch.nn.functional import cross_entropy

        tokens, mask = padded(model, batch)
        logits = model(input_ids=tokens, attention_mask=mask).logits.float()
        wanted = tokens.masked_fill(mask == 0, -100)[:, 1:]
        return cross_entropy(logits[:, :-1].transpose(1, 2), wanted)


class Classification(Task[tuple[tuple[int, ...], int]]):
    """Cross entropy of the label of a text."""

    def labels(self, rows: Iterable[Row]) -> tuple[str, ...]:
        """Those of the rows, in the order of their numbers or names."""
        found = {str(field_of(row, "label", where)) for where, row in rows}
        return tuple(
            sorted(found, key=lambda label: (not label.isdigit(), int(label) if label.isdigit() else 0, label))
        )

    def examples(self, row: Mapping[str, Any], where: str, encoding: Encoding) -> Iterable[tuple[tuple[int, ...], int]]:
        ids = encoding.ids(row, "text", where)
        label = encoding.labels.index(str(field_of(row, "label", where)))
        return [(ids, label)] if ids else []

    def loss(self, model: Any, batch: Sequence[tuple[tuple[int, ...], int]]) -> "torch.Tensor":
        import torch

        tokens, mask = padded(model, [ids for ids, _ in batch])
        logits = model(input_ids=tokens, attention_mask=mask).logits.float()
        wanted = torch.tensor([label for _, label in batch], device=model.device)
        return torch.nn.functional.cross_entropy(logits, wanted)


class Preferences(Task[tuple[tuple[int, ...], tuple[int, ...]]]):
    """The loss of Bradley and Terry, -log sigmoid(r(chosen) - r(rejected)), of a model with one output, the reward."""

    def labels(self, rows: Iterable[Row]) -> tuple[str, ...]:  # noqa: ARG002
        return ("LABEL_0",)  # as transformers itself calls the one output of a model

    def examples(
        self, row: Mapping[str, Any], where: str, encoding: Encoding
    ) -> Iterable[tuple[tuple[int, ...], tuple[int, ...]]]:
        pair = encoding.pair(row, where)
        return [pair] if all(pair) else []

    def loss(self, model: Any, batch: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> "torch.Tensor":
        from torch.nn.functional import logsigmoid

        tokens, mask = padded(model, [ids for pair in batch for ids in pair])
        rewards = model(input_ids=tokens, attention_mask=mask).logits[:, 0].float()
        return -logsigmoid(rewards[::2] - rewards[1::2]).mean()


READY: dict[str, type[Task[Any]]] = {"text": Text, "classification": Classification, "preferences": Preferences}


# ---- by name ------------------------------------------------------------------------------------------


def package_of(name: str) -> str | None:
    """The distribution and version that bring a task, as in `rankings 1.2`; None of a ready one. Imports nothing of it.

    Raises RecipeError where no installed package has it, or several do.
    """
    return None if name in READY else _package(_entry(name))


def task_of(name: str, package: str | None = None) -> Task[Any]:
    """A task by its name; of `package`, where that is given. Raises RequestError."""
    if name in READY:
        return READY[name]()
    entry = _entry(name)
    if package not in (None, _package(entry)):
        raise NotInstalled(
            f"comes from {_package(entry)} on this machine and from {package} where the job began",
            where=f"task {name}",
            remedy="Install the same version on all machines.",
        )
    try:
        made = entry.load()()
    except MergerError:
        raise
    except Exception as error:
        raise NotInstalled(
            f"cannot be loaded: {type(error).__name__}: {error}",
            where=f"task {name} of {_package(entry)}",
            remedy=f"Mend {entry.value}, or install what it needs.",
        ) from error
    if not isinstance(made, Task):
        raise NotInstalled(
            f"{entry.value} is no merger.tasks.Task",
            where=f"task {name} of {_package(entry)}",
            remedy="docs/evaluation.md has an example.",
        )
    return made


def _entry(name: str) -> EntryPoint:
    found = list(entry_points(group=GROUP, name=name))
    if len(found) == 1:
        return found[0]
    if found:
        several = " and ".join(sorted(_package(entry) for entry in found))
        raise RecipeError(
            f"{name!r} is brought by {several}", where="training.task", remedy="Uninstall all of them but one."
        )
    installed = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    close = difflib.get_close_matches(name, [*READY, *(entry.name for entry in installed)], 1, 0.5)
    others = ", ".join(f"{entry.name} (of {_package(entry)})" for entry in installed)
    raise RecipeError(
        f"{name!r} is no task to train on" + (f"; did you mean {close[0]!r}?" if close else ""),
        where="training.task",
        remedy=f"There are {', '.join(READY)}; of installed packages {others or 'none'}.",
    )


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"

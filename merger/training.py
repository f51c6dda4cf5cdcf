"""Fine-tunes models: `python -m merger.training` takes stages as lines of JSON on standard input and tells of progress.

Plain AdamW on shuffled batches, in float32. Order and dropout follow from the stage's seed and the number of the step
alone, and the state is kept every few seconds: a stage that was killed goes on and comes to the same model. Knows
transformers and steps; what is learnt is the task's (`merger.tasks`).
"""

import gc
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from merger.apart import requests
from merger.checkpoint import Checkpoint
from merger.errors import MergerError, SourceError
from merger.loading import Loaded, load
from merger.methods.method import open_source
from merger.reach import reach_of
from merger.rows import rows_of
from merger.sources import sources_within
from merger.stages import KEEP_SECONDS, Stage
from merger.states import State, States
from merger.tasks import Encoding, Task, task_of

Say = Callable[[int, int, float], None]
_WARMUP = 0.1  # of the steps
_MOMENTS = ("exp_avg", "exp_avg_sq")


Bodies = Sequence[tuple[Checkpoint, float]]


def train(
    stage: Stage,
    bodies: Bodies,
    head: Checkpoint | None,
    folder: Path,
    key: str,
    say: Say,
    keep_seconds: float = KEEP_SECONDS,
) -> None:
    """Make the model of a stage in `folder`, going on from a state that an earlier process left beside it.

    Raises RequestError where data or models do not fit.
    """
    task = task_of(stage.task, stage.package)
    loaded = _begin(stage, task, bodies, head)
    examples = _examples(stage, task, loaded)
    folder.parent.mkdir(parents=True, exist_ok=True)
    states = States(folder, key)
    _FineTuning(stage, task, loaded.model, examples, states, keep_seconds).run(say)
    own = bodies[0][0].config or {}
    loaded.model.config.update({name: own[name] for name in _DROPOUTS & own.keys()})  # dropout was the stage's

    def save(place: Path) -> None:
        loaded.model.save_pretrained(place)
        for path in bodies[0][0].side_files.values():
            (place / path.name).write_bytes(path.read_bytes())
        for name, text in bodies[0][0].texts.items():
            (place / name).write_text(text, encoding="utf-8")

    states.finish(save)


# ---- the model ----------------------------------------------------------------------------------------


def _begin(stage: Stage, task: Task[Any], bodies: Bodies, head: Checkpoint | None) -> Loaded:
    """The model with the sum of the bodies, and the head of `head`; a fresh one follows from the seed."""
    config = bodies[0][0].config or {}
    changes = {**dict.fromkeys(_DROPOUTS & config.keys(), stage.dropout), **task.config(config, stage.labels)}
    torch.manual_seed(stage.seed)
    loaded, *others = (_body(task, body, changes) for body, _ in bodies)
    own = dict(loaded.model.named_parameters())
    with torch.no_grad():
        if others:
            for name, value in _body_of(loaded.model).items():
                own[name].copy_(value.double() * bodies[0][1])
        for other, (_, weight) in zip(others, bodies[1:], strict=True):
            for name, value in _body_of(other.model).items():
                own[name].add_(value, alpha=weight)
        if head is not None:
            taken = load(head, task.kind, "float32", loaded.device, None, _is_new).model
            for name, value in _head_of(taken).items():
                own[name].copy_(value)
    return loaded


def _body(task: Task[Any], body: Checkpoint, changes: Mapping[str, Any]) -> Loaded:
    """A model with a body's weights; the body's own head, which may be for another task, gives way to a fresh one."""
    if task.has_head:
        kept = {name: tensor for name, tensor in body.tensors.items() if not _HEAD.search(name)}
        body = replace(body, tensors=kept)
    return load(body, task.kind, "float32", "auto", changes, _is_new)


_DROPOUTS = {"attention_dropout", "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout"}
_HEAD = re.compile(r"^(score|classifier|pre_classifier|lm_head|cls|vocab_projector|vocab_transform|qa_outputs)\.")


def _is_new(name: str) -> bool:
    """Whether a parameter may be missing in a body: those of heads, and what BERT puts between body and head."""
    return bool(_HEAD.search(name)) or ".pooler." in f".{name}"


def _body_of(model: Any) -> dict[str, torch.Tensor]:
    """The parameters of the body, by name."""
    body = {id(parameter) for parameter in model.base_model.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in body}


def _head_of(model: Any) -> dict[str, torch.Tensor]:
    """The parameters outside of the body, by name."""
    body = _body_of(model)
    return {name: parameter for name, parameter in model.named_parameters() if name not in body}


# ---- the data -----------------------------------------------------------------------------------------


def _examples(stage: Stage, task: Task[Any], loaded: Loaded) -> list[Any]:
    encoding = Encoding(loaded.tokenizer, stage.labels, stage.context)
    rows = rows_of([Path(stage.data).expanduser()])
    found = [example for where, row in rows for example in task.examples(row, where, encoding)]
    if not found:
        raise SourceError("holds nothing to train on", where=stage.data)
    return found


def _batch(stage: Stage, examples: Sequence[Any], step: int) -> list[Any]:
    """The examples of a step: each epoch is a permutation of its own, cut into whole batches."""
    size = min(stage.batch_size, len(examples))
    a_epoch = len(examples) // size
    epoch, place = divmod(step, a_epoch)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(stage.seed * 1_000_003 + epoch))
    return [examples[int(i)] for i in order[place * size : (place + 1) * size]]


# ---- the steps ----------------------------------------------------------------------------------------


class _FineTuning:
    """A stage while it trains: its model, its task and examples, and where its state is kept."""

    def __init__(
        self, stage: Stage, task: Task[Any], model: Any, examples: Sequence[Any], states: States, seconds: float
    ) -> None:
        self._stage, self._task, self._model, self._examples = stage, task, model, examples
        self._states, self._seconds = states, seconds
        self._kept = states.kept()

    def run(self, say: Say) -> None:
        """The steps of the head alone, then those of the whole model; each part begins with a fresh optimizer."""
        stage = self._stage
        for first, until in ((0, stage.head_steps), (stage.head_steps, stage.steps)):
            if first < until and (self._kept is None or self._kept.first <= first):
                self._train(first, until, say, head_only=until == stage.head_steps)
        self._model.eval()

    def _train(self, first: int, until: int, say: Say, *, head_only: bool) -> None:
        head = set(_head_of(self._model))
        for name, parameter in self._model.train().named_parameters():
            parameter.requires_grad_(name in head or not head_only)
        trained = {name: value for name, value in self._model.named_parameters() if value.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=0.0, weight_decay=self._stage.weight_decay)
        step = self._restored(optimizer, trained, first)
        saved = time.monotonic()
        while step < until:
            warmed = min(1.0, (step - first + 1) / max(1.0, _WARMUP * (until - first)))
            loss = self._step(optimizer, step, self._stage.learning_rate * warmed)
            step += 1
            say(step, self._stage.steps, loss)
            if time.monotonic() - saved >= self._seconds:
                self._keep(optimizer, trained, first, step)
                saved = time.monotonic()

    def _step(self, optimizer: torch.optim.Optimizer, step: int, rate: float) -> float:
        torch.manual_seed(self._stage.seed * 1_000_003 + step)  # of dropout
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = self._task.loss(self._model, _batch(self._stage, self._examples, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    def _keep(
        self, optimizer: torch.optim.Optimizer, trained: Mapping[str, torch.Tensor], first: int, step: int
    ) -> None:
        tensors = {f"model.{name}": value.detach().contiguous() for name, value in self._model.named_parameters()}
        for name, parameter in trained.items():
            moments = optimizer.state[parameter]
            tensors |= {f"{moment}.{name}": moments[moment].contiguous() for moment in _MOMENTS}
        self._states.keep(State(first, step, tensors))

    def _restored(self, optimizer: torch.optim.Optimizer, trained: Mapping[str, torch.Tensor], first: int) -> int:
        """Take up the state where it is of this part; the next step."""
        kept, self._kept = self._kept, None
        if kept is None:
            return first
        with torch.no_grad():
            for name, value in self._model.named_parameters():
                value.copy_(kept.tensors[f"model.{name}"])
        done = torch.tensor(float(kept.step - kept.first))
        for name, parameter in trained.items():
            moments = {moment: kept.tensors[f"{moment}.{name}"].to(parameter.device) for moment in _MOMENTS}
            optimizer.state[parameter] = {"step": done.clone(), **moments}
        return kept.step


# ---- the process --------------------------------------------------------------------------------------


def _serve(request: Mapping[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(request["threads"])
    lists = {name: tuple(map(_frozen, request["stage"][name])) for name in ("labels", "bodies")}
    stage = Stage(**{**request["stage"], **lists})
    sources = sources_within(reach_of(request["reach"]))
    try:
        bodies = [(open_source(sources, body), weight) for body, weight in request["bodies"]]
        head = open_source(sources, request["head"]) if request["head"] else None
        train(stage, bodies, head, Path(request["folder"]), request["key"], _tell, request["keep_seconds"])
    except MergerError as error:
        told = {"message": error.message, "where": error.where, "remedy": error.remedy}
        return {"error": {"kind": type(error).__name__, **told}}
    return {"finished": request["key"]}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _tell(done: int, total: int, loss: float) -> None:
    _send({"done": done, "total": total, "loss": loss})


def _send(answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer), file=_ANSWERS, flush=True)


if __name__ == "__main__":
    _ANSWERS, sys.stdout = sys.stdout, sys.stderr  # libraries may print what they like
    for _request in requests():
        _send(_serve(json.loads(_request)))
        gc.collect()

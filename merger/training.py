"""Fine-tunes a model: `python -m merger.training` takes one stage as JSON on standard input and tells of its progress.

Plain AdamW on shuffled batches, in float32. Order and dropout follow from the stage's seed and the number of the step
alone, and the state is kept every few seconds: a stage that was killed goes on and comes to the same model. Knows
transformers and data; knows nothing of what the model is for.
"""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from merger.apart import end_with_input
from merger.checkpoint import Checkpoint
from merger.errors import MergerError, SourceError
from merger.loading import Loaded, load
from merger.methods.method import Member
from merger.rows import field_of, ids_of, rows_of
from merger.sources import LocalSources, Roots
from merger.stages import FINISHED, Stage
from merger.storage.disk import write_atomically

Say = Callable[[int, int, float], None]
_EVERY = 20.0  # seconds between two states
_KINDS = {"text": "AutoModelForCausalLM", "classification": "AutoModelForSequenceClassification"}
_WARMUP = 0.1  # of the steps
_MOMENTS = ("exp_avg", "exp_avg_sq")


Bodies = Sequence[tuple[Checkpoint, float]]


def train(stage: Stage, bodies: Bodies, head: Checkpoint | None, folder: Path, key: str, say: Say) -> None:
    """Make the model of a stage in `folder`, going on from a state that an earlier process left beside it.

    Raises RequestError where data or models do not fit.
    """
    loaded = _begin(stage, bodies, head)
    items = _items(stage, loaded)
    folder.parent.mkdir(parents=True, exist_ok=True)
    state = folder.with_name(f"{folder.name}.state.safetensors")
    _FineTuning(stage, loaded, items, state, key, say).run()
    made = folder.with_name(f".{folder.name}-{os.getpid()}")
    own = bodies[0][0].config or {}
    loaded.model.config.update({name: own[name] for name in _DROPOUTS & own.keys()})  # dropout was the stage's
    loaded.model.save_pretrained(made)
    for path in bodies[0][0].side_files.values():
        (made / path.name).write_bytes(path.read_bytes())
    write_atomically(made / FINISHED, json.dumps({"key": key}).encode())
    shutil.rmtree(folder, ignore_errors=True)  # of another recipe, or an older one of this name
    made.rename(folder)
    state.unlink(missing_ok=True)


# ---- the model ----------------------------------------------------------------------------------------


def _begin(stage: Stage, bodies: Bodies, head: Checkpoint | None) -> Loaded:
    """The model with the sum of the bodies, and the head of `head`; a fresh one follows from the seed."""
    config = bodies[0][0].config or {}
    changes: dict[str, Any] = dict.fromkeys(_DROPOUTS & config.keys(), stage.dropout)
    if stage.task == "classification":
        names = dict(enumerate(stage.labels))
        changes |= {"num_labels": len(names), "id2label": names, "label2id": {v: k for k, v in names.items()}}
        if config.get("pad_token_id") is None:
            changes["pad_token_id"] = 0
    torch.manual_seed(stage.seed)
    loaded, *others = (_body(stage, body, changes) for body, _ in bodies)
    own = dict(loaded.model.named_parameters())
    with torch.no_grad():
        if others:
            for name, value in _body_of(loaded.model).items():
                own[name].copy_(value.double() * bodies[0][1])
        for other, (_, weight) in zip(others, bodies[1:], strict=True):
            for name, value in _body_of(other.model).items():
                own[name].add_(value, alpha=weight)
        if head is not None:
            taken = load(head, _KINDS[stage.task], "float32", loaded.device, None, _is_new).model
            for name, value in _head_of(taken).items():
                own[name].copy_(value)
    return loaded


def _body(stage: Stage, body: Checkpoint, changes: Mapping[str, Any]) -> Loaded:
    """A model with a body's weights; a classifier's head, which may be for other labels, is left behind."""
    if stage.task == "classification":
        kept = {name: tensor for name, tensor in body.tensors.items() if not _HEAD.search(name)}
        body = replace(body, tensors=kept)
    return load(body, _KINDS[stage.task], "float32", "auto", changes, _is_new)


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

Item = tuple[tuple[int, ...], int]  # tokens, and the label of an example


def _items(stage: Stage, loaded: Loaded) -> list[Item]:
    items: list[Item] = []
    for where, row in rows_of([Path(stage.data).expanduser()]):
        ids = tuple(ids_of(loaded.tokenizer, row, "text", where))
        if stage.task == "text":
            items += [(ids[at : at + stage.context], 0) for at in range(0, len(ids) - 1, stage.context)]
        else:
            items.append((ids, stage.labels.index(str(field_of(row, "label", where)))))
    items = [item for item in items if len(item[0]) > (stage.task == "text")]
    if not items:
        raise SourceError("holds nothing to train on", where=stage.data)
    return items


def _batch(stage: Stage, items: Sequence[Item], step: int) -> list[Item]:
    """The examples of a step: each epoch is a permutation of its own, cut into whole batches."""
    size = min(stage.batch_size, len(items))
    a_epoch = len(items) // size
    epoch, place = divmod(step, a_epoch)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(stage.seed * 1_000_003 + epoch))
    return [items[int(i)] for i in order[place * size : (place + 1) * size]]


def _loss(stage: Stage, loaded: Loaded, batch: Sequence[Item]) -> torch.Tensor:
    longest = max(len(ids) for ids, _ in batch)
    pad = loaded.model.config.get_text_config().pad_token_id or 0
    tokens = torch.tensor([[*ids, *[pad] * (longest - len(ids))] for ids, _ in batch], device=loaded.device)
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch], device=loaded.device)
    logits = loaded.model(input_ids=tokens, attention_mask=mask).logits.float()
    if stage.task == "text":
        wanted = tokens.masked_fill(mask == 0, -100)[:, 1:]
        return cross_entropy(logits[:, :-1].transpose(1, 2), wanted)
    return cross_entropy(logits, torch.tensor([label for _, label in batch], device=loaded.device))


# ---- the steps ----------------------------------------------------------------------------------------


class _FineTuning:
    """A stage while it trains: its model, its data, and the file in which its state is kept."""

    def __init__(self, stage: Stage, loaded: Loaded, items: Sequence[Item], state: Path, key: str, say: Say) -> None:
        self._stage, self._loaded, self._items = stage, loaded, items
        self._state, self._key, self._say = state, key, say
        self._model = loaded.model

    def run(self) -> None:
        """The steps of the head alone, then those of the whole model; each part begins with a fresh optimizer."""
        stage = self._stage
        for first, until in ((0, stage.head_steps), (stage.head_steps, stage.steps)):
            if first < until and self._kept_part() <= first:
                self._train(first, until, head_only=until == stage.head_steps)
        self._model.eval()

    def _train(self, first: int, until: int, *, head_only: bool) -> None:
        head = set(_head_of(self._model))
        for name, parameter in self._model.train().named_parameters():
            parameter.requires_grad_(name in head or not head_only)
        trained = {name: value for name, value in self._model.named_parameters() if value.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=0.0, weight_decay=self._stage.weight_decay)
        step = self._restore(optimizer, trained, first)
        saved = time.monotonic()
        while step < until:
            warmed = min(1.0, (step - first + 1) / max(1.0, _WARMUP * (until - first)))
            self._step(optimizer, step, self._stage.learning_rate * warmed)
            step += 1
            if time.monotonic() - saved > _EVERY:
                self._keep(optimizer, trained, first, step)
                saved = time.monotonic()

    def _step(self, optimizer: torch.optim.Optimizer, step: int, rate: float) -> None:
        torch.manual_seed(self._stage.seed * 1_000_003 + step)  # of dropout
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _loss(self._stage, self._loaded, _batch(self._stage, self._items, step))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        self._say(step + 1, self._stage.steps, loss.item())

    # ---- what is kept -----------------------------------------------------------------------------------

    def _kept(self) -> Mapping[str, str] | None:
        """What the state's file says of itself, where it is of this very stage."""
        try:
            with safe_open(self._state, "pt") as file:
                told: dict[str, str] = file.metadata() or {}
        except (OSError, SafetensorError):
            return None
        return told if told.get("key") == self._key else None

    def _kept_part(self) -> int:
        """The first step of the part that the state is in."""
        told = self._kept()
        return int(told["first"]) if told else 0

    def _keep(
        self, optimizer: torch.optim.Optimizer, trained: Mapping[str, torch.Tensor], first: int, step: int
    ) -> None:
        """Write weights, moments and the number of the step; whole or not at all."""
        tensors = {f"model.{name}": value.detach().contiguous() for name, value in self._model.named_parameters()}
        for name, parameter in trained.items():
            moments = optimizer.state[parameter]
            tensors |= {f"{moment}.{name}": moments[moment].contiguous() for moment in _MOMENTS}
        temporary = self._state.with_name(f".{self._state.name}-{os.getpid()}")
        save_file(tensors, temporary, {"key": self._key, "first": str(first), "step": str(step)})
        temporary.replace(self._state)

    def _restore(self, optimizer: torch.optim.Optimizer, trained: Mapping[str, torch.Tensor], first: int) -> int:
        """Take up the state where it is of this part; the next step."""
        told = self._kept()
        if told is None or int(told["first"]) != first:
            return first
        tensors = load_file(self._state)
        with torch.no_grad():
            for name, value in self._model.named_parameters():
                value.copy_(tensors[f"model.{name}"])
        done = float(told["step"]) - first
        for name, parameter in trained.items():
            moments = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in _MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(done), **moments}
        return int(told["step"])


# ---- the process --------------------------------------------------------------------------------------


def _serve(request: Mapping[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(request["threads"])
    lists = {name: tuple(map(_frozen, request["stage"][name])) for name in ("labels", "bodies")}
    stage = Stage(**{**request["stage"], **lists})
    sources = LocalSources(Roots(map(Path, request["roots"])))
    try:
        bodies = [(sources.open(Member(body, None)), weight) for body, weight in request["bodies"]]
        head = sources.open(Member(request["head"], None)) if request["head"] else None
        train(stage, bodies, head, Path(request["folder"]), request["key"], _tell)
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
    _request = json.loads(sys.stdin.readline())
    end_with_input()
    _send(_serve(_request))

"""Measures models: `python -m merger.scoring` answers requests, one a line of JSON on standard input.

A process of its own, because torch and a model need memory that the caller should not keep. A model need not lie on
disk: what a recipe describes is made in memory and handed to transformers. Knows transformers and what an item is;
knows nothing of plans or of what scores are used for.
"""

import gc
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from torch.nn.functional import cross_entropy, logsigmoid

from merger.alignment import orders
from merger.apart import requests
from merger.checkpoint import Checkpoint
from merger.errors import MergerError, NotEnoughMemory, NotInstalled, SourceError, UnsupportedModel
from merger.evaluation import (
    Alignment,
    Classification,
    Evaluation,
    Harness,
    Measured,
    Preferences,
    Prompts,
    Score,
    Text,
)
from merger.gating import from_embeddings, from_hidden_states
from merger.given import as_text
from merger.host import free_memory
from merger.loading import Loaded, load
from merger.methods.method import Method, Sources, open_source
from merger.reach import reach_of
from merger.rows import field_of, ids_of, pair_of, rows_of
from merger.sizes import parameters
from merger.sources import sources_within

Say = Callable[[int, int], None]


# ---- items --------------------------------------------------------------------------------------------

Item = tuple[int, tuple[int, ...]]  # its place in the data, its tokens


def _batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Items of one length together, longest first: nothing is padded, so no mask can change a figure."""
    ordered = sorted(items, key=lambda item: (-len(item[1]), item[0]))
    for _, group in groupby(ordered, key=lambda item: len(item[1])):
        same = list(group)
        yield from (same[i : i + size] for i in range(0, len(same), size))


def _computed(
    loaded: Loaded, items: Sequence[Item], size: int, say: Say
) -> Iterator[tuple[list[Item], torch.Tensor, Any]]:
    """Each batch with its tokens and the model's logits for them, in float64 on the CPU."""
    done = 0
    with torch.inference_mode(not _differentiates(loaded)):
        for batch in _batches(items, size):
            tokens = torch.tensor([ids for _, ids in batch], device=loaded.device)
            logits = loaded.model(input_ids=tokens).logits
            yield batch, tokens, logits.double()
            done += len(batch)
            say(done, len(items))


def _differentiates(loaded: Loaded) -> bool:
    return any(parameter.requires_grad for parameter in loaded.model.parameters())


def _numbers(losses: torch.Tensor) -> list[float]:
    """Losses as numbers; where gradients are wanted, added to those of the parameters."""
    if losses.requires_grad:
        losses.sum().backward()
    return losses.tolist()


# ---- tasks --------------------------------------------------------------------------------------------


def text(evaluation: Text, loaded: Loaded, say: Say) -> Score:
    """Nats of every token but the first of its window, given those before it in the window."""
    windows, sizes = _windows(evaluation, loaded)
    nats = [0.0] * len(windows)
    for batch, tokens, logits in _computed(loaded, list(enumerate(windows)), evaluation.batch_size, say):
        losses = cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").sum(1)
        for (place, _), loss in zip(batch, _numbers(losses), strict=True):
            nats[place] = loss
    tokens_of = tuple(float(len(window) - 1) for window in windows)
    loss = math.fsum(nats) / sum(tokens_of)
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    known = [size for size in sizes if size is not None]
    total = sum(known)
    if len(known) == len(sizes) and total > 0:
        metrics["bits_per_byte"] = math.fsum(nats) / math.log(2) / total
    return Score(metrics, "tokens", tuple(nats), tokens_of)


def _windows(evaluation: Text, loaded: Loaded) -> tuple[list[tuple[int, ...]], list[int | None]]:
    """Windows of tokens, none across two texts, and the bytes of text that each of them predicts (None: not known)."""
    windows: list[tuple[int, ...]] = []
    sizes: list[int | None] = []
    limit = evaluation.limit or sys.maxsize
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or evaluation.context
    context = min(evaluation.context, longest)
    for where, row in rows_of(evaluation.files, evaluation.field):
        ids, spans, content = _encoded(evaluation, loaded, row, where)
        for at in range(0, len(ids) - 1, context):
            window = tuple(ids[at : at + context])
            if len(windows) == limit:
                return windows, sizes
            if len(window) > 1:
                windows.append(window)
                sizes.append(_bytes_after_first(content, spans[at : at + len(window)]))
    if not windows:
        raise SourceError("holds no text of two tokens or more", where=", ".join(evaluation.data))
    return windows, sizes


def _bytes_after_first(text: str, spans: Sequence[tuple[int, int]]) -> int | None:
    """Bytes of the text behind all tokens but the first. Special tokens stand for no characters: (0, 0)."""
    if not spans:
        return None
    first = spans[0][1]
    return len(text[first : max(first, *(stop for _, stop in spans))].encode())


def _encoded(
    evaluation: Text, loaded: Loaded, row: Mapping[str, Any], where: str
) -> tuple[list[int], list[tuple[int, int]], str]:
    """Tokens, the characters that each stands for (none where that is not known), and the text."""
    if loaded.tokenizer is None or not loaded.tokenizer.is_fast or "input_ids" in row:
        return ids_of(loaded.tokenizer, row, evaluation.field, where), [], ""
    content = str(field_of(row, evaluation.field, where))
    encoded = loaded.tokenizer(content, verbose=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), list(encoded["offset_mapping"]), content


def classification(evaluation: Classification, loaded: Loaded, say: Say) -> Score:
    """Whether the largest logit is that of the label, for every example."""
    items: list[Item] = []
    labels: list[int] = []
    for where, row in rows_of(evaluation.files):
        if len(items) == (evaluation.limit or sys.maxsize):
            break
        labels.append(_label(loaded, field_of(row, "label", where), where))
        items.append((len(items), tuple(ids_of(loaded.tokenizer, row, "text", where))))
    _some(items, evaluation)
    hits, nats = [0.0] * len(items), [0.0] * len(items)
    for batch, _, logits in _computed(loaded, items, evaluation.batch_size, say):
        wanted = torch.tensor([labels[place] for place, _ in batch], device=logits.device)
        right = (logits.argmax(1) == wanted).tolist()
        losses = _numbers(cross_entropy(logits, wanted, reduction="none"))
        for (place, _), hit, loss in zip(batch, right, losses, strict=True):
            hits[place], nats[place] = float(hit), loss
    return _of_examples(hits, nats, "examples")


def _label(loaded: Loaded, label: Any, where: str) -> int:
    """The number of a label, which may be given by its name. Raises SourceError."""
    known = {str(name): int(number) for name, number in (loaded.model.config.label2id or {}).items()}
    number = label if isinstance(label, int) else known.get(str(label))
    if number is None or not 0 <= number < loaded.model.config.num_labels:
        raise SourceError(f"{label!r} is none of the model's labels {', '.join(known)}", where=where)
    return number


def preferences(evaluation: Preferences, loaded: Loaded, say: Say) -> Score:
    """Whether the chosen answer has the larger reward, for every pair; equal rewards count half.

    `loss` is that of Bradley and Terry, -log sigmoid(chosen - rejected).
    """
    items: list[Item] = []
    for where, row in rows_of(evaluation.files):
        if len(items) == 2 * (evaluation.limit or sys.maxsize):
            break
        for ids in pair_of(loaded.tokenizer, row, where):
            items.append((len(items), tuple(ids)))
    _some(items, evaluation)
    rewards = [0.0] * len(items)
    for batch, _, logits in _computed(loaded, items, evaluation.batch_size, say):
        if logits.shape[1] != 1:
            raise UnsupportedModel(f"has {logits.shape[1]} labels; a reward model has one", where="num_labels")
        for (place, _), reward in zip(batch, logits[:, 0].tolist(), strict=True):
            rewards[place] = reward
    margins = [a - b for a, b in zip(rewards[::2], rewards[1::2], strict=True)]
    if _differentiates(loaded):
        _follow(loaded, items, margins, evaluation)
    nats = (-logsigmoid(torch.tensor(margins, dtype=torch.float64))).tolist()
    return _of_examples([0.5 if m == 0 else float(m > 0) for m in margins], nats, "pairs")


def _follow(loaded: Loaded, items: Sequence[Item], margins: Sequence[float], evaluation: Preferences) -> None:
    """Add the gradients of all pairs to those of the parameters, in a second pass: the two of a pair may be of
    different lengths, and so of different batches.
    """
    slopes = (torch.tensor(margins, dtype=torch.float64).sigmoid() - 1).tolist()
    for batch, _, logits in _computed(loaded, items, evaluation.batch_size, lambda _done, _total: None):
        factors = [slopes[place // 2] * (1 - 2 * (place % 2)) for place, _ in batch]
        _numbers(logits[:, 0] * torch.tensor(factors, dtype=torch.float64, device=logits.device))


def _some(items: Sequence[Item], evaluation: Classification | Preferences) -> None:
    if not items:
        raise SourceError("holds no rows", where=", ".join(evaluation.data))


def _of_examples(hits: Sequence[float], nats: Sequence[float], unit: str) -> Score:
    metrics = {"accuracy": math.fsum(hits) / len(hits), "loss": math.fsum(nats) / len(nats)}
    return Score(metrics, unit, tuple(hits), (1.0,) * len(hits))


def harness(evaluation: Harness, loaded: Loaded, _say: Say) -> Score:
    """What lm-evaluation-harness makes of the model."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise NotInstalled(f"the harness is not installed: {error}", remedy="pip install 'merger[harness]'") from error
    found = simple_evaluate(
        model=HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=evaluation.batch_size),
        tasks=list(evaluation.tasks),
        num_fewshot=evaluation.num_fewshot,
        limit=evaluation.limit,
        task_manager=TaskManager(include_path=evaluation.include_path),
        bootstrap_iters=0,
    )
    metrics = {
        f"{task}/{name.removesuffix(',none')}": float(value)
        for task, row in found["results"].items()
        for name, value in row.items()
        if isinstance(value, int | float) and "stderr" not in name
    }
    if evaluation.by not in metrics:
        raise SourceError(f"{evaluation.by} was not measured; there are {', '.join(metrics)}", where="metric")
    ordered = {evaluation.by: metrics.pop(evaluation.by), **metrics}
    return Score(ordered, "tasks", (ordered[evaluation.by],), (1.0,))


# ---- requests -----------------------------------------------------------------------------------------

_KINDS = {
    "text": "AutoModelForCausalLM",
    "harness": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "preferences": "AutoModelForSequenceClassification",
}


def score(
    checkpoint: Checkpoint,
    evaluation: Measured,
    say: Say = lambda _done, _total: None,
    along: Sequence[Checkpoint] = (),
) -> Score:
    """What an evaluation says of a checkpoint, with the slopes of its loss along others. Raises RequestError."""
    if isinstance(evaluation, Alignment):
        return _compared(checkpoint, along[0], say)
    if isinstance(evaluation, Prompts):
        return _placed(checkpoint, evaluation, say)
    kind = _KINDS[getattr(evaluation, "task")]  # noqa: B009
    _check_memory(checkpoint, 3 if along else 1)
    loaded = load(checkpoint, kind, evaluation.dtype, evaluation.device)
    loaded.model.requires_grad_(bool(along))
    found = _score(evaluation, loaded, say)
    return replace(found, slopes=tuple(_slope(loaded, other, kind, evaluation) / sum(found.sizes) for other in along))


def _compared(checkpoint: Checkpoint, first: Checkpoint, say: Say) -> Score:
    """Which expert of a mixture goes to which place of another's."""
    found = tuple(tuple(order) for order in orders(checkpoint, first, say))
    moved = float(sum(expert != place for order in found for place, expert in enumerate(order)))
    return Score({"moved": moved}, "experts", (moved,), (1.0,), orders=found)


def _placed(checkpoint: Checkpoint, evaluation: Prompts, say: Say) -> Score:
    """The rows of routers that prompts ask for."""
    if evaluation.mode == "cheap_embed":
        rows = from_embeddings(checkpoint, evaluation)
    else:
        _check_memory(checkpoint, 1)
        rows = from_hidden_states(
            load(checkpoint, _KINDS["text"], evaluation.dtype, evaluation.device), evaluation, say
        )
    count = float(rows.shape[1])
    return Score({"rows": count}, "rows", (count,), (1.0,), rows=as_text(rows))


def _score(evaluation: Measured, loaded: Loaded, say: Say) -> Score:
    match evaluation:
        case Text():
            return text(evaluation, loaded, say)
        case Classification():
            return classification(evaluation, loaded, say)
        case Preferences():
            return preferences(evaluation, loaded, say)
        case Harness():
            return harness(evaluation, loaded, say)
    raise TypeError(f"no task of {type(evaluation).__name__}")


def _slope(loaded: Loaded, along: Checkpoint, kind: str, evaluation: Measured) -> float:
    """The sum over all parameters of gradient * value in the other model, in float64."""
    values = dict(load(along, kind, evaluation.dtype, evaluation.device).model.named_parameters())
    with torch.no_grad():
        products = [
            (parameter.grad.double() * values[name].double()).sum().item()
            for name, parameter in loaded.model.named_parameters()
            if parameter.grad is not None
        ]
    return math.fsum(products)


def _check_memory(checkpoint: Checkpoint, models: int) -> None:
    """So many models are in memory in float32, and while one loads it is once more as it is stored.

    Raises NotEnoughMemory.
    """
    needed = models * 4 * parameters(checkpoint) + sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    free = free_memory()
    if needed > free:
        raise NotEnoughMemory(
            f"to measure it takes {needed:,} bytes of memory, {free:,} are free",
            where=checkpoint.label,
            remedy="Measure it on a machine with more.",
        )


_EVALUATION: TypeAdapter[Measured] = TypeAdapter(
    Annotated[Evaluation | Prompts | Alignment, Field(discriminator="task")]
)


def _answers(requests: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in requests:
        request = json.loads(line)
        sources = sources_within(reach_of(request["reach"]))
        try:
            evaluation = _EVALUATION.validate_python(request["evaluation"])
            checkpoint, *along = (_opened(sources, source) for source in (request["source"], *request["along"]))
            found = score(checkpoint, evaluation, _tell, along)
            yield {"score": asdict(found)}
        except MergerError as error:
            told = {"message": error.message, "where": error.where, "remedy": error.remedy}
            yield {"error": {"kind": type(error).__name__, **told}}
        gc.collect()


def _opened(sources: Sources, source: Any) -> Checkpoint:
    return open_source(sources, source if isinstance(source, str) else Method.model_validate(source))


def _tell(done: int, total: int) -> None:
    _send({"done": done, "total": total})


def _send(answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer), file=_ANSWERS, flush=True)


if __name__ == "__main__":
    _ANSWERS, sys.stdout = sys.stdout, sys.stderr  # libraries may print what they like
    for answer in _answers(requests()):
        _send(answer)

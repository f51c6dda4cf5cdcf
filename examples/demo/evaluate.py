"""Measures how well checkpoints predict text: loss per token, perplexity, bits per byte.

Knows checkpoint folders as transformers loads them, and windows of tokens. Knows nothing of how a checkpoint
was made: a step of the training and an average are the same to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

BATCH = 32  # windows


@dataclass(frozen=True)
class HeldOut:
    """Windows of tokens, int64 [windows, context], and the bytes of text behind the predicted."""

    windows: torch.Tensor
    predicted_bytes: int

    @property
    def predicted_tokens(self) -> int:
        return self.windows[:, 1:].numel()


@dataclass(frozen=True)
class Score:
    """Mean loss in nats per predicted token of each window, with what follows from it."""

    losses: torch.Tensor  # float64 [windows]
    bytes_per_token: float

    @property
    def loss(self) -> float:
        return self.losses.mean().item()

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return self.loss / math.log(2) / self.bytes_per_token

    def minus(self, other: Score) -> tuple[float, float]:
        """The difference in loss and its standard error, from the differences window by window."""
        differences = self.losses - other.losses
        return differences.mean().item(), differences.std().item() / math.sqrt(len(differences))


def hold_out(texts: Sequence[str], folder: Path, context: int, count: int) -> HeldOut:
    """`count` windows of `context` tokens, evenly spread over the texts, none across two texts.

    The tokenizer in `folder` must be a byte-level one: each character of its tokens stands for one byte.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(list(texts), verbose=False)["input_ids"]
    every = [ids[at : at + context] for ids in encoded for at in range(0, len(ids) - context + 1, context)]
    if len(every) < count:
        raise ValueError(f"the text has {len(every)} windows of {context} tokens; {count} were asked for")
    windows = [every[i * len(every) // count] for i in range(count)]
    predicted = [token for window in windows for token in window[1:]]
    size = sum(len(token) for token in tokenizer.convert_ids_to_tokens(predicted))
    return HeldOut(torch.tensor(windows), size)


def score(folder: Path, held_out: HeldOut) -> Score:
    """Predicts the windows with the checkpoint in `folder`. Raises ValueError where that is not complete."""
    return score_model(load(folder), held_out)


def score_model(model: torch.nn.Module, held_out: HeldOut) -> Score:
    """Predicts the windows with a model that is ready to predict."""
    with torch.inference_mode():
        losses = torch.cat([_losses(model, batch) for batch in held_out.windows.split(BATCH)])
    return Score(losses, held_out.predicted_bytes / held_out.predicted_tokens)


def load(folder: Path) -> torch.nn.Module:
    """The model in `folder`, ready to predict; every tensor must be there, and none too many."""
    logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    faults = {kind: names for kind, names in info.items() if names}
    if faults:
        raise ValueError(f"{folder} is not a complete checkpoint of its architecture: {faults}")
    return model.eval()  # type: ignore[no-any-return]


def _losses(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Nats per token of each window: each token but the first, given those before it."""
    logits = model(input_ids=windows).logits[:, :-1].double()
    return cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(dim=1)

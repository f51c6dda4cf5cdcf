"""Trains a small Llama on the demo's text and keeps a checkpoint every few steps, as a long run would.

Knows tokenizer, model, optimiser and the run's folder. Knows nothing of averages, nor of the held-out text.
The learning rate stays where it is after a short warm-up, so that the weights keep wandering about the valley
that they follow: the situation that averages of checkpoints are for (LAWA, arXiv 2306.03241).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

END_OF_TEXT = "<|endoftext|>"
STAMP = "demo.json"  # written last: a run folder that has it is complete
PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class Settings:
    """Everything that the checkpoints depend on besides the text."""

    seed: int = 0
    vocabulary: int = 1024
    hidden: int = 192
    intermediate: int = 512
    layers: int = 4
    heads: int = 3
    context: int = 128  # tokens
    batch: int = 8  # sequences
    steps: int = 880
    every: int = 40  # steps between checkpoints
    learning_rate: float = 1e-3  # more makes averages gain more, and every checkpoint worse
    warmup: int = 30  # steps
    weight_decay: float = 0.1
    clip: float = 1.0  # norm of the gradient
    threads: int = 2  # of torch; another number adds in another order


def train(texts: Sequence[str], digest: str, folder: Path, settings: Settings) -> bool:
    """Fills `folder` with checkpoints `step-NNNN`; False where it holds those of this text and settings."""
    stamp = {"text": digest, "torch": torch.__version__, **asdict(settings)}
    if _is_complete(folder, stamp):
        return False
    if folder.exists():
        shutil.rmtree(folder)
    logging.disable_progress_bar()  # one bar a checkpoint
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    tokenizer = learn_tokenizer(texts, settings)
    tokens = tokenize(texts, tokenizer)
    model = build(settings, tokenizer)
    size = f"{model.num_parameters() / 1e6:.1f} M parameters"
    print(f"training {size} for {settings.steps} steps on {len(tokens) / 1e6:.1f} M tokens", flush=True)
    for step in optimise(model, tokens, settings):
        if step % settings.every == 0:
            _save(model, tokenizer, folder / f"step-{step:04d}")
    (folder / STAMP).write_text(json.dumps(stamp, indent=2) + "\n")
    return True


def learn_tokenizer(texts: Sequence[str], settings: Settings) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be written in it, and no character is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=settings.context,
        clean_up_tokenization_spaces=False,
    )


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All texts in one row of token ids, int64 [tokens], each text closed by the end-of-text token."""
    encoded = tokenizer(list(texts), verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (*ids, tokenizer.eos_token_id)])


def build(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with tied embeddings and random weights from torch's global seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def optimise(model: PreTrainedModel, tokens: torch.Tensor, settings: Settings) -> Iterator[int]:
    """Takes the steps, on what may be trained of the model; yields the number of each as soon as it is taken."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1 / settings.warmup, 1.0, settings.warmup - 1)
    progress = _Progress(settings)
    model.train()
    for step, batch in enumerate(_batches(tokens, settings), start=1):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        progress.report(step, loss.item())
        yield step


def _batches(tokens: torch.Tensor, settings: Settings) -> Iterator[torch.Tensor]:
    """`steps` batches [batch, context] of windows at random places, from a generator of their own."""
    generator = torch.Generator().manual_seed(settings.seed)
    windows = tokens.unfold(0, settings.context, 1)
    for _ in range(settings.steps):
        yield windows[torch.randint(len(windows), (settings.batch,), generator=generator)]


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _is_complete(folder: Path, stamp: dict[str, object]) -> bool:
    path = folder / STAMP
    return path.is_file() and json.loads(path.read_text()) == stamp


class _Progress:
    """One line every few seconds, and one at the end."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.begun = self.printed = time.monotonic()

    def report(self, step: int, loss: float) -> None:
        now = time.monotonic()
        if now - self.printed < PROGRESS_SECONDS and step < self.settings.steps:
            return
        self.printed = now
        speed = step * self.settings.batch * self.settings.context / (now - self.begun)
        print(
            f"  step {step:4d} of {self.settings.steps}   loss {loss:.3f}   {speed:6,.0f} tokens/s   "
            f"{now - self.begun:3.0f} s",
            flush=True,
        )

"""Texts in domains: the docstrings of packages that the examples install, each package a domain.

A small language model learns from the docstrings of Python's own library; auxiliary tasks are other packages, the
target is NumPy, and what counts is how well SciPy and scikit-learn are predicted, which nothing was trained on.
"""

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from study import Study
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

AUXILIARY = ("networkx", "matplotlib", "sympy")
VOCABULARY, CONTEXT = 512, 64
LEAST, MOST = 200, 4000  # characters of a docstring that is taken
TRAINING = {
    "task": "text",
    "context": CONTEXT,
    "batch_size": 8,
    "steps": 120,
    "learning_rates": [1e-3, 1.5e-3, 2e-3],
    "dropouts": [0.0, 0.05, 0.1],
}


def study(work: Path) -> Study:
    """The study in its folder; data and the model that it begins with are made where they are missing."""
    if not (work / "random" / "config.json").exists():
        (work / "data").mkdir(parents=True, exist_ok=True)
        _write_all(work / "data")
        _random_model().save_pretrained(work / "random")
        _tokenizer(work / "data" / "base.jsonl").save_pretrained(work / "random")
    pretraining = {"steps": 1200, "batch_size": 16, "learning_rates": [3e-3]}
    evaluation = {"task": "text", "context": CONTEXT, "batch_size": 64}
    return Study("texts", work, AUXILIARY, TRAINING, pretraining, evaluation, "loss", True, 1.0, "nats per token")


def _write_all(folder: Path) -> None:
    """Characters of each domain: little of the target, as fine-tunes have it."""
    base = list(_docstrings(Path(sysconfig.get_path("stdlib")), {"site-packages", "test", "idlelib", "lib2to3"}))
    _write(folder / "base.jsonl", base, 600_000)
    for name in AUXILIARY:
        _write(folder / f"{name}.jsonl", _of(name), 200_000)
    target = _of("numpy")
    _write(folder / "target.jsonl", target[::2], 80_000)
    _write(folder / "validation.jsonl", target[1::2], 30_000)
    unseen = [text for pair in zip(_of("scipy"), _of("sklearn"), strict=False) for text in pair]
    _write(folder / "unseen.jsonl", unseen, 60_000)


def _of(package: str) -> list[str]:
    found = find_spec(package)
    assert found
    assert found.origin
    return list(_docstrings(Path(found.origin).parent, {"tests", "test"}))


def _docstrings(folder: Path, skipped: set[str]) -> Iterator[str]:
    """The longer docstrings of a package, each once, in an order that is by chance but always the same."""
    found = set()
    for path in folder.rglob("*.py"):
        if not skipped & set(path.relative_to(folder).parts):
            found |= set(_docstrings_of(path))
    yield from sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            if LEAST <= len(text) <= MOST:
                yield text


def _write(path: Path, texts: list[str], most: int) -> None:
    """One row with so many characters of texts, one after the other: its windows are all of one length but the last."""
    path.write_text(json.dumps({"text": "\n\n".join(texts)[:most]}))


def _random_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "bos_token_id": None, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens))


def _tokenizer(data: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE, learnt from the base's texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((json.loads(row)["text"] for row in data.read_text().splitlines()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)

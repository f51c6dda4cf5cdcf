"""Handwritten digits as sequences of patches, in domains that look unlike. Knows scikit-learn's bundled digits.

A domain is a way to redraw an image; a task is which images, in which domains, with which labels. A small transformer
learns from plain digits; auxiliary tasks are other questions about digits that look otherwise; the target is digits in
three domains, and what counts is accuracy in two that nothing was trained on with these labels. Every image is used by
one task only, so that nothing that is measured was ever trained on.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import rotate, shift
from sklearn.datasets import load_digits
from study import Study
from transformers import BertConfig, BertForSequenceClassification

Image = NDArray[np.float64]  # 8 x 8, 0 to 16
Domain = Callable[[Image, np.random.Generator], Image]

PATTERNS = 16  # of the four pixels of a patch, each dark or light
LIGHT = 5  # of 16, the least grey that counts as light
DOMAINS: dict[str, Domain] = {
    "plain": lambda image, _: image,
    "left": lambda image, random: rotate(image, random.uniform(15, 35), reshape=False, order=1),
    "right": lambda image, random: rotate(image, random.uniform(-35, -15), reshape=False, order=1),
    "inverted": lambda image, _: 16.0 - image,
    "noisy": lambda image, random: image + random.normal(0, 3.0, image.shape),
    "faint": lambda image, random: image * random.uniform(0.3, 0.5),
    "moved": lambda image, random: shift(image, random.integers(-1, 2, 2), order=0),
}
TARGET, UNSEEN = ("left", "noisy", "faint"), ("right", "moved")
TRAINING = {
    "task": "classification",
    "steps": 150,
    "probe_steps": 40,
    "extra_head_steps": 20,
    "learning_rates": [3e-4, 5e-4, 8e-4],
    "probe_learning_rate": 1e-2,
}


def study(work: Path) -> Study:
    """The study in its folder; data and the model that it begins with are made where they are missing."""
    if not (work / "random" / "config.json").exists():
        (work / "data").mkdir(parents=True, exist_ok=True)
        _write_all(work / "data")
        _random_model().save_pretrained(work / "random")
    pretraining = {"steps": 2500, "probe_steps": 1, "learning_rates": [1e-3], "dropouts": [0.1]}
    evaluation = {"task": "classification", "batch_size": 256}
    return Study(
        *("digits", work, ("parity", "size", "round"), TRAINING, pretraining),
        *(evaluation, "accuracy", False, 100.0, "%"),
    )


def _write_all(folder: Path) -> None:
    tasks: list[tuple[str, slice, Sequence[str], Callable[[int], str], int]] = [
        ("base", slice(0, 500), ["plain", "moved"], str, 6),
        ("parity", slice(500, 700), ["right", "plain"], lambda digit: ("even", "odd")[digit % 2], 1),
        ("size", slice(700, 900), ["moved", "inverted"], lambda digit: ("low", "high")[digit > 4], 1),
        ("round", slice(900, 1100), ["noisy", "moved"], lambda digit: str(digit in (0, 6, 8, 9)), 1),
        ("target", slice(1100, 1250), TARGET, str, 1),
        ("validation", slice(1250, 1400), TARGET, str, 1),
        ("unseen", slice(1400, 1797), UNSEEN, str, 1),
    ]
    for seed, (name, images, domains, label, copies) in enumerate(tasks):
        _write_task(folder / f"{name}.jsonl", images, domains, label, seed, copies)


def _random_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": PATTERNS + 1, "pad_token_id": PATTERNS, "max_position_embeddings": 16}
    return BertForSequenceClassification(BertConfig(**sizes, **tokens, num_labels=10))


def _write_task(
    path: Path, images: slice, domains: Sequence[str], label: Callable[[int], str], seed: int, copies: int = 1
) -> None:
    """A file of rows with `input_ids` (16 patches) and `label`: each image in each domain, `copies` times."""
    digits = load_digits()
    random = np.random.default_rng(seed)
    rows = []
    for image, digit in zip(digits.images[images], digits.target[images], strict=True):
        for domain in list(domains) * copies:
            rows.append(json.dumps({"input_ids": _patches(DOMAINS[domain](image, random)), "label": label(int(digit))}))
    path.write_text("\n".join(rows))


def _patches(image: Image) -> list[int]:
    """The patches of 2 x 2 pixels in their order, each as the number of its pattern."""
    patches = (image >= LIGHT).astype(int).reshape(4, 2, 4, 2).transpose(0, 2, 1, 3).reshape(16, 4)
    return [int(number) for number in patches @ [1, 2, 4, 8]]

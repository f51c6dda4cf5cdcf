"""Handwritten digits as sequences of patches, in domains that look unlike. Knows scikit-learn's bundled digits.

A domain is a way to redraw an image; a task is which images, in which domains, with which labels. Every image is used
by one task only, so that nothing that is measured was ever trained on.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import rotate, shift
from sklearn.datasets import load_digits

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


def write_task(
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

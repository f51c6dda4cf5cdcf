"""Small tensors whose values a recipe holds itself, such as measured rows of a router. Knows not what they mean."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from merger.expression import Fetch, Made
from merger.kernels import Bytes


@final
@dataclass(frozen=True, slots=True)
class Given(Made):
    """Values that are known while it is planned, as bytes of `dtype` in row-major order."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes

    def values(self, start: int, stop: int, fetch: Fetch) -> Bytes:
        return np.frombuffer(self.content, np.uint8)[start * self.itemsize : stop * self.itemsize].copy()

    def rows(self, first: int, last: int) -> "Given":
        """Rows `first` to `last`, along the first axis."""
        row = len(self.content) // self.shape[0]
        return Given(self.dtype, (last - first, *self.shape[1:]), self.content[first * row : last * row])


def given(values: NDArray[np.float32]) -> Given:
    """An array as a tensor."""
    return Given("F32", values.shape, values.astype("<f4").tobytes())


def as_text(values: NDArray[np.float32]) -> str:
    """Numbers in float32 as text (base64 of their bytes), exactly."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def from_text(text: str, shape: Sequence[int]) -> NDArray[np.float32]:
    """The numbers in such a text. Raises ValueError where it holds others than so many."""
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), "<f4").reshape(tuple(shape))
    except binascii.Error as error:
        raise ValueError(f"is not base64: {error}") from error
    if not np.isfinite(values).all():
        raise ValueError("holds numbers that are not finite")
    return values.astype(np.float32)

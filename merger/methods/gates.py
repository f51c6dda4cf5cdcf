"""Rows of the routers of a mixture: measured ones, which the recipe holds as text, or random ones. Measures nothing."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from merger.drawn import noise
from merger.errors import RecipeError
from merger.expression import Expression, Filled, combine
from merger.given import from_text, given
from merger.noise import key_of

Mode = Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"]
MEASURED = ("hidden", "hidden_avg", "hidden_last", "cheap_embed")  # these need prompts

_DEGENERATE = 5.0  # condition number of a router's rows above which mergekit warns (mergekit/moe/router.py)


@dataclass(frozen=True)
class Gates:
    """The rows of all routers, `shape` [layers, rows, d]; `text` holds them once they are measured. Random ones are
    drawn layer by layer: standard normal, or uniform within 1 / sqrt(d), as torch.nn.Linear begins.
    """

    mode: Mode
    seed: int
    shape: tuple[int, int, int]
    text: str | None

    @cached_property
    def measured(self) -> NDArray[np.float32] | None:
        """What the recipe holds. Raises RecipeError where that is not as many numbers as there must be."""
        if self.text is None or self.mode not in MEASURED:
            return None
        try:
            return from_text(self.text, self.shape)
        except ValueError as error:
            raise RecipeError(str(error), where="gates", remedy="Leave it out: the run measures them.") from error

    def rows(self, layer: int, name: str, first: int, last: int) -> Expression:
        """Rows `first` to `last` of a layer's router; random ones follow from `name`, zeros stand for what is not
        measured yet.
        """
        shape = (last - first, self.shape[2])
        if self.mode not in MEASURED:
            kind: Literal["normal", "uniform"] = "normal" if self.mode == "random" else "uniform"
            scale = 1.0 if kind == "normal" else 1 / math.sqrt(shape[1])
            return combine([(scale, noise(shape, key_of(self.seed, f"{name}router"), kind))], "F32")
        return Filled("F32", shape) if self.measured is None else given(self.measured[layer, first:last])

    def degenerate(self) -> list[int]:
        """The layers whose measured rows are nearly dependent."""
        if self.measured is None or self.shape[1] < 2:
            return []
        conditions = [float(np.linalg.cond(rows.astype(np.float64))) for rows in self.measured]
        return [layer for layer, condition in enumerate(conditions) if not condition <= _DEGENERATE]

"""The proof of surgery: that the result computes what the model computed that it was made from.

Knows which models to compare and what was claimed; the comparison itself runs in a process of its own
(`merger.logits`). Models that fit into memory are compared whole. Of larger ones a few layers are, with the embeddings
and the head around them, cut out of both with the methods of `merger.methods.depth`.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from merger.budget import allot
from merger.checkpoint import Checkpoint, Origin, root_of
from merger.engine import write_shards
from merger.errors import MergerError
from merger.expression import Stored
from merger.host import free_memory
from merger.methods.depth import Block, rebuilt
from merger.plan import Plan, index_of, make_plan
from merger.sizes import active, parameters
from merger.unpublished import link_weights, written
from merger.verify import Check

Mode = Literal["auto", "full", "layers", "off"]

_FILE_SIZE = 5 * 10**9  # bytes
_MEMORY = 256 << 20  # bytes: for the engine that writes samples


@dataclass(frozen=True)
class Parity:
    """What the comparison came to. `layers` are those of the result that were compared, None for all."""

    origin: Origin
    layers: tuple[int, ...] | None
    largest_difference: float
    largest_logit: float
    tokens: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    parameters: tuple[int, int]
    active: tuple[int, int]

    @property
    def holds(self) -> bool:
        """Whether every tensor found its place and the logits are as close as was claimed."""
        allowed = {"equal": 0.0, "close": self.origin.tolerance * self.largest_logit, "none": float("inf")}
        return not self.missing and not self.unexpected and self.largest_difference <= allowed[self.origin.claim]

    def check(self) -> Check:
        """As a line of the report."""
        return Check("parity", self.holds, "; ".join([self._outcome(), self.origin.says, self._sizes()]))

    def _outcome(self) -> str:
        odd = [f"{len(names)} {kind} tensors, {names[0]} first" for kind, names in self._odd() if names]
        if odd:
            return ", ".join(odd)
        where = "" if self.layers is None else f" of layers {', '.join(map(str, self.layers))}"
        if self.largest_difference == 0:
            return f"logits{where} equal bit for bit (float32, {self.tokens} tokens)"
        return (
            f"logits{where} differ by up to {self.largest_difference:.2g} of {self.largest_logit:.3g} "
            f"(float32, {self.tokens} tokens)"
        )

    def _odd(self) -> list[tuple[str, tuple[str, ...]]]:
        return [("missing", self.missing), ("unexpected", self.unexpected)]

    def _sizes(self) -> str:
        return (
            f"parameters {self.parameters[0]:,} -> {self.parameters[1]:,}, "
            f"active {self.active[0]:,} -> {self.active[1]:,}"
        )


def parity_check(plan: Plan, folder: Path, mode: Mode = "auto", work: Path | None = None) -> Check | None:
    """Compare a written result with the model that it was made from; None where no surgery was done or none is asked.

    `folder` holds the shards, `work` (a temporary folder without) takes what has to be written for the comparison.
    """
    origin = root_of(plan.checkpoint)
    if origin is None or mode == "off":
        return None
    if find_spec("torch") is None or find_spec("transformers") is None:
        return Check("parity", True, f"not compared: torch is not installed; {origin.says}")
    try:
        return compared(plan, folder, origin, mode, work).check()
    except _NotComparable as error:
        return Check("parity", origin.claim == "none", f"could not be compared: {error}")


class _NotComparable(Exception):
    """The comparison itself failed."""


def compared(plan: Plan, folder: Path, origin: Origin, mode: Mode, work: Path | None) -> Parity:
    """Raises _NotComparable where a model does not load or run."""
    result = written(plan, folder)
    models = [origin.checkpoint, result]
    layers = None if mode == "full" or (mode == "auto" and _fits(models)) else sample(origin.layers)
    if layers is not None:
        kept = [layer for layer in (origin.layers[i] for i in layers) if layer is not None]
        models = [_cut(origin.checkpoint, kept), _cut(result, layers)]
    with tempfile.TemporaryDirectory(dir=work) as place:
        whole = layers is None
        a, b = (_on_disk(model, Path(place) / name, whole=whole) for model, name in zip(models, "ab", strict=True))
        found = _run(a, b)
    return Parity(
        origin=origin,
        layers=layers,
        largest_difference=found["largest_difference"],
        largest_logit=found["largest_logit"],
        tokens=found["tokens"],
        missing=tuple(found["missing"]),
        unexpected=tuple(found["unexpected"]),
        parameters=(parameters(origin.checkpoint), parameters(plan.checkpoint)),
        active=(active(origin.checkpoint), active(plan.checkpoint)),
    )


def _fits(models: list[Checkpoint]) -> bool:
    """Whether the larger one, in float32 and once more while it loads, takes less than half of the free memory."""
    return 2 * 4 * max(parameters(model) for model in models) < free_memory() // 2


def sample(layers: tuple[int | None, ...]) -> tuple[int, ...]:
    """A few layers of the result: the first, the middle and the last that stand for one of the origin, and the first
    that adds nothing.
    """
    kept = [i for i, layer in enumerate(layers) if layer is not None]
    new = [i for i, layer in enumerate(layers) if layer is None]
    return tuple(sorted({kept[0], kept[len(kept) // 2], kept[-1], *new[:1]}))


def _cut(model: Checkpoint, layers: tuple[int, ...] | list[int]) -> Checkpoint:
    return replace(rebuilt(model, [Block(layer) for layer in layers], "drop"), origin=None)


# ---- models on disk -----------------------------------------------------------------------------------


def _on_disk(model: Checkpoint, place: Path, *, whole: bool) -> Path:
    """A folder that transformers can load: links where the `whole` model is stored as it is, else files made for it."""
    place.mkdir()
    plan = make_plan(replace(model, optimizer={}), {"method": "parity"}, _FILE_SIZE)
    stored = [tensor for tensor in model.tensors.values() if isinstance(tensor, Stored)]
    if whole and len(stored) == len(model.tensors):
        link_weights(model, place)
    else:
        (place / ".merger").mkdir()
        write_shards(plan.shards, place, allot(plan, _MEMORY), plan.fingerprint)
        (place / "model.safetensors.index.json").write_text(json.dumps(index_of(plan)))
    (place / "config.json").write_text(json.dumps(dict(model.config or {})))
    return place


def _run(first: Path, second: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "merger.logits", str(first), str(second)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise _NotComparable((done.stderr.strip().splitlines() or ["no message"])[-1])
        found: dict[str, Any] = json.loads(done.stdout)
    except (OSError, ValueError, MergerError) as error:
        raise _NotComparable(str(error)) from error
    return found

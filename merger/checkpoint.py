"""A checkpoint: names to expressions, known before any value is read. Knows what a model is made of; reads no weights.

A checkpoint that lies in a folder and one that a method has made are the same thing: the tensors of the
first are `Stored`, those of the second are computed from stored ones.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from merger.architecture import (
    kept_in_float32,
    quantization_of,
    ties_embeddings,
    with_dtype,
    with_quantization_of,
    with_ties,
)
from merger.dtypes import DTYPES, TORCH_NAMES
from merger.errors import SourceError
from merger.expression import Expression, File, Identical, Stored, cast
from merger.lineage import Card, Parent, read_card, texts_of
from merger.storage.folder import ADAPTER, MAX_TEXT, ModelFolder, is_legal, open_folder
from merger.storage.place import WeightFile


@dataclass(frozen=True)
class Source:
    """A stored model that takes part: what the recipe called it, where it is, and the files that are read. One from the
    Hub has its `repository` (`org/name`) and the commit that was read (`revision`).
    """

    reference: str
    step: int | None
    files: tuple[File, ...]
    optimizer: Mapping[str, Expression] = field(default_factory=dict, compare=False)  # from optimizer.safetensors
    repository: str = ""
    revision: str = ""
    gated: bool = field(default=False, compare=False)
    has_code: bool = field(default=False, compare=False)  # that its config asks to be run
    card: Card = field(default=Card(), compare=False)
    license_files: Mapping[str, Path] = field(default_factory=dict, compare=False)
    observed: "tuple[Observed, ...]" = field(default=(), compare=False)

    @property
    def is_adapter(self) -> bool:
        """Whether it is no model, but changes to one."""
        return any(file.path.name == ADAPTER for file in self.files)


@dataclass(frozen=True)
class Observed:
    """Statistics of a stored model that the result follows from: what the recipe called them, their files, the `model`
    as it lies there, and the digest (`merger.identity`) of the model that they were made of.
    """

    reference: str
    files: tuple[File, ...]
    model: "Checkpoint"
    digest: str


@dataclass(frozen=True)
class Part:
    """A source and the weight with which it enters the result."""

    source: Source
    weight: float


Claim = Literal["equal", "close", "none"]
# How far apart `close` logits may be, as a share of the largest. Rounding in float32 makes 1e-6 of a few layers and
# more of many; the smallest mistake in surgery that was seen (another epsilon in norms) makes 3e-3.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Origin:
    """The model that surgery began with, and what is claimed of the result's logits: that they are `equal` to its bit
    for bit, `close` (to rounding), or neither (`none`), and why. `layers` holds for each layer of the result the
    origin's layer that it stands for, None for one that adds nothing.
    """

    checkpoint: "Checkpoint"
    claim: Claim
    reason: str
    layers: tuple[int | None, ...]
    tolerance: float = TOLERANCE

    @property
    def says(self) -> str:
        """The claim and its reason for people."""
        claims = {"equal": "exact by construction", "close": "exact but for rounding", "none": "not the same function"}
        return f"{claims[self.claim]}: {self.reason}"


@dataclass(frozen=True)
class Kin:
    """Models that were added because they stem from one, the `base` where the recipe names it. What only their values
    tell of that is looked up before data moves (`merger.preflight`).
    """

    models: tuple["Checkpoint", ...]
    base: "Checkpoint | None" = None


@dataclass(frozen=True)
class Checkpoint:
    """A model as expressions. `parts` says which stored models it is made of; `notes` are for the person
    who asked, `warnings` too, and are refused under --strict. `label` is what a person calls it.

    Surgery adds its `origin`, the moments of an optimizer under the names `exp_avg.NAME` and `exp_avg_sq.NAME`, files
    of its own (`texts`, name to content) and paragraphs for the model card. `same` are tensors, by name, that must hold
    the same bytes in several sources though they are not written. `digests` are of what beside recipe and weights the
    tensors follow from, such as tokenizers.
    """

    tensors: Mapping[str, Expression]
    config: Mapping[str, Any] | None
    side_files: Mapping[str, Path]
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    label: str = ""
    origin: Origin | None = None
    optimizer: Mapping[str, Expression] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    paragraphs: tuple[str, ...] = ()
    kin: tuple[Kin, ...] = ()
    same: tuple[tuple[str, Identical], ...] = ()
    digests: tuple[str, ...] = ()

    @property
    def is_adapter(self) -> bool:
        """Whether it is changes to a model that is elsewhere (its config that of PEFT), not a model."""
        return "peft_type" in (self.config or {})

    def noting(self, note: str) -> "Checkpoint":
        """The same checkpoint with one more note."""
        return replace(self, notes=(*self.notes, note))

    def named(self, label: str) -> "Checkpoint":
        """The same checkpoint under another name."""
        return replace(self, label=label)

    def with_side_files_of(self, giver: "Checkpoint") -> "Checkpoint":
        """The same tensors with another model's config, tokenizer and other side files; ties and quantization stay as
        they are here.

        An adapter and a model give each other their side files, not their configs.
        """
        if self.is_adapter != giver.is_adapter:
            return replace(self, side_files=giver.side_files)
        config = giver.config
        if config and ties_embeddings(config) != ties_embeddings(self.config):
            config = with_ties(config, ties_embeddings(self.config))
        if config and (quantization_of(config) or quantization_of(self.config)):
            config = with_quantization_of(config, self.config)
        return replace(self, config=config, side_files=giver.side_files)


def parents_of(checkpoint: Checkpoint) -> tuple[Parent, ...]:
    """The stored models that a checkpoint is made of, each once, with the sum of its weights."""
    weights: dict[Source, float] = {}
    for part in checkpoint.parts:
        weights[part.source] = weights.get(part.source, 0.0) + part.weight
    return tuple(
        Parent(source.reference, source.repository or None, source.revision or None, source.gated, source.card, weight)
        for source, weight in weights.items()
    )


def with_license_files(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with the licences of all of its sources among its side files. Raises SourceError."""
    given = {name: path for name, path in checkpoint.side_files.items() if is_legal(name)}
    sources = dict.fromkeys(part.source for part in checkpoint.parts)
    texts = [(source.repository or Path(source.reference).name, source.license_files) for source in sources]
    found = texts_of(given, texts, _read_text)
    return replace(checkpoint, side_files={**checkpoint.side_files, **found}) if found else checkpoint


def without_code(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint, none of whose files asks that code of its own be run (`auto_map`). Raises SourceError."""
    config = {key: value for key, value in (checkpoint.config or {}).items() if key != "auto_map"}
    given = {name: _read_text(path, None).decode(errors="replace") for name, path in _settings_of(checkpoint).items()}
    asking = {name: text for name, text in {**given, **checkpoint.texts}.items() if '"auto_map"' in text}
    texts = {name: _without(text, "auto_map") for name, text in asking.items() if name.endswith(".json")}
    return replace(
        checkpoint,
        config=config if checkpoint.config is not None else None,
        texts={**checkpoint.texts, **texts},
    )


def _settings_of(checkpoint: Checkpoint) -> Mapping[str, Path]:
    """The side files that say which classes of a library to use."""
    return {name: path for name, path in checkpoint.side_files.items() if name.endswith("_config.json")}


def _without(text: str, key: str) -> str:
    try:
        content = json.loads(text)
    except ValueError:
        return text
    kept = {name: value for name, value in content.items() if name != key} if isinstance(content, dict) else content
    return json.dumps(kept, indent=2, ensure_ascii=False) + "\n"


def _read_text(path: Path, limit: int | None = MAX_TEXT) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(limit)
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", where=str(path)) from error


def root_of(checkpoint: Checkpoint) -> Origin | None:
    """The model that a chain of surgeries began with, with the weakest of their claims."""
    origin = checkpoint.origin
    if origin is None:
        return None
    inner = root_of(origin.checkpoint)
    if inner is None:
        return origin
    strength = ("none", "close", "equal")
    claim = min(origin.claim, inner.claim, key=strength.index)
    layers = tuple(None if layer is None else inner.layers[layer] for layer in origin.layers)
    tolerance = max(origin.tolerance, inner.tolerance)
    return Origin(inner.checkpoint, claim, f"{inner.reason}; {origin.reason}", layers, tolerance)


def in_dtype(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """The checkpoint with its floating tensors in another dtype, but for those that models keep in float32, and for
    copies of what is not made here (an adapter's of its base).
    """
    tensors = {
        name: tensor
        if not DTYPES[tensor.dtype].is_float
        or isinstance(tensor, Identical)
        or (tensor.dtype == "F32" and kept_in_float32(name, checkpoint.config))
        else cast(tensor, dtype)
        for name, tensor in checkpoint.tensors.items()
    }
    config = checkpoint.config
    if config and not checkpoint.is_adapter:
        config = with_dtype(config, TORCH_NAMES[dtype])
    origin = checkpoint.origin
    if origin:  # what is claimed is claimed of both in one dtype
        origin = replace(origin, checkpoint=in_dtype(origin.checkpoint, dtype))
    return replace(checkpoint, tensors=tensors, config=config, origin=origin)


def open_checkpoint(folder: Path, reference: str | None = None) -> Checkpoint:
    """The checkpoint in a local folder (or one .safetensors file); reads headers, config and names only.

    Raises SourceError, FormatError or PickledWeights.
    """
    return checkpoint_of(open_folder(folder), reference or str(folder), step_of(folder))


def checkpoint_of(
    model: ModelFolder,
    reference: str,
    step: int | None,
    *,
    repository: str = "",
    revision: str = "",
    gated: bool = False,
) -> Checkpoint:
    """The checkpoint that a model's headers describe; one on the Hub has a repository and the commit that was read."""
    tensors: dict[str, Expression] = {}
    files = []
    for weights in model.files:
        file, stored = _stored(weights)
        files.append(file)
        tensors |= stored
    optimizer = _stored(model.optimizer)[1] if model.optimizer else {}
    source = Source(
        reference,
        step,
        tuple(files),
        optimizer,
        repository,
        revision,
        gated,
        "auto_map" in (model.config or {}),
        card=read_card(model.card_text),
        license_files=model.license_files,
    )
    return Checkpoint(tensors, model.config, model.side_files, (Part(source, 1.0),), _notes(model), label=reference)


def _stored(weights: WeightFile) -> tuple[File, dict[str, Expression]]:
    header = weights.header
    file = File(weights.path, header.file_size, weights.mtime_ns, header.sha256)
    return file, {name: Stored(t.dtype, t.shape, file, t.start) for name, t in header.tensors.items()}


def _notes(model: ModelFolder) -> tuple[str, ...]:
    notes, name = [], Path(model.label).name
    if model.training_state:
        notes.append(f"training state is left alone: {', '.join(model.training_state)} in {name}")
    code = (model.config or {}).get("auto_map")
    if isinstance(code, dict) and any("--" not in str(value) for value in code.values()):
        notes.append(f"{name} needs code of its own (auto_map), which is not carried along")
    return tuple(notes)


def step_of(folder: Path) -> int | None:
    """The training step of a checkpoint: the last number in the folder's name, else the trainer's `global_step`."""
    numbers = re.findall(r"\d+", folder.stem if folder.suffix == ".safetensors" else folder.name)
    if numbers:
        return int(numbers[-1])
    try:
        step = json.loads((folder / "trainer_state.json").read_text())["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if type(step) is int else None

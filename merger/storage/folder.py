"""A model or an adapter in a local folder: which files hold its tensors, its config, what lies beside them.

Reads headers, no weights.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merger.errors import FormatError, PickledWeights, SourceError
from merger.storage.safetensors import Header, read_header

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
LEGAL = ("LICENSE*", "NOTICE*", "USE_POLICY*")
# What travels with a model. Never code, never what belongs to the training (optimizer, scheduler, trainer).
SIDE_FILES = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "vocab.txt",
    "merges.txt",
    *LEGAL,
)
CONFIG = "config.json"
# An adapter as PEFT writes one: small changes to a model that is elsewhere.
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
NOT_SIDE_FILES = (
    CONFIG,
    ADAPTER_CONFIG,  # beside a whole model transformers would load the adapter on top of it
    "*.index.json",
    "trainer_state.json",
    "merger.json",
    "stage.json",
    "*.py",
)
TRAINING_STATE = (
    "optimizer*",
    "scheduler.pt",
    "rng_state*",
    "global_step*",
    "training_args.bin",
    "scaler.pt",
)
OPTIMIZER = "optimizer.safetensors"
MAX_SIDE_FILE = 256 << 20  # bytes
MAX_TEXT = 1 << 20  # bytes of a card or of a licence's text
CARD = "README.md"


@dataclass(frozen=True)
class WeightFile:
    """One file of tensors, as it was when its header was read."""

    path: Path
    mtime_ns: int
    header: Header


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk: its weight files in the order of their names, its config (None where there is none), side
    files.
    """

    path: Path
    files: tuple[WeightFile, ...]
    config: Mapping[str, Any] | None
    side_files: Mapping[str, Path]
    training_state: tuple[str, ...]  # names of files that belong to the training and are left alone
    optimizer: WeightFile | None = None  # moments that can be carried along
    card_text: str = ""  # its README.md

    @property
    def license_files(self) -> dict[str, Path]:
        """Those of the side files that say on which terms the model may be used."""
        legal = {name: path for name, path in self.side_files.items() if is_legal(name)}
        return {name: path for name, path in legal.items() if path.stat().st_size <= MAX_TEXT}


def open_folder(path: Path) -> ModelFolder:
    """Read the headers of the model at `path`, a folder or one safetensors file.

    Raises SourceError, FormatError or PickledWeights with the file at fault.
    """
    if path.is_file():
        if any(path.match(pattern) for pattern in PICKLES):
            raise PickledWeights("is a pickle, which merger does not read", where=str(path))
        return ModelFolder(path, (_weight_file(path),), None, {}, ())
    if not path.is_dir():
        raise SourceError(
            "is not there", where=str(path), remedy="Give the folder of a model, or one .safetensors file."
        )
    index = _index_of(path)
    weight_map = _weight_map(index) if index else None
    names = sorted(set(weight_map.values())) if weight_map else [_only_weights(path)]
    files = tuple(_weight_file(path / name) for name in names)
    _check_unique(files)
    if index and weight_map:
        _check_index(index, weight_map, files)
    optimizer = _weight_file(path / OPTIMIZER) if (path / OPTIMIZER).is_file() else None
    config = _adapter_config(path) if names == [ADAPTER] else read_config(path)
    return ModelFolder(path, files, config, _side_files(path), _training_state(path), optimizer, _card_text(path))


def _weight_file(path: Path) -> WeightFile:
    return WeightFile(path, _stat(path).st_mtime_ns, read_header(path))


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _index_of(folder: Path) -> Path | None:
    """The index of the weight files, or None where one file holds all. Raises SourceError where there are two sets."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    whole = folder / "model.safetensors"
    if len(indexes) > 1 or (indexes and whole.exists()):
        found = ", ".join(path.name for path in [*indexes, whole] if path.exists())
        remedy = "Remove the stale one."
        raise SourceError(f"holds more than one set of weights: {found}", where=str(folder), remedy=remedy)
    return indexes[0] if indexes else None


def _only_weights(folder: Path) -> str:
    """The name of the file that holds all weights."""
    singles = sorted(path.name for path in folder.glob("*.safetensors") if path.name != OPTIMIZER)
    if "model.safetensors" in singles:
        return "model.safetensors"
    if len(singles) == 1:
        return singles[0]
    if singles:
        raise SourceError(
            f"holds {len(singles)} safetensors files and no index that says which belong together",
            where=str(folder),
            remedy="Restore model.safetensors.index.json, or name one file.",
        )
    pickles = sorted({path.name for pattern in PICKLES for path in folder.glob(pattern)} - {*_training_state(folder)})
    if pickles == ["adapter_model.bin"]:
        remedy = "Load it with PEFT where you trust it, and save it with save_pretrained: that writes safetensors."
        raise PickledWeights("is a pickle, which merger does not read", where=str(folder / pickles[0]), remedy=remedy)
    if pickles:
        raise PickledWeights(
            f"has its weights in pickles ({pickles[0]}), which merger does not read", where=str(folder)
        )
    raise SourceError(
        "holds no safetensors weights", where=str(folder), remedy="Give the folder that has model.safetensors."
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor to file, every file a plain name in the same folder."""
    weight_map = read_json(index).get("weight_map")
    if type(weight_map) is not dict or not weight_map or not all(type(name) is str for name in weight_map.values()):
        raise FormatError("has no `weight_map` from tensors to files", where=str(index))
    for name in sorted(set(weight_map.values())):
        if not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
            raise FormatError(f"names {name!r}, which is not a safetensors file in the same folder", where=str(index))
        if not (index.parent / name).is_file():
            remedy = "Download that file too."
            raise FormatError(f"names {name}, which is not in the folder", where=str(index), remedy=remedy)
    return weight_map


def _check_index(index: Path, weight_map: Mapping[str, str], files: tuple[WeightFile, ...]) -> None:
    """See that the index and the headers tell the same of every tensor."""
    found = {name: file.path.name for file in files for name in file.header.tensors}
    if weight_map != found:
        tensor = min(name for name in weight_map.keys() | found.keys() if weight_map.get(name) != found.get(name))
        listed, real = weight_map.get(tensor, "no file"), found.get(tensor, "no file")
        raise FormatError(f"says that tensor {tensor!r} is in {listed}, it is in {real}", where=str(index))


def _check_unique(files: tuple[WeightFile, ...]) -> None:
    seen: dict[str, Path] = {}
    for file in files:
        for name in file.header.tensors:
            if name in seen:
                raise FormatError(f"tensor {name!r} is also in {seen[name].name}", where=str(file.path))
            seen[name] = file.path


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises FormatError where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"is not readable JSON: {error}", where=str(path)) from error
    if type(value) is not dict:
        raise FormatError("is not a JSON object", where=str(path))
    return value


def read_config(folder: Path) -> dict[str, Any] | None:
    """The model's config.json, or None where there is none."""
    path = folder / CONFIG
    return read_json(path) if path.is_file() else None


def _adapter_config(folder: Path) -> dict[str, Any]:
    """What says how the tensors of an adapter change a model: without it they mean nothing."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        remedy = f"Restore {ADAPTER_CONFIG}: rank and scale stand there."
        raise SourceError(f"holds {ADAPTER} and no {ADAPTER_CONFIG}", where=str(folder), remedy=remedy)
    return read_json(path)


def _side_files(folder: Path) -> dict[str, Path]:
    taken = {path.name: path for pattern in SIDE_FILES for path in folder.glob(pattern) if path.is_file()}
    names = sorted(name for name, path in taken.items() if not any(path.match(pattern) for pattern in NOT_SIDE_FILES))
    return {name: taken[name] for name in names if taken[name].stat().st_size <= MAX_SIDE_FILE}


def is_legal(name: str) -> bool:
    """Whether a side file says on which terms a model may be used."""
    return any(Path(name).match(pattern) for pattern in LEGAL)


def _card_text(folder: Path) -> str:
    """The model card, which strangers may have written: nothing where it is none, or too long."""
    path = folder / CARD
    try:
        text = path.read_bytes() if path.is_file() and path.stat().st_size <= MAX_TEXT else b""
    except OSError:
        return ""
    return text.decode(errors="replace")


def _training_state(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for pattern in TRAINING_STATE for path in folder.glob(pattern)))

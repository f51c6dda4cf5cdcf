"""A model or an adapter in a folder, here or elsewhere: which files hold its tensors, what lies beside them.

Reads configs and headers, no weights.
"""

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from merger.errors import FormatError, PickledWeights, SourceError
from merger.storage.place import LocalFolder, Place, WeightFile, local_weights

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
_JOURNEYS = 8  # files elsewhere whose headers are read at once
MAX_TEXT = 1 << 20  # bytes of a card or of a licence's text
CARD = "README.md"


@dataclass(frozen=True)
class ModelFolder:
    """A model in a folder: its weight files in the order of their names, its config (None where there is none), side
    files.
    """

    label: str
    files: tuple[WeightFile, ...]
    config: Mapping[str, Any] | None
    side_files: Mapping[str, Path]
    training_state: tuple[str, ...]  # names of files that belong to the training and are left alone
    optimizer: WeightFile | None = None  # moments that can be carried along
    card_text: str = ""  # its README.md
    license_files: Mapping[str, Path] = field(default_factory=dict)  # what says on which terms it may be used


def open_folder(path: Path) -> ModelFolder:
    """Read the headers of the model at `path`, a folder or one safetensors file.

    Raises SourceError, FormatError or PickledWeights with the file at fault.
    """
    if path.is_file():
        if any(path.match(pattern) for pattern in PICKLES):
            raise PickledWeights("is a pickle, which merger does not read", where=str(path))
        return ModelFolder(str(path), (local_weights(path),), None, {}, ())
    if not path.is_dir():
        raise SourceError(
            "is not there", where=str(path), remedy="Give the folder of a model, or one .safetensors file."
        )
    return open_place(LocalFolder(path))


def open_place(place: Place) -> ModelFolder:
    """Read the headers of the model in a folder, here or elsewhere. Raises as `open_folder`."""
    index = _index_of(place)
    weight_map = _weight_map(place, index) if index else None
    names = sorted(set(weight_map.values())) if weight_map else [_only_weights(place)]
    files = weights_of(place, names)
    _check_unique(files)
    if index and weight_map:
        _check_index(place.where(index), weight_map, files)
    optimizer = place.weights(OPTIMIZER) if place.has(OPTIMIZER) else None
    config = _adapter_config(place) if names == [ADAPTER] else _config(place)
    return ModelFolder(
        str(place), files, config, _side_files(place), _training_state(place), optimizer, *declared(place)
    )


def weights_of(place: Place, names: Sequence[str]) -> tuple[WeightFile, ...]:
    """The weight files of these names, several at once: elsewhere each costs a journey."""
    if isinstance(place, LocalFolder):
        return tuple(place.weights(name) for name in names)
    with ThreadPoolExecutor(_JOURNEYS) as pool:
        return tuple(pool.map(place.weights, names))


def _index_of(place: Place) -> str | None:
    """The index of the weight files, or None where one file holds all. Raises SourceError where there are two sets."""
    indexes = list(place.matches("*.safetensors.index.json"))
    whole = ["model.safetensors"] if place.has("model.safetensors") else []
    if len(indexes) > 1 or (indexes and whole):
        found = ", ".join([*indexes, *whole])
        remedy = "Remove the stale one."
        raise SourceError(f"holds more than one set of weights: {found}", where=str(place), remedy=remedy)
    return indexes[0] if indexes else None


def _only_weights(place: Place) -> str:
    """The name of the file that holds all weights."""
    singles = [name for name in place.matches("*.safetensors") if name != OPTIMIZER]
    if "model.safetensors" in singles:
        return "model.safetensors"
    if len(singles) == 1:
        return singles[0]
    if singles:
        raise SourceError(
            f"holds {len(singles)} safetensors files and no index that says which belong together",
            where=str(place),
            remedy="Restore model.safetensors.index.json, or name one file.",
        )
    pickles = sorted({name for pattern in PICKLES for name in place.matches(pattern)} - {*_training_state(place)})
    if pickles == ["adapter_model.bin"]:
        remedy = "Load it with PEFT where you trust it, and save it with save_pretrained: that writes safetensors."
        where = place.where(pickles[0])
        raise PickledWeights("is a pickle, which merger does not read", where=where, remedy=remedy)
    if pickles:
        raise PickledWeights(f"has its weights in pickles ({pickles[0]}), which merger does not read", where=str(place))
    raise SourceError(
        "holds no safetensors weights", where=str(place), remedy="Give the folder that has model.safetensors."
    )


def _weight_map(place: Place, index: str) -> dict[str, str]:
    """Tensor to file, every file a plain name in the same folder."""
    where = place.where(index)
    weight_map = read_json(place.path(index), where).get("weight_map")
    if type(weight_map) is not dict or not weight_map or not all(type(name) is str for name in weight_map.values()):
        raise FormatError("has no `weight_map` from tensors to files", where=where)
    for name in sorted(set(weight_map.values())):
        if not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
            raise FormatError(f"names {name!r}, which is not a safetensors file in the same folder", where=where)
        if not place.has(name):
            remedy = "Download that file too."
            raise FormatError(f"names {name}, which is not in the folder", where=where, remedy=remedy)
    return weight_map


def _check_index(index: str, weight_map: Mapping[str, str], files: tuple[WeightFile, ...]) -> None:
    """See that the index and the headers tell the same of every tensor."""
    found = {name: file.path.name for file in files for name in file.header.tensors}
    if weight_map != found:
        tensor = min(name for name in weight_map.keys() | found.keys() if weight_map.get(name) != found.get(name))
        listed, real = weight_map.get(tensor, "no file"), found.get(tensor, "no file")
        raise FormatError(f"says that tensor {tensor!r} is in {listed}, it is in {real}", where=index)


def _check_unique(files: tuple[WeightFile, ...]) -> None:
    seen: dict[str, str] = {}
    for file in files:
        for name in file.header.tensors:
            if name in seen:
                raise FormatError(f"tensor {name!r} is also in {seen[name]}", where=str(file.path))
            seen[name] = file.path.name


def read_json(path: Path, where: str = "") -> dict[str, Any]:
    """The JSON object in a file, which messages call `where`. Raises FormatError where it is none."""
    where = where or str(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"is not readable JSON: {error}", where=where) from error
    if type(value) is not dict:
        raise FormatError("is not a JSON object", where=where)
    return value


def _config(place: Place) -> dict[str, Any] | None:
    return read_json(place.path(CONFIG), place.where(CONFIG)) if place.has(CONFIG) else None


def _adapter_config(place: Place) -> dict[str, Any]:
    """What says how the tensors of an adapter change a model: without it they mean nothing."""
    if not place.has(ADAPTER_CONFIG):
        remedy = f"Restore {ADAPTER_CONFIG}: rank and scale stand there."
        raise SourceError(f"holds {ADAPTER} and no {ADAPTER_CONFIG}", where=str(place), remedy=remedy)
    return read_json(place.path(ADAPTER_CONFIG), place.where(ADAPTER_CONFIG))


def _side_files(place: Place, patterns: Sequence[str] = SIDE_FILES) -> dict[str, Path]:
    taken = {name for pattern in patterns for name in place.matches(pattern) if place.has(name)}
    names = sorted(name for name in taken if not any(fnmatchcase(name, pattern) for pattern in NOT_SIDE_FILES))
    return {name: place.path(name) for name in names if (place.size(name) or 0) <= MAX_SIDE_FILE}


def is_legal(name: str) -> bool:
    """Whether a side file says on which terms a model may be used."""
    return any(fnmatchcase(name, pattern) for pattern in LEGAL)


def declared(place: Place) -> tuple[str, dict[str, Path]]:
    """The text of a folder's model card, which strangers may have written, and its files on the terms of use."""
    found = {name: path for name, path in _side_files(place, LEGAL).items() if (place.size(name) or 0) <= MAX_TEXT}
    if not place.has(CARD) or (place.size(CARD) or 0) > MAX_TEXT:
        return "", found
    try:
        return place.path(CARD).read_bytes().decode(errors="replace"), found
    except OSError:
        return "", found


def _training_state(place: Place) -> tuple[str, ...]:
    return tuple(sorted(name for pattern in TRAINING_STATE for name in place.matches(pattern)))

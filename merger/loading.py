"""A lazy checkpoint as a model of transformers, made in memory. Knows transformers; knows nothing of what it is for."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from merger.architecture import is_depth_router
from merger.checkpoint import Checkpoint
from merger.dtypes import TORCH_NAMES
from merger.errors import UnsupportedModel
from merger.values import values


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to compute, its tokenizer (None where it has none) and the device that it is on."""

    model: Any
    tokenizer: Any
    device: str


def load(
    checkpoint: Checkpoint,
    kind: str,
    dtype: str,
    device: str,
    changes: Mapping[str, Any] | None = None,
    may_differ: Callable[[str], bool] = is_depth_router,
) -> Loaded:
    """The model of a checkpoint as transformers' `kind` of model, every tensor in its place, in float32 or `dtype`.

    `changes` are made to the config; tensors for which `may_differ` holds may be missing, and are then new, or left
    over. Raises UnsupportedModel where others are.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if checkpoint.is_adapter:
        remedy = "A recipe with `method: lora` and `base` makes a model of it."
        raise UnsupportedModel("is an adapter, not a model", where=checkpoint.label, remedy=remedy)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    config, tokenizer = config_and_tokenizer(checkpoint)
    config.update(dict(changes or {}))
    with torch.device("meta"):  # only its class is wanted: the Auto classes take no tensors in memory
        of_kind: Any = type(getattr(transformers, kind).from_config(config, trust_remote_code=False))
    found: Any = of_kind.from_pretrained(
        None, config=config, state_dict=state_dict(checkpoint), dtype=getattr(torch, dtype), output_loading_info=True
    )
    model, info = found
    for what in ("missing", "unexpected", "mismatched"):
        names = sorted(str(name) for name in info[f"{what}_keys"] if not may_differ(str(name)))
        if names:
            raise UnsupportedModel(
                f"{len(names)} tensors are {what} for {type(model).__name__}, {names[0]} first",
                where=checkpoint.label,
                remedy="It is not a model for this task, or not whole: `merger inspect` shows what it holds.",
            )
    return Loaded(model.eval().to(place), tokenizer, place)


def config_and_tokenizer(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """What transformers makes of a checkpoint's side files (no tokenizer: None). Raises UnsupportedModel."""
    with tempfile.TemporaryDirectory() as folder:
        for name, path in checkpoint.side_files.items():
            if name not in checkpoint.texts:
                (Path(folder) / name).symlink_to(path.resolve())
        for name, text in checkpoint.texts.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        (Path(folder) / "config.json").write_text(json.dumps(dict(checkpoint.config or {})))
        never_code = {"local_files_only": True, "trust_remote_code": False}
        try:
            config = transformers.AutoConfig.from_pretrained(folder, **never_code)
        except (OSError, ValueError, KeyError) as error:
            kind = (checkpoint.config or {}).get("model_type")
            raise UnsupportedModel(
                f"is of the kind {kind!r}, which transformers cannot make: {str(error).splitlines()[0]}",
                where=checkpoint.label,
                remedy="Models that bring code of their own are not run.",
            ) from error
        try:
            return config, transformers.AutoTokenizer.from_pretrained(folder, **never_code)
        except (OSError, ValueError):
            return config, None


def state_dict(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The values of a checkpoint as torch tensors of its dtypes, under its names."""
    found = {}
    for name, made, content in values(checkpoint):
        dtype = getattr(torch, TORCH_NAMES[made.dtype])
        tensor = torch.frombuffer(content, dtype=dtype) if content.size else torch.empty(0, dtype=dtype)
        found[name] = tensor.view(made.shape)
    return found

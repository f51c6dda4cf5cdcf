"""A finished result that is not published yet, as a folder that transformers can load.

Knows shards and links; writes no tensor.
"""

import json
from dataclasses import replace
from pathlib import Path

from merger.checkpoint import Checkpoint
from merger.expression import Expression, File, Stored
from merger.plan import Plan
from merger.reader import on_disk


def written(plan: Plan, folder: Path) -> Checkpoint:
    """The result as it lies in the shards of `folder`."""
    tensors: dict[str, Expression] = {}
    for shard in plan.weights:
        path = folder / shard.name
        file = File(path, shard.size, path.stat().st_mtime_ns, "")
        for entry in shard.entries:
            made = entry.expression
            tensors[entry.name] = Stored(made.dtype, made.shape, file, len(shard.header) + entry.offset)
    return replace(plan.checkpoint, tensors=tensors, origin=None, optimizer={})


def link_weights(model: Checkpoint, place: Path) -> None:
    """Put links to a stored model's files into a folder, with the index that says which tensor is where."""
    names: dict[File, str] = {}
    weight_map = {}
    for name, tensor in model.tensors.items():
        assert isinstance(tensor, Stored)
        if tensor.file not in names:
            names[tensor.file] = f"{len(names):05d}.safetensors"
            (place / names[tensor.file]).symlink_to(on_disk(tensor.file).resolve())
        weight_map[name] = names[tensor.file]
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def link_result(plan: Plan, folder: Path, place: Path) -> Path:
    """The result in the shards of `folder` with its config and side files, as a model's folder made of links."""
    place.mkdir(parents=True, exist_ok=True)
    link_weights(written(plan, folder), place)
    for name, path in plan.checkpoint.side_files.items():
        if name not in plan.checkpoint.texts:
            (place / name).symlink_to(path.resolve())
    for name, text in plan.checkpoint.texts.items():
        (place / name).write_text(text, encoding="utf-8")
    (place / "config.json").write_text(json.dumps(dict(plan.checkpoint.config or {})))
    return place

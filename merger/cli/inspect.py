"""`merger inspect`: what a model is, from its headers."""

import json
import math
from typing import Any

import click

from merger.adapters import summary
from merger.checkpoint import Checkpoint
from merger.cli.terminal import as_json, gigabytes, token
from merger.methods.method import Member
from merger.sources import LocalSources


@click.command(name="inspect")
@click.argument("model")
@click.option("--tensors", "all_tensors", is_flag=True, help="List every tensor.")
@token
@as_json
def command(model: str, all_tensors: bool, as_json: bool) -> None:
    """Show the tensors, dtypes and sizes of MODEL (a folder, a file, or hf://org/name). No weight is read."""
    checkpoint = LocalSources().open(Member(model, None))
    data = _as_data(checkpoint, all_tensors=all_tensors or as_json)
    click.echo(json.dumps(data, indent=2) if as_json else _as_text(data))


def _as_data(checkpoint: Checkpoint, *, all_tensors: bool) -> dict[str, Any]:
    config = checkpoint.config or {}
    dtypes: dict[str, dict[str, int]] = {}
    for tensor in checkpoint.tensors.values():
        row = dtypes.setdefault(tensor.dtype, {"tensors": 0, "bytes": 0})
        row["tensors"] += 1
        row["bytes"] += tensor.nbytes
    return {
        "model": checkpoint.label,
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures"),
        "adapter": summary(checkpoint) if checkpoint.is_adapter else None,
        "step": checkpoint.parts[0].source.step,
        "parameters": sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()),
        "dtypes": dtypes,
        "files": [{"name": file.path.name, "bytes": file.size} for file in checkpoint.parts[0].source.files],
        "side_files": sorted(checkpoint.side_files),
        "notes": list(checkpoint.notes),
        "tensors": {
            name: {"dtype": tensor.dtype, "shape": list(tensor.shape)}
            for name, tensor in checkpoint.tensors.items()
            if all_tensors
        },
    }


def _as_text(data: dict[str, Any]) -> str:
    size = sum(file["bytes"] for file in data["files"])
    kind = ", ".join(data["architectures"] or []) or data["model_type"] or "unknown (no config.json)"
    lines = [
        f"model       {data['model']}",
        *(_of_adapter(data["adapter"]) if data["adapter"] else [f"kind        {kind}"]),
        f"parameters  {data['parameters']:,}",
        f"files       {len(data['files'])}, {gigabytes(size)}",
        *(
            f"dtype       {name}: {row['tensors']:,} tensors, {gigabytes(row['bytes'])}"
            for name, row in data["dtypes"].items()
        ),
        f"beside it   {', '.join(data['side_files']) or 'nothing that travels with it'}",
        *(f"note        {note}" for note in data["notes"]),
        *(f"{row['dtype']:>8}  {row['shape']!s:24}  {name}" for name, row in data["tensors"].items()),
    ]
    return "\n".join(lines)


def _of_adapter(adapter: dict[str, Any]) -> list[str]:
    kind = f"kind        {adapter['type']} adapter for {adapter['base'] or 'a base that it does not name'}"
    if "refused" in adapter:
        return [kind, f"merging     refused: {adapter['refused']}"]
    ranks, scales = (", ".join(f"{number:g}" for number in adapter[key]) for key in ("ranks", "scales"))
    whole = adapter["whole_tensors"]
    return [
        f"{kind}, {adapter['task'] or 'for any task'}",
        f"changes     {adapter['modules']} modules ({', '.join(adapter['kinds'])}), rank {ranks}, scale {scales}",
        *([f"whole       {len(whole)} tensors, {whole[0]} first"] if whole else []),
    ]

"""`merger diff`: how far two checkpoints are apart."""

import json
from pathlib import Path
from typing import Any

import click

from merger.checkpoint import Checkpoint
from merger.cli.terminal import as_json, token
from merger.difference import Distance, by_layer, measure, pairs_of
from merger.methods.method import open_source
from merger.sources import LocalSources


@click.command(name="diff")
@click.argument("a")
@click.argument("b")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw it: a PNG file to write.")
@click.option("--tensors", is_flag=True, help="A row a tensor instead of a row a layer.")
@token
@as_json
def command(a: str, b: str, picture: Path | None, tensors: bool, as_json: bool) -> None:
    """Show how far the checkpoints A and B are apart, layer by layer: |a - b| / |a|, cosine, largest difference.

    Each is a folder, a safetensors file, or hf://org/name, which is downloaded.
    """
    sources = LocalSources()
    first, other = open_source(sources, a), open_source(sources, b)
    distances = measure(pairs_of(first, other))
    rows = distances if tensors else by_layer(distances)
    total = sum(distances.values(), Distance())
    if picture:
        _draw(picture, rows)
    if as_json:
        click.echo(
            json.dumps(
                {**_odd(first, other), "total": _row(total), "rows": {k: _row(v) for k, v in rows.items()}}, indent=2
            )
        )
        return
    width = max([len(name) for name in rows] + [5])
    click.echo(f"{'':{width}}  {'|a-b|/|a|':>10}  {'1 - cosine':>10}  {'largest':>10}")
    for name, row in [*rows.items(), ("total", total)]:
        click.echo(f"{name:{width}}  {row.relative:10.4g}  {1 - row.cosine:10.4g}  {row.largest:10.4g}")
    for where, names in _odd(first, other).items():
        if names:
            click.echo(f"{where.replace('_', ' ')}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}")
    if picture:
        click.echo(f"picture: {picture}")


def _row(distance: Distance) -> dict[str, Any]:
    return {
        "elements": distance.elements,
        "relative": distance.relative,
        "cosine": distance.cosine,
        "largest": distance.largest,
    }


def _odd(a: Checkpoint, b: Checkpoint) -> dict[str, list[str]]:
    return {
        "only_in_a": sorted(a.tensors.keys() - b.tensors.keys()),
        "only_in_b": sorted(b.tensors.keys() - a.tensors.keys()),
    }


def _draw(picture: Path, rows: dict[str, Distance]) -> None:
    from merger.pictures import draw_distances  # half a second, only where a picture is wanted

    values = list(rows.values())
    relative, cosine = [row.relative for row in values], [row.cosine for row in values]
    picture.write_bytes(draw_distances("How far the two checkpoints are apart", list(rows), relative, cosine))

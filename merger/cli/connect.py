"""`merger connect`: the loss along the lines between models."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from merger.cli.evaluate import candidate_of, evaluation_of, evaluation_options
from merger.cli.terminal import phases
from merger.connectivity import Line, measured_line
from merger.judging import LocalJudge, own_memory
from merger.sources import LocalSources


@click.command(name="connect")
@click.argument("models", nargs=-1, required=True, metavar="A B [C...]")
@click.option("--points", type=click.IntRange(2, 1001), default=11, show_default=True, help="Models a line, ends too.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw it: a PNG file to write.")
@evaluation_options
def command(models: tuple[str, ...], points: int, picture: Path | None, as_json: bool, **options: Any) -> None:
    """Measure models on the straight line from A to B, from B to C and so on. No model is written.

    A barrier, a place that is worse than the chord between the ends, says that the average of the two is bad too.
    """
    if len(models) < 2:
        raise click.UsageError("a line needs two models")
    evaluation = evaluation_of(options)
    candidates = [candidate_of(model) for model in models]
    with phases(quiet=as_json) as tell, LocalJudge(LocalSources(), own_memory(), tell) as judge:
        lines = [measured_line(a, b, points, evaluation, judge) for a, b in pairwise(candidates)]
    if picture:
        _draw(picture, lines)
    if as_json:
        click.echo(json.dumps([line.as_data() for line in lines], indent=2))
        return
    for line in lines:
        click.echo(f"{line.first} to {line.other}: {line.metric}, barrier {line.barrier:.4f}")
        for place, value in zip(line.places, line.values, strict=True):
            click.echo(f"  {place:5.3f}  {value:.4f}")
    if picture:
        click.echo(f"picture: {picture}")


def _draw(picture: Path, lines: list[Line]) -> None:
    from merger.pictures import draw_lines  # half a second, only where a picture is wanted

    picture.write_bytes(
        draw_lines([(line.first, line.other, line.places, line.values) for line in lines], lines[0].metric)
    )

"""`merger run`: make the result of a recipe."""

import json
from pathlib import Path
from typing import Any

import click

from merger.cli.terminal import gigabytes, running_options, watching
from merger.recipe import Document, read_document
from merger.run import Options, Outcome, run


@click.command(name="run")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "changes", multiple=True, metavar="FIELD=VALUE", help="Change a field, as in --set k=8.")
@running_options
def command(recipe: Path, changes: tuple[str, ...], output: str | None, as_json: bool, **options: Any) -> None:
    """Make the result of RECIPE.

    Paths in a recipe are relative to the folder in which the command runs. An interrupted run goes on after its last
    finished shard when it is started again; what is finished is never written twice.
    """
    document = read_document(recipe, with_output(changes, output))
    run_document(document, Options(**options), as_json=as_json)


def with_output(changes: tuple[str, ...], output: str | None) -> list[str]:
    """The changes to a recipe that the options ask for."""
    return [*changes, *([f"output.path={json.dumps(output)}"] if output else [])]


def run_document(document: Document, options: Options, *, as_json: bool) -> None:
    """Run, with progress on standard error and the outcome on standard output."""
    with watching(quiet=as_json) as progress:
        outcome = run(document, options, progress)
    if as_json:
        click.echo(json.dumps(_as_data(outcome), indent=2))
        return
    for warning in outcome.warnings:
        click.echo(f"{click.style('warning:', fg='yellow')} {warning}", err=True)
    for check in outcome.checks:
        click.echo(f"{'passed' if check.passed else 'FAILED'}  {check.name}: {check.detail}")
    figures = outcome.figures
    if figures is None:
        click.echo(f"{outcome.output} holds this result already; nothing was written")
        return
    speed = (figures.read + figures.written) / figures.seconds / 1e9 if figures.seconds else 0.0
    click.echo(
        f"{outcome.output}: {gigabytes(figures.written)} written and {gigabytes(figures.read)} read "
        f"in {figures.seconds:.1f} s ({speed:.1f} GB/s)"
    )
    click.echo(f"report: {outcome.output / 'report.html'}")


def _as_data(outcome: Outcome) -> dict[str, Any]:
    return {
        "output": str(outcome.output),
        "fingerprint": outcome.plan.fingerprint,
        "shards": len(outcome.plan.shards),
        "resumed": outcome.resumed,
        "warnings": list(outcome.warnings),
        "checks": [vars(check) for check in outcome.checks],
        "figures": vars(outcome.figures) if outcome.figures else None,
    }

"""`merger run`: make the result of a recipe."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from merger.cli.terminal import F, gigabytes, running_options, watching
from merger.errors import RecipeError
from merger.push import is_destination
from merger.recipe import Document, make_document, read_document
from merger.report import recipe_text
from merger.run import Options, Outcome, run


@click.command(name="run")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "changes", multiple=True, metavar="FIELD=VALUE", help="Change a field, as in --set k=8.")
@running_options
def command(
    recipe: Path, changes: tuple[str, ...], output: str | None, accept_license: bool, as_json: bool, **options: Any
) -> None:
    """Make the result of RECIPE.

    Paths in a recipe are relative to the folder in which the command runs. An interrupted run goes on after its last
    finished shard when it is started again; what is finished is never written twice.
    """
    document = read_document(recipe, with_output(changes, output, accept_license=accept_license))
    run_document(document, Options(**options), as_json=as_json)


def result_options(command: F) -> F:
    """The options of verbs that stand for a recipe."""
    for option in reversed(
        [
            click.option("--field", "fields", multiple=True, metavar="FIELD=VALUE", help="Any other field."),
            click.option("--dtype", help="The dtype of the result; that of the sources without."),
            click.option("--shard-size", help="The most bytes of tensors in one file.  [default: 5GB]"),
        ]
    ):
        command = option(command)
    return command


def fields_of(texts: Sequence[str]) -> dict[str, Any]:
    """The fields that `--field NAME=VALUE` gives. Raises RecipeError."""
    fields = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise RecipeError("must look like field=value", where=f"--field {text}")
        fields[name] = yaml.safe_load(value)
    return fields


def run_recipe(recipe: Mapping[str, Any], form: Mapping[str, Any], options: Options, *, as_json: bool) -> None:
    """Run what flags have said, and print it as a recipe, to keep and to change."""
    place = form["path"]
    if place is None:
        raise RecipeError("is missing", where="-o", remedy="Name the folder to make, or hf://me/name to push to.")
    output = {key: value for key, value in form.items() if value is not None and key != "path"}
    output["push" if is_destination(place) else "path"] = place
    whole = {**{key: value for key, value in recipe.items() if value is not None}, "output": output}
    document = make_document(whole)
    if not as_json:
        click.echo(recipe_text(whole))
    run_document(document, options, as_json=as_json)


def with_output(changes: tuple[str, ...], output: str | None, *, accept_license: bool) -> list[str]:
    """The changes to a recipe that the options ask for."""
    field = "push" if is_destination(output or "") else "path"
    place = [f"output.{field}={json.dumps(output)}"] if output else []
    return [*changes, *place, *(["output.accept_license=true"] if accept_license else [])]


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
    if outcome.published:
        click.echo(f"published: {outcome.published}")
    figures, folder = outcome.figures, outcome.output
    if figures is None:
        click.echo(f"{folder or 'the repository'} holds this result already; nothing was written")
        return
    speed = (figures.read + figures.written) / figures.seconds / 1e9 if figures.seconds else 0.0
    click.echo(
        f"{folder or 'in all'}: {gigabytes(figures.written)} written and {gigabytes(figures.read)} read "
        f"in {figures.seconds:.1f} s ({speed:.1f} GB/s)"
    )
    if folder:
        click.echo(f"report: {folder / 'report.html'}")


def _as_data(outcome: Outcome) -> dict[str, Any]:
    return {
        "output": str(outcome.output) if outcome.output else None,
        "published": outcome.published,
        "fingerprint": outcome.plan.fingerprint,
        "shards": len(outcome.plan.shards),
        "resumed": outcome.resumed,
        "warnings": list(outcome.warnings),
        "checks": [vars(check) for check in outcome.checks],
        "figures": vars(outcome.figures) if outcome.figures else None,
    }

"""`merger evaluate`: what a model, or what a recipe would make, measures."""

import json
from pathlib import Path
from typing import Any

import click
from pydantic import TypeAdapter, ValidationError

from merger.cli.terminal import F, as_json, phases
from merger.errors import RecipeError
from merger.evaluation import Evaluation, Measured, Score
from merger.judging import LocalJudge, own_memory
from merger.methods.method import Method
from merger.recipe import read_document
from merger.sources import LocalSources

_EVALUATION: TypeAdapter[Measured] = TypeAdapter(Evaluation)


def evaluation_options(command: F) -> F:
    """The options that say by what models are measured."""
    for option in reversed(
        [
            click.option("--data", multiple=True, metavar="FILE", help="Text, or JSONL; may be given several times."),
            click.option(
                "--task",
                type=click.Choice(["text", "classification", "preferences"]),
                default="text",
                show_default=True,
                help="What the data are.",
            ),
            click.option("--context", type=int, help="Tokens of a window of text.  [default: 512]"),
            click.option("--limit", type=int, help="The most items to look at; all without."),
            click.option("--batch-size", type=int, help="Items at a time.  [default: 16]"),
            click.option("--metric", help="By which metric models are compared; the task's first without."),
            click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where.  [default: auto]"),
            as_json,
        ]
    ):
        command = option(command)
    return command


def evaluation_of(options: dict[str, Any]) -> Measured:
    """The evaluation that the options describe. Raises RecipeError."""
    fields = {name: list(v) if isinstance(v, tuple) else v for name, v in options.items() if v not in (None, ())}
    if "data" not in fields:
        raise RecipeError("is missing", where="--data", remedy="Name a file of held-out text or JSONL.")
    try:
        return _EVALUATION.validate_python(fields)
    except ValidationError as error:
        detail = error.errors()[0]
        where = f"--{detail['loc'][-1]}".replace("_", "-")
        raise RecipeError(detail["msg"].removeprefix("Value error, "), where=where) from error


def candidate_of(model: str) -> str | Method:
    """A model's reference, or the recipe in a file."""
    return read_document(Path(model)).recipe if Path(model).suffix in (".yaml", ".yml") else model


@click.command(name="evaluate")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@evaluation_options
def command(models: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Measure models on held-out data. A MODEL is a folder, or a recipe (.yaml), whose result is not written for it.

    With several, each is compared with the first, item by item.
    """
    evaluation = evaluation_of(options)
    with phases(quiet=as_json) as tell, LocalJudge(LocalSources(), own_memory(), tell) as judge:
        scores = dict(zip(models, judge.scores([candidate_of(model) for model in models], evaluation), strict=True))
    if as_json:
        click.echo(json.dumps({model: score.as_data() for model, score in scores.items()}, indent=2))
        return
    first = next(iter(scores.values()))
    width = max(len(model) for model in models)
    click.echo(f"{'':{width}}  {'  '.join(f'{name:>13}' for name in first.metrics)}  {first.count:,} {first.unit}")
    for model, score in scores.items():
        figures = "  ".join(f"{value:13.4f}" for value in score.metrics.values())
        click.echo(f"{model:{width}}  {figures}  {_beside(score, first)}")


def _beside(score: Score, first: Score) -> str:
    name = next(iter(score.metrics))
    if score is first:
        return f"{name} ± {score.error:.4f}"
    difference, error = score.minus(first)
    return f"{name} {difference:+.4f} ± {error:.4f}"

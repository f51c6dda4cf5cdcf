"""`merger average`: the averaging recipes as flags."""

from typing import Any

import click
import yaml

from merger.cli.run import run_document
from merger.cli.terminal import running_options
from merger.errors import RecipeError
from merger.methods import METHODS
from merger.methods.averaging import Averaging
from merger.recipe import make_document
from merger.report import recipe_text
from merger.run import Options

_METHODS = [name for name, method in METHODS.items() if issubclass(method, Averaging)]


@click.command(name="average")
@click.argument("checkpoints", nargs=-1, required=True)
@click.option("--method", type=click.Choice(_METHODS), default="average", show_default=True, help="Which average.")
@click.option("--weights", help="For average: numbers with commas between them, as in 0.5,0.3,0.2.")
@click.option("--k", type=int, help="For lawa: how many of the newest checkpoints.")
@click.option("--decay", help="For ema the decay, for wsm the profile.")
@click.option("--start", help="For swa: the first step, or a share as in 75%.")
@click.option("--field", "fields", multiple=True, metavar="FIELD=VALUE", help="Any other field of the method.")
@click.option("--dtype", help="The dtype of the result; that of the sources without.")
@click.option("--shard-size", help="The most bytes of tensors in one file.  [default: 5GB]")
@running_options
def command(
    checkpoints: tuple[str, ...],
    method: str,
    fields: tuple[str, ...],
    dtype: str | None,
    shard_size: str | None,
    output: str | None,
    as_json: bool,
    weights: str | None,
    k: int | None,
    decay: str | None,
    start: str | None,
    **options: Any,
) -> None:
    """Average CHECKPOINTS: folders in their order, or one quoted pattern such as 'runs/tiny/step-*'.

    Prints the recipe that it ran, to keep and to change.
    """
    if output is None:
        raise RecipeError("is missing", where="-o", remedy="Name the folder to make.")
    given = {"k": k, "decay": decay, "start": start, "weights": _numbers(weights)}
    recipe: dict[str, Any] = {
        "method": method,
        "checkpoints": checkpoints[0] if len(checkpoints) == 1 else list(checkpoints),
        **{key: value for key, value in given.items() if value is not None},
        **dict(_field(field) for field in fields),
    }
    form = {"dtype": dtype, "shard_size": shard_size}
    recipe["output"] = {"path": output, **{key: value for key, value in form.items() if value is not None}}
    document = make_document(recipe)
    if not as_json:
        click.echo(recipe_text(recipe))
    run_document(document, Options(**options), as_json=as_json)


def _numbers(text: str | None) -> list[float] | None:
    try:
        return [float(number) for number in text.split(",")] if text else None
    except ValueError as error:
        raise RecipeError(f"{text!r} is not a list of numbers", where="--weights") from error


def _field(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise RecipeError("must look like field=value", where=f"--field {text}")
    return name, yaml.safe_load(value)

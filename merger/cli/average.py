"""`merger average`: the averaging recipes as flags."""

from typing import Any

import click

from merger.cli.run import fields_of, result_options, run_recipe
from merger.cli.terminal import running_options
from merger.errors import RecipeError
from merger.methods import METHODS
from merger.methods.averaging import Averaging
from merger.run import Options

_METHODS = [name for name, method in METHODS.items() if issubclass(method, Averaging)]


@click.command(name="average")
@click.argument("checkpoints", nargs=-1, required=True)
@click.option("--method", type=click.Choice(_METHODS), default="average", show_default=True, help="Which average.")
@click.option("--weights", help="For average: numbers with commas between them, as in 0.5,0.3,0.2.")
@click.option("--k", type=int, help="For lawa: how many of the newest checkpoints.")
@click.option("--decay", help="For ema the decay, for wsm the profile.")
@click.option("--start", help="For swa: the first step, or a share as in 75%.")
@result_options
@running_options
def command(
    checkpoints: tuple[str, ...],
    method: str,
    fields: tuple[str, ...],
    dtype: str | None,
    shard_size: str | None,
    output: str | None,
    accept_license: bool,
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
    given = {"k": k, "decay": decay, "start": start, "weights": _numbers(weights)}
    recipe: dict[str, Any] = {
        "method": method,
        "checkpoints": checkpoints[0] if len(checkpoints) == 1 else list(checkpoints),
        **{key: value for key, value in given.items() if value is not None},
        **fields_of(fields),
    }
    form = {"path": output, "dtype": dtype, "shard_size": shard_size, "accept_license": accept_license or None}
    run_recipe(recipe, form, Options(**options), as_json=as_json)


def _numbers(text: str | None) -> list[float] | None:
    try:
        return [float(number) for number in text.split(",")] if text else None
    except ValueError as error:
        raise RecipeError(f"{text!r} is not a list of numbers", where="--weights") from error

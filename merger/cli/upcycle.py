"""`merger upcycle`: the recipe of sparse upcycling as flags."""

from typing import Any

import click

from merger.cli.run import fields_of, result_options, run_recipe
from merger.cli.terminal import running_options
from merger.run import Options


@click.command(name="upcycle")
@click.argument("source")
@click.option("--experts", type=int, help="How many experts a layer gets.")
@click.option("--experts-per-token", type=int, help="How many of them a token takes; 2 without.")
@click.option("--target", help="The family of the result, where there is a choice.")
@click.option("--drop", type=float, help="The share of each expert's neurons that is drawn anew.")
@click.option("--seed", type=int, help="Of the router and of whatever is drawn.")
@result_options
@running_options
def command(
    source: str,
    experts: int | None,
    experts_per_token: int | None,
    target: str | None,
    drop: float | None,
    seed: int | None,
    fields: tuple[str, ...],
    dtype: str | None,
    shard_size: str | None,
    output: str | None,
    accept_license: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Make a mixture of experts out of the dense model SOURCE: its MLPs become experts, a new router chooses.

    Prints the recipe that it ran, to keep and to change.
    """
    recipe = {
        "method": "upcycle",
        "source": source,
        "experts": experts,
        "experts_per_token": experts_per_token,
        "target": target,
        "drop": drop,
        "seed": seed,
        **fields_of(fields),
    }
    form = {"path": output, "dtype": dtype, "shard_size": shard_size, "accept_license": accept_license or None}
    run_recipe(recipe, form, Options(**options), as_json=as_json)

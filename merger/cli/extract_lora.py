"""`merger extract-lora`: the difference between two models as an adapter, by flags."""

from typing import Any

import click

from merger.cli.run import fields_of, result_options, run_recipe
from merger.cli.terminal import running_options
from merger.run import Options


@click.command(name="extract-lora")
@click.argument("model")
@click.argument("base")
@click.option("--rank", type=int, help="The adapter's rank; 32 without.")
@click.option("--seed", type=int, help="Of the randomized decomposition.")
@result_options
@running_options
def command(
    model: str,
    base: str,
    rank: int | None,
    seed: int | None,
    fields: tuple[str, ...],
    dtype: str | None,
    shard_size: str | None,
    output: str | None,
    accept_license: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Make a LoRA adapter of what MODEL has that BASE, which it was fine-tuned from, has not.

    Prints the recipe that it ran, to keep and to change.
    """
    recipe = {"method": "extract_lora", "model": model, "base": base, "rank": rank, "seed": seed, **fields_of(fields)}
    form = {"path": output, "dtype": dtype, "shard_size": shard_size, "accept_license": accept_license or None}
    run_recipe(recipe, form, Options(**options), as_json=as_json)

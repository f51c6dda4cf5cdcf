"""`merger expand`: the recipe of block expansion as flags."""

from typing import Any

import click

from merger.cli.run import fields_of, result_options, run_recipe
from merger.cli.terminal import running_options
from merger.run import Options


@click.command(name="expand")
@click.argument("source")
@click.option("--groups", type=int, help="How many groups of equal size the layers fall into.")
@click.option("--added-per-group", type=int, help="How many layers each group gets; 1 without.")
@click.option("--placement", type=click.Choice(["interleaved", "suffix"]), help="New layers in between, or on top.")
@result_options
@running_options
def command(
    source: str,
    groups: int | None,
    added_per_group: int | None,
    placement: str | None,
    fields: tuple[str, ...],
    dtype: str | None,
    shard_size: str | None,
    output: str | None,
    accept_license: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Add layers to the model SOURCE that change nothing yet: copies with zeroed outputs, to be trained alone.

    Prints the recipe that it ran, to keep and to change.
    """
    recipe = {
        "method": "expand",
        "source": source,
        "groups": groups,
        "added_per_group": added_per_group,
        "placement": placement,
        **fields_of(fields),
    }
    form = {"path": output, "dtype": dtype, "shard_size": shard_size, "accept_license": accept_license or None}
    run_recipe(recipe, form, Options(**options), as_json=as_json)

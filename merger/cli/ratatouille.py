"""`merger ratatouille`: the fine-tunings that a recipe asks for, listed or done."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from merger.cli.run import command as run_command
from merger.cli.terminal import as_json
from merger.errors import RecipeError
from merger.fine_tuning import Order, orders_of
from merger.methods.method import Method, all_of
from merger.recipe import read_document
from merger.sources import LocalSources


@click.group(name="ratatouille")
def command() -> None:
    """Model Ratatouille with its fine-tunings: which model every run starts from, and the runs themselves."""


@command.command(name="plan")
@click.argument("recipe", type=click.Path(path_type=Path))
@as_json
def plan(recipe: Path, as_json: bool) -> None:
    """List the fine-tunings of RECIPE in their order: what each starts from, on which data, with which settings.

    To do them with a program of your own, write each model to the folder of its stage, and name the folders as
    `auxiliary` and `targets` instead of `training`.
    """
    document = read_document(recipe)
    orders = [order for part in all_of(document.recipe) for order in _orders(part)]
    if not orders:
        raise RecipeError("has no `training`: there is nothing to fine-tune", where=str(recipe))
    if as_json:
        click.echo(json.dumps([_as_data(order) for order in orders], indent=2))
        return
    for number, order in enumerate(orders, 1):
        stage = order.stage
        head = f", head of {order.head}" if order.head else ", a fresh head" if stage.task == "classification" else ""
        alone = f", {stage.head_steps} of them the head alone" if stage.head_steps else ""
        click.echo(f"{number:3}. {order.folder}{'  (finished)' if order.is_finished() else ''}")
        bodies = [body if weight == 1.0 else f"{weight:.3f} {body}" for body, weight in order.bodies]
        click.echo(f"     starts from {' + '.join(bodies)}{head}")
        click.echo(
            f"     {stage.steps} steps on {stage.data}{alone}; learning rate {stage.learning_rate:g}, "
            f"weight decay {stage.weight_decay:g}, dropout {stage.dropout:g}, seed {stage.seed}"
        )


def _orders(part: Method) -> list[Order]:
    sources = LocalSources()
    return orders_of(part.trains, part.starts(sources), sources) if part.trains else []


def _as_data(order: Order) -> dict[str, Any]:
    places = {"folder": str(order.folder), "bodies": order.bodies, "head": order.head}
    return {**asdict(order.stage), **places, "finished": order.is_finished()}


command.add_command(run_command, "run")

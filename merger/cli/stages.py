"""`merger stages`: the fine-tunings that a recipe asks for, listed."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from merger.cli.terminal import as_json
from merger.errors import RecipeError
from merger.fine_tuning import Order, orders_of
from merger.methods.method import Method, all_of
from merger.recipe import read_document
from merger.sources import LocalSources
from merger.tasks import task_of


@click.command(name="stages")
@click.argument("recipe", type=click.Path(path_type=Path))
@as_json
def command(recipe: Path, as_json: bool) -> None:
    """List the fine-tunings of RECIPE in their order: what each starts from, on which data, with which settings.

    To do them with a program of your own, write each model to the folder of its stage, and name the folders in the
    recipe (`auxiliary` and `targets`, or `models`) instead of `training`.
    """
    document = read_document(recipe)
    orders = [order for part in all_of(document.recipe) for order in _orders(part)]
    if not orders:
        raise RecipeError("has no `training`: there is nothing to fine-tune", where=str(recipe))
    if as_json:
        click.echo(json.dumps([_as_data(order) for order in orders], indent=2))
        return
    for number, order in enumerate(orders, 1):
        click.echo("\n".join(_lines(number, order)))


def _orders(part: Method) -> list[Order]:
    sources = LocalSources()
    return orders_of(part.trains, part.starts(sources), sources) if part.trains else []


def _lines(number: int, order: Order) -> Iterator[str]:
    stage = order.stage
    fresh = ", a fresh head" if task_of(stage.task).has_head else ""
    head = f", head of {order.head}" if order.head else fresh
    alone = f", {stage.head_steps} of them the head alone" if stage.head_steps else ""
    bodies = [body if weight == 1.0 else f"{weight:.3f} {body}" for body, weight in order.bodies]
    yield f"{number:3}. {order.folder}{'  (finished)' if order.is_finished() else ''}"
    yield f"     starts from {' + '.join(bodies)}{head}"
    yield (
        f"     {stage.steps} steps on {stage.data}{alone}; learning rate {stage.learning_rate:g}, "
        f"weight decay {stage.weight_decay:g}, dropout {stage.dropout:g}, seed {stage.seed}"
    )


def _as_data(order: Order) -> dict[str, Any]:
    places = {"folder": str(order.folder), "bodies": order.bodies, "head": order.head}
    return {**asdict(order.stage), **places, "finished": order.is_finished()}

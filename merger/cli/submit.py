"""`merger submit`: send a recipe to a job service."""

import json
from pathlib import Path

import click

from merger.cli.run import with_output
from merger.cli.service import server
from merger.cli.terminal import accept_license, as_json
from merger.cli.watch import follow
from merger.client import Client
from merger.errors import RecipeError
from merger.recipe import read_content


@click.command(name="submit")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "changes", multiple=True, metavar="FIELD=VALUE", help="Change a field, as in --set k=8.")
@click.option("-o", "--output", metavar="FOLDER", help="The folder to make; overrides the recipe.")
@click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="A label to find the job by.")
@click.option("--priority", type=click.IntRange(-1000, 1000), default=0, help="Higher ones start first.")
@click.option("--idempotency-key", metavar="KEY", help="Sent again with the same key, the recipe is one job.")
@click.option("--hub-token-secret", metavar="NAME", help="The token for the Hub: a secret of the service, by its name.")
@click.option("--wait", is_flag=True, help="Follow the job until it has ended; exit with 1 unless it succeeded.")
@accept_license
@server
@as_json
def command(
    recipe: Path,
    changes: tuple[str, ...],
    output: str | None,
    labels: tuple[str, ...],
    priority: int,
    idempotency_key: str | None,
    hub_token_secret: str | None,
    wait: bool,
    accept_license: bool,
    server: str | None,
    as_json: bool,
) -> None:
    """Queue RECIPE as a job and print its id. Paths in it are relative to the folder in which the service runs."""
    client = Client(server)
    content = read_content(recipe, with_output(changes, output, accept_license=accept_license))
    secrets = {"hub_token": hub_token_secret} if hub_token_secret else None
    job = client.submit(content, dict(map(_label, labels)), priority, idempotency_key, secrets)
    if wait:
        follow(client, job["id"], as_json=as_json)
    else:
        click.echo(json.dumps(job, indent=2) if as_json else job["id"])


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise RecipeError("must look like name=value", where=f"--label {text}")
    return name, value

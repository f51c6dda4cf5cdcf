"""`merger secret`: store, list and remove the named secrets of a job service. A value is never an argument."""

import json
import sys

import click

from merger.cli.service import server
from merger.cli.terminal import as_json
from merger.client import Client


@click.group(name="secret")
def command() -> None:
    """Tokens that jobs of a service use by name: `merger submit RECIPE --hub-token-secret NAME`.

    The service keeps them encrypted, and never shows a value again.
    """


@command.command(name="set")
@click.argument("name")
@server
def put(name: str, server: str | None) -> None:
    """Store a secret under NAME, in the place of an earlier value.

    The value is asked for, or read from standard input: merger secret set team-hub < token.txt
    """
    value = click.prompt("Value", hide_input=True) if sys.stdin.isatty() else sys.stdin.read().strip()
    if not value:
        raise click.UsageError("the value is empty")
    new = Client(server).put_secret(name, value)
    click.echo("stored" if new else "stored in the place of the earlier value")


@command.command(name="list")
@server
@as_json
def show(server: str | None, as_json: bool) -> None:
    """List the names of the secrets; values are never shown."""
    secrets = Client(server).secrets()
    if as_json:
        click.echo(json.dumps(secrets, indent=2))
        return
    for secret in secrets:
        click.echo(f"{secret['name']:30}  stored {secret['updated_at'][:19]}")
    if not secrets:
        click.echo("no secrets")


@command.command(name="rm")
@click.argument("name")
@server
def remove(name: str, server: str | None) -> None:
    """Remove the secret NAME. Jobs that name it and have not started yet will fail."""
    Client(server).remove_secret(name)
    click.echo("removed")

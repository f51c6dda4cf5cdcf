"""`merger job`: one job of a service."""

import json

import click

from merger.cli.service import described, server
from merger.cli.terminal import as_json
from merger.client import Client


@click.command(name="job")
@click.argument("job")
@server
@as_json
def command(job: str, server: str | None, as_json: bool) -> None:
    """Show JOB: its state, progress, result and error."""
    found = Client(server).job(job)
    click.echo(json.dumps(found, indent=2) if as_json else described(found))

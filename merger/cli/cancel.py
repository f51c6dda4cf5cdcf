"""`merger cancel`: stop a job."""

import json

import click

from merger.cli.service import coloured, server
from merger.cli.terminal import as_json
from merger.client import Client


@click.command(name="cancel")
@click.argument("job")
@server
@as_json
def command(job: str, server: str | None, as_json: bool) -> None:
    """Stop JOB and remove what it has staged; nothing of it is published."""
    found = Client(server).cancel(job)
    click.echo(json.dumps(found, indent=2) if as_json else coloured(found["state"]))

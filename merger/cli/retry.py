"""`merger retry`: try an ended job again."""

import json

import click

from merger.cli.service import coloured, server
from merger.cli.terminal import as_json
from merger.client import Client


@click.command(name="retry")
@click.argument("job")
@server
@as_json
def command(job: str, server: str | None, as_json: bool) -> None:
    """Queue JOB again, which failed, was canceled or timed out; it goes on after its finished shards."""
    found = Client(server).retry(job)
    click.echo(json.dumps(found, indent=2) if as_json else coloured(found["state"]))

"""`merger jobs`: list the jobs of a service."""

import json

import click

from merger.cli.service import coloured, server, share
from merger.cli.terminal import as_json
from merger.client import Client


@click.command(name="jobs")
@click.option("--state", "states", multiple=True, help="Only jobs in this state; may be given several times.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=20, show_default=True, help="At most so many.")
@server
@as_json
def command(states: tuple[str, ...], limit: int, server: str | None, as_json: bool) -> None:
    """List the jobs of a service, the newest first."""
    jobs = Client(server).jobs(states, limit)
    if as_json:
        click.echo(json.dumps(jobs, indent=2))
        return
    for job in jobs:
        state = coloured(f"{job['state']:10}")
        click.echo(f"{job['id']}  {state}  {job['created_at'][:19]}  {job['method']:12}  {share(job['progress'])}")
    if not jobs:
        click.echo("no jobs")

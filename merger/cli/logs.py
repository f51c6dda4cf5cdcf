"""`merger logs`: what the runners of a job wrote."""

import click

from merger.cli.service import server
from merger.client import Client


@click.command(name="logs")
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended.")
@server
def command(job: str, follow: bool, server: str | None) -> None:
    """Print what the runners of JOB wrote."""
    for line in Client(server).logs(job, follow=follow):
        click.echo(line)

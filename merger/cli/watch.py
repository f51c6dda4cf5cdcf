"""`merger watch`: follow a job until it has ended."""

import json
import sys
from collections.abc import Mapping
from typing import Any

import click

from merger.cli.service import coloured, explained, server
from merger.cli.terminal import as_json, byte_bar, gigabytes
from merger.client import Client, Told


@click.command(name="watch")
@click.argument("job")
@server
@as_json
def command(job: str, server: str | None, as_json: bool) -> None:
    """Follow JOB until it has ended, across restarts of the service; exit with 1 unless it succeeded."""
    follow(Client(server), job, as_json=as_json)


def follow(client: Client, job: str, *, as_json: bool) -> None:
    """Show what happens on standard error, the ended job on standard output; exit with 1 unless it succeeded."""
    if not as_json:
        click.echo(f"job {job}", err=True)
    try:
        with _View(quiet=as_json) as view:
            for told in client.events(job, view.gap):
                view.show(told)
    except KeyboardInterrupt:
        click.echo(f"The job goes on. `merger watch {job}` follows it again, `merger cancel {job}` stops it.", err=True)
        raise
    ended = client.job(job)
    if as_json:
        click.echo(json.dumps(ended, indent=2))
    elif ended["state"] == "succeeded":
        for warning in ended["result"]["warnings"]:
            click.echo(f"{click.style('warning:', fg='yellow')} {warning}", err=True)
        if ended["result"].get("published"):
            click.echo(f"published: {ended['result']['published']}")
        click.echo(f"{coloured('succeeded')}: {ended['output']}")
    else:
        click.echo(f"{coloured(ended['state'])}: {explained(ended['error']) or 'no result'}")
    if ended["state"] != "succeeded":
        sys.exit(1)


class _View:
    """Events as lines, and a bar below them where there is a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet, self._broken = quiet, False
        self._bar = byte_bar(disable=quiet or not sys.stderr.isatty())
        self._task = self._bar.add_task("queued", total=None)

    def __enter__(self) -> "_View":
        self._bar.start()
        return self

    def __exit__(self, *_raised: object) -> None:
        self._bar.stop()

    def show(self, told: Told) -> None:
        """Tell of an event, or move the bar."""
        self._broken = False
        if told.kind == "progress":
            data = told.data
            self._bar.update(self._task, description=data["phase"], completed=data["done"], total=data["total"] or None)
        else:
            self._line(_sentence(told.kind, told.data))

    def gap(self, reason: str) -> None:
        """Say once that the service does not answer."""
        if not self._broken:
            self._line(f"the service does not answer ({reason}); trying again")
        self._broken = True

    def _line(self, text: str) -> None:
        if not self._quiet:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _sentence(kind: str, data: Mapping[str, Any]) -> str:
    match kind:
        case "planned":
            told = f"planned: {data['shards']} shards, {gigabytes(data['bytes'])}"
        case "shard":
            told = f"{'kept' if data['adopted'] else 'finished'} {data['file']}"
        case "chosen":
            told = f"{data['title']}, by {data['metric']}: {', '.join(data['taken'])}"
        case "attempt_lost" | "attempt_failed":
            told = f"attempt {data['attempt']} {kind.removeprefix('attempt_')}: {data['error']['message']}"
        case "queued" | "waiting" | "canceling":
            told = f"{kind}: {data['reason']}"
        case "starting" | "running" | "publishing":
            told = f"{kind} (attempt {data['attempt']})"
        case _:
            told = kind.replace("_", " ")
    return told

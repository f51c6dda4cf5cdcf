"""What the verbs of a job service share: the service's address, and how a job looks in a terminal."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from merger.cli.terminal import gigabytes

F = TypeVar("F", bound=Callable[..., Any])

_COLOURS = {"succeeded": "green", "failed": "red", "timed_out": "red", "canceled": "yellow", "running": "cyan"}

server = click.option("--server", metavar="URL", help="The service; else MERGER_SERVER, else the config file.")


def coloured(state: str) -> str:
    """A state as a terminal shows it."""
    return click.style(state, fg=_COLOURS.get(state))


def share(progress: dict[str, Any]) -> str:
    """How far a job is, in words."""
    if not progress["bytes_total"]:
        return str(progress["phase"])
    done = progress["bytes_done"] / progress["bytes_total"]
    return f"{progress['phase']} {done:.0%} of {gigabytes(progress['bytes_total'])}"


def described(job: dict[str, Any]) -> str:
    """A job in some lines."""
    rows = [
        ("job", job["id"]),
        ("state", coloured(job["state"])),
        ("method", job["method"]),
        ("output", job["output"]),
        ("published", (job["result"] or {}).get("published")),
        ("progress", share(job["progress"])),
        ("waiting for", job["waiting_for"]),
        ("labels", ", ".join(f"{name}={value}" for name, value in job["labels"].items())),
        ("priority", job["priority"] or ""),
        ("hub token", job.get("secrets", {}).get("hub_token")),
        ("created", job["created_at"]),
        ("started", job["started_at"]),
        ("ended", job["ended_at"]),
        ("attempts", len(job["attempts"]) or ""),
        ("error", explained(job["error"])),
    ]
    return "\n".join(f"{name:12}{value}" for name, value in rows if value)


def explained(error: dict[str, str] | None) -> str:
    """An error of a job: where, what, and what to do."""
    if error is None:
        return ""
    where = f"{error['where']}: " if error["where"] else ""
    remedy = f"\n{'':12}{error['remedy']}" if error["remedy"] else ""
    return f"{where}{error['message']}{remedy}"

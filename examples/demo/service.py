"""A `merger serve` for the length of the demo. Knows how it starts and stops; knows nothing of averages."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serving(data: Path) -> Iterator[Mapping[str, str]]:
    """Runs a service with a Ray of its own and stops both; gives the environment in which `merger submit` finds it."""
    data.mkdir(parents=True, exist_ok=True)
    own = {**os.environ, "MERGER_API_KEY": secrets.token_urlsafe(24)}
    command = [str(merger()), "serve", "--port", "0", "--data", str(data)]
    print("$ merger serve", flush=True)
    with subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True) as server:
        try:
            said = server.stdout.readline().split() if server.stdout else []
            if said[:1] != ["ready"]:
                sys.exit("merger serve did not start; its error stands above")
            print(*said, flush=True)
            yield {**own, "MERGER_SERVER": said[1]}
        finally:
            server.terminate()


def merger() -> Path:
    """The `merger` of the interpreter that runs this. Exits where it is not installed."""
    command = Path(sys.executable).parent / "merger"
    if not command.is_file():
        sys.exit(f"{command} is missing: run this with `make demo`, or install the project first")
    return command

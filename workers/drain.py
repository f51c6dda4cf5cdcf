"""`python -m workers.drain`: empties the node that it runs on, before its machine goes away (a pod's preStop hook).

Knows Ray's processes on one machine; knows nothing of jobs. The node takes no more tasks; what it runs may end in its
time. Runners that are still there then are asked to stop: each keeps what is finished, says so, and the next attempt
goes on elsewhere at once.
"""

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable

import psutil

_ORDERLY = 10.0  # seconds in which a runner that was asked to stop tells the API
_PAUSE = 0.2


def raylets() -> list[psutil.Process]:
    """The nodes that run in this container, or on this machine."""
    return [process for process in psutil.process_iter() if _name(process) == "raylet"]


def drain(raylet: psutil.Process, seconds: float, say: Callable[[str], None]) -> None:
    """Let the node take no more tasks, and wait until it is empty: Ray ends its raylet then. Raises DrainRefused."""
    until = time.monotonic() + seconds
    _announce(raylet, seconds)
    say(f"the node takes no more tasks; {len(runners(raylet))} runners on it")
    if not _ended([raylet], until):
        asked = runners(raylet)
        say(f"the time is over: {len(asked)} runners are asked to stop")
        for runner in asked:
            with contextlib.suppress(psutil.NoSuchProcess):
                runner.terminate()
        _ended(asked, time.monotonic() + _ORDERLY)
    say("the node is empty" if not _lives(raylet) else "the node goes, with what it runs")


class DrainRefused(Exception):
    """Ray did not take the request; the message is what it said."""


def runners(raylet: psutil.Process) -> list[psutil.Process]:
    """The runners of attempts that a node holds."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [process for process in raylet.children(recursive=True) if "workers.runner" in _command(process)]
    return []


def _announce(raylet: psutil.Process, seconds: float) -> None:
    """Ray's own command: hidden, but what its autoscaler does to a node that will be taken away."""
    known = dict(word.split("=", 1) for word in _command(raylet) if word.startswith("--") and "=" in word)
    if not {"--gcs-address", "--node_id"} <= known.keys():
        raise DrainRefused(f"process {raylet.pid} is no node: it names no --node_id and --gcs-address")
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "drain-node"),
        *("--address", known["--gcs-address"], "--node-id", known["--node_id"]),
        *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the machine goes away"),
        *("--deadline-remaining-seconds", str(max(1, round(seconds + _ORDERLY)))),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise DrainRefused(done.stderr.strip()[-2000:])


def _ended(processes: list[psutil.Process], until: float) -> bool:
    """Whether all of them end in time."""
    while any(map(_lives, processes)):
        if time.monotonic() > until:
            return False
        time.sleep(_PAUSE)
    return True


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return str(process.name())
    return ""


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return list(process.cmdline())
    return []


def main() -> None:
    """Drains the node of this container; one that runs none, or is told nothing by Ray, is no failure of the hook."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=240.0, help="how long what runs may take to end")
    parser.add_argument("--raylet", type=int, help="the process of the node, where a machine runs several")
    arguments = parser.parse_args()
    found = [psutil.Process(arguments.raylet)] if arguments.raylet else raylets()
    if len(found) != 1:
        sys.exit(f"{len(found)} nodes run here, not one: {[process.pid for process in found]}")
    try:
        drain(found[0], arguments.seconds, lambda text: print(text, flush=True))  # noqa: T201  (what the hook tells)
    except DrainRefused as error:
        sys.exit(f"Ray did not drain the node: {error}")


if __name__ == "__main__":
    main()

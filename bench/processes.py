"""Runs whole commands and measures them. Knows processes, the page cache and rusage; knows nothing of what they do."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """One process: wall and CPU seconds, peak resident memory in MB, for some the seconds of the inner loop, and the
    seconds of a `sync` after it.
    """

    wall: float
    cpu: float
    peak: float
    inner: float | None = None
    sync: float = 0.0

    @property
    def durable(self) -> float:
        """Wall seconds until everything that was written is on the disk."""
        return self.wall + self.sync


def evict(inputs: Sequence[Path]) -> None:
    """Drop the inputs from the page cache."""
    for folder in inputs:
        handle = os.open(folder / "model.safetensors", os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def warm(inputs: Sequence[Path]) -> None:
    """Bring the inputs into the page cache."""
    for folder in inputs:
        with (folder / "model.safetensors").open("rb") as file:
            while file.read(64 << 20):
                pass


def measure(command: list[str], output: Path, inputs: Sequence[Path], *, cold: bool) -> tuple[Run, str]:
    """Run a command that makes `output`, alone on a synced disk; its figures and what it printed."""
    if output.is_dir():
        shutil.rmtree(output)
    output.unlink(missing_ok=True)
    evict(inputs) if cold else warm(inputs)
    os.sync()
    environment = {"HF_HUB_OFFLINE": "1", **os.environ}
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        printed, complaints = child.communicate()
        wall = time.perf_counter() - began
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{complaints}")
    began = time.perf_counter()
    os.sync()
    usage = json.loads(complaints.rsplit("USAGE", 1)[1])
    return Run(wall, usage["cpu"], usage["peak"], sync=time.perf_counter() - began), printed


# Runs a command and appends its own resource usage to standard error: a parent's maxrss mixes its children.
WRAPPER = """
import json, os, sys
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
figures = {"cpu": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss / 1000}
print("USAGE", json.dumps(figures), sep="", file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def wrapped(*command: str) -> list[str]:
    """The command with its own resource usage printed after it."""
    return [sys.executable, "-S", "-c", WRAPPER, *command]


def median(runs: list[Run], field: str) -> float:
    """The median of a figure over runs."""
    return statistics.median(getattr(run, field) for run in runs)

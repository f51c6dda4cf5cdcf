"""What this process may use of its machine, or of the container that it is in. Knows Linux; knows no work."""

import math
import os
from pathlib import Path

from merger.cgroups import Groups

_OWN = Groups()


def processors(groups: Groups = _OWN) -> int:
    """The processors that this process may use: those of its affinity (taskset, cpusets), not all there are, and no
    more than its container's share of time, rounded up.
    """
    allowed = len(os.sched_getaffinity(0))
    share = groups.processors()
    return allowed if share is None else max(1, min(allowed, math.ceil(share)))


def free_memory(groups: Groups = _OWN) -> int:
    """Bytes that processes can take without others being pushed out, and without the container's limit being met."""
    room = groups.free_memory()
    free = _free_of_machine()
    return free if room is None else min(free, room)


def _free_of_machine() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

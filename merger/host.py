"""What this process may use of the machine. Knows Linux; knows nothing of the work."""

import os
from pathlib import Path


def processors() -> int:
    """The processors that this process may run on: those of its affinity (taskset, cpusets), not all there are."""
    return len(os.sched_getaffinity(0))


def free_memory() -> int:
    """Bytes that processes can take without others being pushed out."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

"""What a process may use: as the kernel has it, not as many as the machine has."""

import os
import subprocess
import sys

from merger.host import free_memory, processors


def test_processors_are_those_of_the_affinity():
    allowed = sorted(os.sched_getaffinity(0))
    assert processors() == len(allowed)
    program = (
        f"import os; os.sched_setaffinity(0, {{{allowed[0]}}}); from merger.host import processors; print(processors())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_free_memory_is_some_of_all_that_there_is():
    assert 0 < free_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

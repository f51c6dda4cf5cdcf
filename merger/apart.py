"""Processes that work for another one, and end with it. Knows standard input; knows nothing of the work."""

import os
import queue
import sys
import threading
from collections.abc import Iterator


def requests() -> Iterator[str]:
    """The lines of standard input. When it ends, whoever asked is gone: this process ends at once, wherever it is."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield lines.get()

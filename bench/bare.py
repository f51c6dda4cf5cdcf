"""The limit: reads some files and writes as many bytes as one of them, by the same kind of calls as the engine, and
computes nothing.

Usage: bare.py THREADS OUTPUT INPUT [INPUT ...]; prints the seconds of the loop. Knows nothing of merger.
"""

import contextlib
import ctypes
import mmap
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np

BLOCK = 2 << 20
LIBC = ctypes.CDLL(None)


def main(threads: int, output: Path, inputs: list[Path]) -> float:
    """Seconds that the threads take for all blocks, the file's reservation and fsync included."""
    size = min(path.stat().st_size for path in inputs) // 4096 * 4096
    cached = [os.open(path, os.O_RDONLY) for path in inputs]
    direct = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in inputs]
    maps = [mmap.mmap(handle, 0, prot=mmap.PROT_READ) for handle in cached]
    addresses = [np.frombuffer(each, np.uint8).ctypes.data for each in maps]
    began = time.perf_counter()
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o666)
    os.posix_fallocate(target, 0, size)
    starts = iter(range(0, size, BLOCK))
    lock = threading.Lock()

    def work() -> None:
        buffers = [mmap.mmap(-1, BLOCK) for _ in range(len(inputs) + 1)]
        for buffer in buffers:
            buffer.madvise(mmap.MADV_HUGEPAGE)
        while True:
            with lock:
                start = next(starts, None)
            if start is None:
                return
            length = min(BLOCK, size - start)
            for i, buffer in enumerate(buffers[1:]):
                read(cached[i], direct[i], addresses[i], memoryview(buffer)[:length], start)
            os.pwrite(target, memoryview(buffers[0])[:length], start)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    os.fsync(target)
    return time.perf_counter() - began


def read(cached: int, direct: int, address: int, view: memoryview, start: int) -> None:
    """From the page cache where it holds the range, from the disk where it does not."""
    done = 0
    pages = (ctypes.c_ubyte * (len(view) // 4096))()
    LIBC.mincore(ctypes.c_void_p(address + start), ctypes.c_size_t(len(view)), pages)
    if all(bytes(pages)):
        with contextlib.suppress(BlockingIOError):
            done = os.preadv(cached, [view], start, os.RWF_NOWAIT) // 4096 * 4096
    while done < len(view):
        done += os.preadv(direct, [view[done:]], start + done)


if __name__ == "__main__":
    print(main(int(sys.argv[1]), Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]]))

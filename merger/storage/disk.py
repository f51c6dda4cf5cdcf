"""Reads and writes that pass the page cache where that is faster. Knows files and bytes; knows nothing of tensors.

Reading takes what the page cache holds and goes to the disk directly for the rest; writing goes to the
disk directly, into space that was reserved first. Where a file system has no direct access (tmpfs, some
network file systems) both fall back to the page cache.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from merger.errors import ReadFailed, SourceChanged, WriteFailed
from merger.kernels import Bytes

_LIBC = ctypes.CDLL(None)
PAGE = 4096  # addresses, offsets and lengths of direct input and output are multiples of this


def round_up(size: int) -> int:
    """`size` rounded up to a multiple of PAGE."""
    return -(-size // PAGE) * PAGE


def page_aligned(size: int) -> Bytes:
    """Fresh memory of at least `size` bytes, whole pages, which goes back to the system with the array.

    Large pages where the system has them: copying into small ones costs a fifth of the engine's time.
    """
    memory = mmap.mmap(-1, max(PAGE, round_up(size)))
    with contextlib.suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


class InputFile:
    """A file to read ranges from, by several threads at once; through the page cache where it is read `again`.

    Raises SourceChanged where the file is not the size that was planned.
    """

    def __init__(self, path: Path, size: int, *, again: bool = False) -> None:
        self.path, self.size = path, size
        self._cached = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if os.fstat(self._cached).st_size != size:
            os.close(self._cached)
            raise SourceChanged("changed its size since it was planned", where=str(path))
        self._direct = None if again else _open_direct(path, os.O_RDONLY)
        self._map = mmap.mmap(self._cached, 0, prot=mmap.PROT_READ) if size else None  # never read through
        self._address = np.frombuffer(self._map, np.uint8).ctypes.data if self._map else 0

    def read(self, start: int, stop: int, buffer: Bytes) -> Bytes:
        """The bytes from `start` to `stop`: a view into `buffer`, which is page-aligned and two pages longer.

        Raises ReadFailed with the file and the offset where the file ends early or the disk fails.
        """
        begin = start // PAGE * PAGE
        wanted = stop - begin
        view = buffer.data[: round_up(wanted)]
        try:
            done = self._read_cached(view, begin)
            if done < wanted:
                self._read_disk(view, begin, done, wanted)
        except OSError as error:
            raise ReadFailed(f"reading at {start:,}: {error.strerror}", where=str(self.path)) from error
        return buffer[start - begin : wanted]

    def _read_cached(self, view: memoryview, begin: int) -> int:
        """Copy what the page cache holds, where it holds all of it, without waiting; returns how many bytes."""
        if self._direct is None or not self._is_cached(begin, min(len(view), self.size - begin)):
            return 0
        try:
            return os.preadv(self._cached, [view], begin, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                return 0
            raise

    def _is_cached(self, begin: int, length: int) -> bool:
        """Whether the page cache holds a range. Asking by a read would make the kernel read ahead through the cache."""
        pages = (ctypes.c_ubyte * -(-length // PAGE))()
        failed = _LIBC.mincore(ctypes.c_void_p(self._address + begin), ctypes.c_size_t(length), pages)
        return bool(failed) or all(bytes(pages))

    def _read_disk(self, view: memoryview, begin: int, done: int, wanted: int) -> None:
        while done < wanted:
            page = done // PAGE * PAGE
            reached = page + self._read_once(view[page:], begin + page)
            if reached <= done:
                raise ReadFailed(f"ends at {begin + reached:,} bytes", where=str(self.path))
            done = reached

    def _read_once(self, view: memoryview, position: int) -> int:
        if self._direct is None:
            return os.preadv(self._cached, [view], position)
        try:
            return os.preadv(self._direct, [view], position)
        except OSError as error:
            if not _leave_direct(self._direct, error):
                raise
            return os.preadv(self._direct, [view], position)

    def close(self) -> None:
        os.close(self._cached)
        if self._direct is not None:
            os.close(self._direct)
        if self._map is not None:
            self._map.close()  # it holds a descriptor of its own

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()


class OutputFile:
    """A new file of known size, written in aligned pieces by several threads at once.

    The space is reserved at once, so a full disk shows at the start. Raises WriteFailed.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            direct = _open_direct(path, flags)
            self.is_direct = direct is not None
            self._file = direct if direct is not None else os.open(path, flags | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise WriteFailed(f"cannot be made: {error.strerror}", where=str(path)) from error
        try:
            if size:
                os.posix_fallocate(self._file, 0, round_up(size))
        except OSError as error:
            os.close(self._file)
            path.unlink()
            raise WriteFailed(f"cannot reserve {size:,} bytes: {error.strerror}", where=str(path)) from error

    def write(self, piece: Bytes, start: int) -> None:
        """Write a page-aligned piece, a whole number of pages, at `start`, a multiple of PAGE."""
        view, done = piece.data, 0
        try:
            while done < len(view):
                done += self._write_once(view[done:], start + done)
        except OSError as error:
            raise WriteFailed(f"writing at {start:,}: {error.strerror}", where=str(self.path)) from error

    def _write_once(self, view: memoryview, position: int) -> int:
        try:
            return os.pwrite(self._file, view, position)
        except OSError as error:
            if not _leave_direct(self._file, error):
                raise
            self.is_direct = False
            return os.pwrite(self._file, view, position)

    def finish(self) -> None:
        """Cut the file to its exact size and wait until it is on the disk."""
        try:
            os.ftruncate(self._file, self.size)
            os.fsync(self._file)
        except OSError as error:
            raise WriteFailed(f"cannot be finished: {error.strerror}", where=str(self.path)) from error

    def close(self) -> None:
        os.close(self._file)


def _open_direct(path: Path, flags: int) -> int | None:
    """A descriptor that passes the page cache, or None where the file system has none."""
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise


def _leave_direct(handle: int, error: OSError) -> bool:
    """After a refused direct call: go through the page cache from now on. False where that was not the cause."""
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
        return False
    fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return True


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file so that it is there whole or not at all, even after a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

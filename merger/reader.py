"""Reads what a batch of work needs: many ranges of many files into one buffer. Knows files, not what is in them."""

import threading
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from merger.ahead import Ahead, Segment
from merger.errors import ReadFailed, SourceChanged
from merger.expression import ByteRange, File
from merger.kernels import Bytes
from merger.remote import Remote
from merger.storage.disk import PAGE, InputFile, round_up

_DOWNLOADS = 4  # files at once


class RemoteInput:
    """A file elsewhere: from what was fetched ahead where that holds it, else asked for range by range."""

    def __init__(self, file: File, remote: Remote, among: "OpenFiles") -> None:
        self._file, self._remote, self._among = file, remote, among

    def _covering(self, position: int) -> Segment | None:
        ahead = self._among.ahead
        return ahead.covering(self._file, position) if ahead else None

    def read(self, start: int, stop: int, buffer: Bytes) -> Bytes:
        """The bytes from `start` to `stop`: a view into `buffer`, or into what was fetched. Raises ReadFailed."""
        segment = self._covering(start)
        if segment and stop <= segment.stop:
            return segment.part(start, stop)
        skip = start % PAGE
        out = buffer[skip : skip + stop - start]
        self._gather(start, stop, out)
        return out

    def _gather(self, start: int, stop: int, out: Bytes) -> None:
        position = start
        while position < stop:
            segment = self._covering(position)
            end = min(stop, segment.stop) if segment else stop
            piece = out[position - start : end - start]
            if segment:
                piece[:] = segment.part(position, end)
            else:
                self._remote.fetch(position, piece.data)
            position = end

    def close(self) -> None:
        """Nothing is held open."""


Input = InputFile | RemoteInput


class OpenFiles:
    """Input files, opened when they are first needed and shared by the threads; idle ones are closed when there
    are many.
    """

    LIMIT = 200  # of the 1024 descriptors that systems usually allow, at two or three a file

    def __init__(self, again: Collection[File] = (), cached: Collection[str] = ()) -> None:
        """`again` are the files that are read more than once, so that the page cache helps; `cached` the addresses of
        remote files that are downloaded whole when they are opened.
        """
        self._again, self._cached = again, cached
        self.ahead: Ahead | None = None  # what is fetched of the other remote files
        self._lock = threading.Lock()
        self._open: OrderedDict[File, Input] = OrderedDict()
        self._users: dict[File, int] = {}

    def lease(self, file: File) -> "_Lease":
        return _Lease(self, file)

    def acquire(self, file: File) -> Input:
        with self._lock:
            if file not in self._open:
                self._close_idle()
                self._open[file] = self._opened(file)
            self._open.move_to_end(file)
            self._users[file] = self._users.get(file, 0) + 1
            return self._open[file]

    def _opened(self, file: File) -> Input:
        if not isinstance(file.path, Remote):
            return _open_unchanged(file, file.path, again=file in self._again)
        if file.path.address in self._cached:
            return InputFile(file.path.download(), file.size, again=True)
        return RemoteInput(file, file.path, self)

    def release(self, file: File) -> None:
        with self._lock:
            self._users[file] -= 1

    def _close_idle(self) -> None:
        idle = [file for file in self._open if not self._users.get(file)]
        for file in idle[: max(0, len(self._open) - self.LIMIT + 1)]:
            self._open.pop(file).close()

    @contextmanager
    def serving(self, block: Hashable) -> Iterator[None]:
        """While a block is made: what is fetched for it stays until the end. Raises ReadFailed and SourceChanged."""
        if self.ahead is None:
            yield
            return
        self.ahead.begin(block)
        try:
            yield
        finally:
            self.ahead.done(block)

    def stop(self) -> None:
        """Let no thread wait for what is fetched ahead."""
        if self.ahead:
            self.ahead.close()

    def close(self) -> None:
        if self.ahead:
            self.ahead.close()
        for file in self._open.values():
            file.close()


class _Lease:
    """An input file for as long as the `with` block lasts."""

    def __init__(self, files: OpenFiles, file: File) -> None:
        self._files, self._file = files, file

    def __enter__(self) -> Input:
        return self._files.acquire(self._file)

    def __exit__(self, *_raised: object) -> None:
        self._files.release(self._file)


def _open_unchanged(file: File, path: Path, *, again: bool) -> InputFile:
    """Raises SourceChanged where the file is not the one that was planned."""
    try:
        if path.stat().st_mtime_ns != file.mtime_ns:
            raise SourceChanged("was written to since it was planned", where=str(path))
        return InputFile(path, file.size, again=again)
    except OSError as error:
        raise SourceChanged(f"cannot be opened any more: {error.strerror}", where=str(path)) from error


def on_disk(file: File) -> Path:
    """The whole file on this machine, downloaded first where it is elsewhere. Raises ReadFailed and SourceChanged."""
    return file.path.download() if isinstance(file.path, Remote) else file.path


def download(files: Iterable[Remote]) -> None:
    """Bring whole remote files to this machine, several at once. Raises ReadFailed and SourceChanged."""
    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        list(pool.map(lambda file: file.download(), files))


def part_of(file: File, start: int, stop: int) -> bytes:
    """The bytes of a file from `start` to `stop`, few enough to be held. Raises ReadFailed where it ends early."""
    if isinstance(file.path, Remote):
        content = bytearray(stop - start)
        file.path.fetch(start, memoryview(content))
        return bytes(content)
    with file.path.open("rb") as opened:
        opened.seek(start)
        found = opened.read(stop - start)
    if len(found) != stop - start:
        raise ReadFailed("ends early", where=str(file.path))
    return found


def read(wanted: Iterable[ByteRange], inputs: OpenFiles, buffer: Bytes) -> dict[ByteRange, Bytes]:
    """Read the ranges into the buffer, neighbours at once; the arrays are views of it."""
    values: dict[ByteRange, Bytes] = {}
    position = 0
    for run in _runs(wanted):
        start, stop = run[0].start, max(part.stop for part in run)
        with inputs.lease(run[0].file) as file:
            data = file.read(start, stop, buffer[position:])
        position += round_up(stop - start // PAGE * PAGE)
        for part in run:
            values[part] = data[part.start - start : part.stop - start]
    return values


def _runs(wanted: Iterable[ByteRange]) -> Iterator[list[ByteRange]]:
    """Ranges grouped with their neighbours: in one file, overlapping or less than the pages that a read apart costs."""
    run: list[ByteRange] = []
    stop = 0
    for part in sorted(wanted, key=lambda part: (id(part.file), part.start)):
        if run and (part.file is not run[0].file or part.start > stop + PAGE):
            yield run
            run = []
        stop = max(stop, part.stop) if run else part.stop
        run.append(part)
    if run:
        yield run

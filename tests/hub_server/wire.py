"""An HTTP/1.1 server on plain sockets and threads, which can be told to misbehave.

Knows requests, answers, ranges, files that the kernel sends, and how each fault is done to a connection. Knows nothing
of the Hub: an `answer` function is given. Sockets are used directly because a test wants to cut them.
"""

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from tests.hub_server.faults import Fault, Faults
from tests.hub_server.log import OF_INTEREST, Entry, Log

_STEP = 1 << 20


@dataclass(frozen=True)
class Part:
    """Bytes of a file that are sent without passing through Python."""

    path: Path
    start: int
    length: int


Piece = bytes | Part


def length(piece: Piece) -> int:
    return piece.length if isinstance(piece, Part) else len(piece)


@dataclass(frozen=True)
class Answer:
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: tuple[Piece, ...] = ()
    violation: str | None = None

    @property
    def size(self) -> int:
        return sum(map(length, self.body))


def sliced(pieces: tuple[Piece, ...], start: int, end: int) -> tuple[Piece, ...]:
    """The bytes [start, end) of what the pieces hold together."""
    found: list[Piece] = []
    position = 0
    for piece in pieces:
        size = length(piece)
        low, high = max(start - position, 0), min(end - position, size)
        if low < high:
            part = replace(piece, start=piece.start + low, length=high - low) if isinstance(piece, Part) else None
            found.append(part or piece[low:high])  # type: ignore[index]
        position += size
    return tuple(found)


def byte_range(value: str | None, size: int) -> tuple[int, int] | None:
    """[start, end) of a Range header with one range; None for no range or one that is not understood.

    Raises:
        ValueError: nothing of the range lies in the file.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", (value or "").strip())
    if match is None or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    start, end = (int(first), int(last or size - 1) + 1) if first else (max(0, size - int(last)), size)
    if start >= size or end <= start:
        raise ValueError(f"{value} of {size} bytes")
    return start, min(end, size)


def ranged(request: "Request", body: tuple[Piece, ...], headers: Mapping[str, str]) -> Answer:
    """The body, or the range of it that the request asks for."""
    size = sum(map(length, body))
    headers = {"Accept-Ranges": "bytes", **headers}
    try:
        asked = byte_range(request.headers.get("range"), size)
    except ValueError:
        return Answer(416, {**headers, "Content-Range": f"bytes */{size}"})
    if asked is None:
        return Answer(200, headers, body)
    start, end = asked
    return Answer(206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{size}"}, sliced(body, start, end))


class Request:
    """What a client asks. `path` is still quoted: a revision may hold quoted slashes. Headers are in lower case."""

    def __init__(self, handler: BaseHTTPRequestHandler, ignore_range: bool = False) -> None:
        self.method = handler.command
        self.target = handler.path
        self.path, _, self.query_string = handler.path.partition("?")
        self.query = {key: values[-1] for key, values in parse_qs(self.query_string, True).items()}
        self.headers = {key.lower(): value for key, value in handler.headers.items()}
        self.asked_range = self.headers.get("range")
        if ignore_range:
            self.headers.pop("range", None)
        self.received = 0
        self._pieces = self._read(handler)

    @property
    def token(self) -> str | None:
        kind, _, token = self.headers.get("authorization", "").partition(" ")
        return token if kind.lower() == "bearer" else None

    def pieces(self) -> Iterator[bytes]:
        """The body as it comes; each byte once."""
        return self._pieces

    def read(self) -> bytes:
        return b"".join(self._pieces)

    def _read(self, handler: BaseHTTPRequestHandler) -> Iterator[bytes]:
        if "chunked" in self.headers.get("transfer-encoding", ""):
            yield from self._read_chunked(handler)
        else:
            yield from self._read_exactly(handler, int(self.headers.get("content-length", 0)))

    def _read_exactly(self, handler: BaseHTTPRequestHandler, size: int) -> Iterator[bytes]:
        while size:
            piece = handler.rfile.read(min(size, _STEP))
            if not piece:
                raise ConnectionError("the client left in the middle of its body")
            size -= len(piece)
            self.received += len(piece)
            yield piece

    def _read_chunked(self, handler: BaseHTTPRequestHandler) -> Iterator[bytes]:
        while size := int(handler.rfile.readline().split(b";")[0], 16):
            yield from self._read_exactly(handler, size)
            handler.rfile.readline()
        while handler.rfile.readline().strip():
            pass


class _Handler(BaseHTTPRequestHandler):
    """One connection: requests one after the other until somebody closes it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Listener"

    def setup(self) -> None:
        self.server.connections.add(self.request)
        if self.server.closing.is_set():  # accepted just before `close`, which may not have seen it
            self.request.shutdown(socket.SHUT_RDWR)
        super().setup()

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()
        self.server.connections.discard(self.request)

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client left, or the server is being closed
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def serve(self) -> None:
        began, server = time.time(), self.server
        hidden = self.path.startswith("/__")  # the test's own requests
        range_ = self.headers.get("range")
        fault = (None if hidden else server.faults.strike(server.origin, self.command, self.path, range_)) or Fault()
        request = Request(self, fault.ignore_range)
        if fault.delay:
            server.closing.wait(fault.delay)
        log = Log() if hidden else server.log
        try:
            answer = self._answer(request, fault)
        except OSError:
            log.write(self._entry(request, fault, Answer(0), began))
            raise
        entry = self._entry(request, fault, answer, began)
        number, sent = log.write(entry), 0
        try:
            sent = self._send(answer, fault, entry.sent)
        finally:
            log.write(replace(entry, sent=sent, seconds=time.time() - began), number)

    def _entry(self, request: Request, fault: Fault, answer: Answer, began: float) -> Entry:
        return Entry(
            method=self.command,
            path=request.path,
            query=request.query_string,
            origin=self.server.origin,
            range=request.asked_range,
            status=0 if fault.drop else answer.status,
            sent=self._meant(answer, fault),
            received=request.received,
            token=request.token,
            time=began,
            fault=str(fault) if fault != Fault() else None,
            violation=answer.violation,
            headers={key: value for key, value in request.headers.items() if key in OF_INTEREST},
        )

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = serve

    def _answer(self, request: Request, fault: Fault) -> Answer:
        struck = fault.status is not None or fault.drop
        answer = Answer() if struck and not fault.after else self.server.answer(request)
        for _ in request.pieces():  # what nobody has read would be taken for the next request
            pass
        if fault.status is None:
            return answer
        body = (f'{{"error": "{fault.message}"}}'.encode(),)
        return Answer(fault.status, {"Content-Type": "application/json", **fault.headers}, body)

    def _meant(self, answer: Answer, fault: Fault) -> int:
        if self.command == "HEAD" or fault.drop:
            return 0
        return answer.size if fault.cut is None else min(answer.size, fault.cut)

    def _send(self, answer: Answer, fault: Fault, meant: int) -> int:
        if fault.drop:
            self._hang_up()
            return 0
        head = [f"HTTP/1.1 {answer.status} -", f"Content-Length: {answer.size}"]
        head += [f"{name}: {value}" for name, value in answer.headers.items()]
        self._pending = "\r\n".join([*head, "", ""]).encode("latin-1")
        sent = 0
        with contextlib.ExitStack() as self._opened:
            self._files: dict[Path, int] = {}
            for piece in _flipped(sliced(answer.body, 0, meant), fault.flip):
                sent += self._send_piece(piece, fault.rate)
            self._flush()
        if fault.cut is not None and self.command != "HEAD" and meant < answer.size:
            self._hang_up()
        return sent

    def _send_piece(self, piece: Piece, rate: float | None) -> int:
        if rate is not None:
            step = max(1, int(rate / 20))
            for start in range(0, length(piece), step):
                for part in sliced((piece,), start, start + step):
                    self._send_piece(part, None)
                self._flush()
                self.server.closing.wait(step / rate)
        elif isinstance(piece, bytes):
            self._pending += piece
            if len(self._pending) > _STEP:
                self._flush()
        else:
            self._flush(socket.MSG_MORE)
            self._send_file(piece)
        return length(piece)

    def _flush(self, flags: int = 0) -> None:
        """A head and a small body go out together."""
        if self._pending:
            self.connection.sendall(self._pending, flags)
        self._pending = b""

    def _send_file(self, part: Part) -> None:
        if part.path not in self._files:
            self._files[part.path] = self._opened.enter_context(part.path.open("rb")).fileno()
        position, end = part.start, part.start + part.length
        while position < end:
            sent = os.sendfile(self.connection.fileno(), self._files[part.path], position, end - position)
            if not sent:
                raise ConnectionError(f"{part.path} is shorter than it was")
            position += sent

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def _flipped(body: tuple[Piece, ...], place: int | None) -> tuple[Piece, ...]:
    """The body with one bit of one byte changed."""
    size = sum(map(length, body))
    if place is None or place >= size:
        return body
    (piece,) = sliced(body, place, place + 1)
    byte = piece if isinstance(piece, bytes) else _content(piece)
    return (*sliced(body, 0, place), bytes([byte[0] ^ 1]), *sliced(body, place + 1, size))


def _content(part: Part) -> bytes:
    with part.path.open("rb") as file:
        return os.pread(file.fileno(), part.length, part.start)


class Listener(ThreadingHTTPServer):
    """One origin on a port of its own of the loopback interface, served from `start` to `close`."""

    daemon_threads = False  # `close` waits for them
    request_queue_size = 128

    def __init__(self, origin: str, answer: Callable[[Request], Answer], faults: Faults, log: Log, port: int) -> None:
        self.origin, self.answer, self.faults, self.log = origin, answer, faults, log
        self.connections: set[socket.socket] = set()
        self.closing = threading.Event()
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def start(self) -> None:
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), name=f"hub-{self.origin}")
        self._thread.start()

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self._thread.join()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

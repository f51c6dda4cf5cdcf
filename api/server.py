"""Serves an application over HTTP. Knows sockets and how a server ends in order; knows nothing of what it serves."""

import math
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from merger.errors import RequestError


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket that says it is TCP: only then does asyncio send small answers without delay."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        remedy = "Choose another --host or --port."
        raise RequestError(f"cannot listen: {error.strerror}", where=f"{host}:{port}", remedy=remedy) from error
    with listener:
        yield listener


class Server(uvicorn.Server):
    """Sets `ending` before it waits for requests: streams that would go on end themselves then."""

    def __init__(self, app: ASGIApp, grace: float, ending: threading.Event, log_level: str | None = None) -> None:
        config = uvicorn.Config(
            app, log_config=None, log_level=log_level, access_log=False, timeout_graceful_shutdown=math.ceil(grace)
        )
        super().__init__(config)
        self._ending = ending

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come: accept nothing more, let requests end."""
        self._ending.set()
        super().handle_exit(sig, frame)

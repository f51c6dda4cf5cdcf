"""What stands before the store: logs requests, makes faults. Knows WSGI; knows nothing of S3 but its errors' form."""

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

Start = Callable[..., Any]
Environ = dict[str, Any]
App = Callable[[Environ, Start], Iterable[bytes]]


@dataclass
class Entry:
    """A request that was answered, and how."""

    method: str
    path: str  # bucket/key
    query: str
    range: str
    received: int
    status: int = 0
    sent: int = 0


class Watch:
    """An application before another one; `/__log`, `/__faults` and `/__buckets/NAME` are its own.

    A fault is a rule: what it is for (`method`, parts of `path` and of `query`), how many matches it lets pass
    (`after`), how often it acts (`times`), and what it does: answer with `status`, `cut` the body after so many bytes,
    `hold` the request until the faults are cleared, or put `unconditional`ly, as stores do that know no conditions.
    """

    def __init__(self, app: App, make_bucket: Callable[[str], None], remove: Callable[[str], None]) -> None:
        self._app, self._make_bucket, self._remove = app, make_bucket, remove
        self._log: list[Entry] = []
        self._rules: list[dict[str, Any]] = []
        self._lock, self._writes, self._cleared = threading.Lock(), threading.Lock(), threading.Event()

    def __call__(self, environ: Environ, start: Start) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path.startswith("/__"):
            return self._own(environ, start)
        name = unquote(path).lstrip("/")
        asked = environ.get("HTTP_RANGE", "")
        length = int(environ.get("CONTENT_LENGTH") or 0)
        entry = Entry(environ["REQUEST_METHOD"], name, environ.get("QUERY_STRING", ""), asked, length)
        with self._lock:
            self._log.append(entry)
            rule = self._rule(entry)
        return self._answer(environ, start, entry, rule)

    def _answer(self, environ: Environ, start: Start, entry: Entry, rule: dict[str, Any]) -> Iterable[bytes]:
        if rule.get("hold"):
            self._cleared.wait()
        if rule.get("status"):
            return _error(environ, start, entry, rule["status"])
        if rule.get("unconditional"):
            self._remove(entry.path)

        def begin(status: str, headers: Any, *more: Any) -> Any:
            entry.status = int(status.split(maxsplit=1)[0])
            return start(status, headers, *more)

        if "HTTP_IF_NONE_MATCH" in environ:
            with self._writes:  # a real store looks and writes in one step
                body = self._app(environ, begin)
        else:
            body = self._app(environ, begin)
        return _counted(body, entry, rule.get("cut"))

    def _rule(self, entry: Entry) -> dict[str, Any]:
        for rule in self._rules:
            fits = rule.get("method", entry.method) == entry.method and rule.get("path", "") in entry.path
            if not fits or rule.get("query", "") not in entry.query or rule["times"] <= 0:
                continue
            if rule.get("after", 0) > 0:
                rule["after"] -= 1
                continue
            rule["times"] -= 1
            return rule
        return {}

    def _own(self, environ: Environ, start: Start) -> Iterable[bytes]:
        what, _, name = environ["PATH_INFO"][3:].partition("/")
        method = environ["REQUEST_METHOD"]
        content: Any = None
        with self._lock:
            if what == "log":
                content = [asdict(entry) for entry in self._log]
                if method == "DELETE":
                    self._log.clear()
            elif what == "faults" and method == "POST":
                length = int(environ["CONTENT_LENGTH"])
                self._rules.append({"times": 1 << 30, **json.loads(environ["wsgi.input"].read(length))})
                self._cleared.clear()
            elif what == "faults":
                self._rules.clear()
                self._cleared.set()
        if what == "buckets":
            self._make_bucket(name)
        body = json.dumps(content).encode()
        start("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]


def _error(environ: Environ, start: Start, entry: Entry, status: int) -> list[bytes]:
    environ["wsgi.input"].read(entry.received)  # what is left of a request would be taken for the next one
    entry.status = status
    body = f"<Error><Code>Injected</Code><Message>fault {status}</Message></Error>".encode()
    start(f"{status} {HTTPStatus(status).phrase}", [("Content-Length", str(len(body)))])
    return [body]


def _counted(body: Iterable[bytes], entry: Entry, cut: int | None) -> Iterator[bytes]:
    for piece in body:
        if cut is not None and entry.sent + len(piece) > cut:
            yield piece[: cut - entry.sent]
            raise ConnectionAbortedError("cut by the test")
        entry.sent += len(piece)
        yield piece

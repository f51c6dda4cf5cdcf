"""The list of requests that the server got. Knows what a test may want to ask about one; knows nothing of HTTP."""

import re
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# Headers that say something about a client's behaviour; the others would only make the log long.
OF_INTEREST = frozenset(
    {"content-type", "if-none-match", "range", "user-agent", "x-request-id", "x-xet-session-id", "x-amzn-trace-id"}
)


@dataclass(frozen=True)
class Entry:
    """One request and its answer. `sent` and `received` count bytes of bodies. `fault` says what was done to it."""

    method: str
    path: str
    query: str
    origin: str  # api, cdn or cas
    range: str | None
    status: int  # 0: no answer; the connection was dropped, or the client left in the middle of its request
    sent: int
    received: int
    token: str | None
    time: float
    seconds: float = 0.0
    fault: str | None = None
    violation: str | None = None  # what no client may do, such as a token sent to the CDN
    headers: Mapping[str, str] = field(default_factory=dict)

    def matches(self, origin: str | None, method: str | None, path: str) -> bool:
        return origin in (None, self.origin) and method in (None, self.method) and bool(re.search(path, self.path))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Log:
    """Entries in the order in which their answers began.

    An entry is written before the answer's first byte, so that a client that has its answer finds itself in the log;
    it is replaced afterwards if less was sent than meant.
    """

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._next = 0
        self._lock = threading.Lock()

    def write(self, entry: Entry, number: int | None = None) -> int:
        """Append an entry, or put it in the place of an earlier one (lost if the log was cleared in between)."""
        with self._lock:
            if number is None:
                number, self._next = self._next, self._next + 1
            elif number not in self._entries:
                return number
            self._entries[number] = entry
            return number

    def entries(self, origin: str | None = None, method: str | None = None, path: str = "") -> list[Entry]:
        """The entries of an origin, a method and a path that the expression is found in."""
        with self._lock:
            known = list(self._entries.values())
        return [entry for entry in known if entry.matches(origin, method, path)]

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

"""What a runner tells the API and hears from it. Knows HTTP and patience; knows nothing of tensors or Ray.

Reports are numbered and sent in order; one whose answer was lost is sent again as it was, and counts once. The API may
be away for as long as it likes: the work goes on, only publishing has to wait for its word.
"""

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any

import httpx2

from merger.secret import Token

_PATIENCE = 900.0  # seconds for an answer that the attempt cannot go on without
_LONGEST_LINE = 5000  # characters
_PASSING = frozenset({429, 500, 502, 503, 504})


class Superseded(Exception):
    """The attempt no longer counts; its runner must leave everything as it is and go."""


class Word(Enum):
    """What the API wants of a runner."""

    GO_ON = "go on"
    CANCEL = "cancel"
    LEAVE = "leave"


@dataclass(frozen=True)
class Progress:
    """How far an attempt is: its phase, bytes of output done and in all, shards done and in all; bytes it has read;
    `uploads` counts the signs of work that moves nothing else: uploads, tensors that are made as a whole.
    """

    phase: str = "queued"
    done: int = 0
    total: int = 0
    shards_done: int = 0
    shards: int = 0
    read: int = 0
    uploads: int = 0


@dataclass(frozen=True)
class Order:
    """What the API tells a runner that has claimed an attempt. `hub_token` travels in this answer and nowhere else."""

    recipe: Mapping[str, Any]
    output: str
    working_folder: str
    source_roots: tuple[str, ...]
    object_roots: tuple[str, ...]
    task_cpus: float
    task_memory: int
    heartbeat_seconds: float
    hub_token: Token | None = None
    task_device: str = "auto"
    shared_folders: bool = True

    def content(self) -> dict[str, Any]:
        """The order as it is sent, its token in plain text."""
        token = self.hub_token.reveal() if self.hub_token else None
        return {**vars(self), "hub_token": token}


def order_of(content: Mapping[str, Any]) -> Order:
    """The order that was sent so. What a later version of the API says beside it is not for this one."""
    content = {field.name: content[field.name] for field in fields(Order) if field.name in content}
    roots = {name: tuple(content[name]) for name in ("source_roots", "object_roots")}
    token = content.get("hub_token")
    return Order(**{**content, **roots, "hub_token": Token(token) if token else None})


class Api:
    """The API as an attempt of a job sees it."""

    def __init__(self, server: str, job: str, attempt: int, transport: httpx2.BaseTransport | None = None) -> None:
        self._http = httpx2.Client(base_url=server, timeout=10.0, transport=transport, trust_env=False)
        self._path = f"/v1/internal/jobs/{job}/attempts/{attempt}"

    def claim(self, code: str) -> Order:
        """Take the attempt. Raises Superseded where it is not to be had."""
        answer = self._insist("claim", {"claim": code, "nonce": str(uuid.uuid4())})
        self._http.headers["Authorization"] = f"Bearer {answer['token']}"
        return order_of(answer["order"])

    def report(self, content: Mapping[str, Any]) -> Word:
        """Send a report once. Raises Superseded, and httpx2.HTTPError where it should be sent again."""
        return Word(self._post("report", content)["word"])

    def ask_to_publish(self) -> Word:
        """Wait for the word to publish, or to cancel. Raises Superseded."""
        return Word(self._insist("grant", {})["word"])

    def finish(self, outcome: str, content: Mapping[str, Any]) -> None:
        """Say how the attempt ended: `succeeded`, `failed` or `canceled`."""
        self._insist(outcome, content)

    def _insist(self, what: str, content: Mapping[str, Any]) -> dict[str, Any]:
        until, pause = time.monotonic() + _PATIENCE, 0.2
        while True:
            try:
                return self._post(what, content)
            except httpx2.HTTPError:
                if time.monotonic() > until:
                    raise
                time.sleep(pause)
                pause = min(2 * pause, 5.0)

    def _post(self, what: str, content: Mapping[str, Any]) -> dict[str, Any]:
        response = self._http.post(f"{self._path}/{what}", json=content)
        if response.is_client_error and response.status_code not in _PASSING:
            raise Superseded(f"{what}: {response.status_code} {response.text[:300]}")
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        return answer


class Reporter:
    """Sends reports from a thread of its own, one every heartbeat, and calls `on_word` when the attempt has to stop.

    Nothing that it is told leaves with the text of `token` in it.
    """

    def __init__(self, api: Api, seconds: float, on_word: Callable[[Word], None], token: Token | None = None) -> None:
        self._api, self._seconds, self._on_word, self._token = api, seconds, on_word, token
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._progress = Progress()
        self._events: list[dict[str, Any]] = []
        self._lines: list[str] = []
        self._unsent: dict[str, Any] | None = None
        self._number = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    def start(self) -> None:
        """Begin to report."""
        self._thread.start()

    def progress(self, progress: Progress) -> None:
        """Note how far the attempt is."""
        with self._lock:
            self._progress = progress

    def event(self, kind: str, **data: Any) -> None:
        """Note that something happened."""
        with self._lock:
            self._events.append({"kind": kind, "data": self._hidden(data)})

    def line(self, text: str) -> None:
        """Note a line of the log, or its beginning where it is very long."""
        with self._lock:
            self._lines.append(self.hide(text)[:_LONGEST_LINE])  # in this order: half a token is none that is found

    def finish(self, outcome: str, content: Mapping[str, Any]) -> None:
        """Send what is left, then the outcome, and report no more. Raises Superseded."""
        self._stopped.set()
        self._thread.join()
        self.flush()
        self._api.finish(outcome, self._hidden(content))

    def hide(self, text: str) -> str:
        """A text as it may be seen: the last line of defence, for what an error's message may hold."""
        return self._token.hidden_in(text) if self._token else text

    def _hidden(self, content: Any) -> Any:
        """JSON with no token in its texts; names of fields are our own."""
        if isinstance(content, Mapping):
            return {name: self._hidden(value) for name, value in content.items()}
        if isinstance(content, list | tuple):
            return [self._hidden(value) for value in content]
        return self.hide(content) if isinstance(content, str) else content

    def flush(self) -> None:
        """Wait until the API knows everything so far. Raises Superseded."""
        while self._unsent or self._events or self._lines:
            try:
                self._send()
            except httpx2.HTTPError:
                time.sleep(self._seconds)

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            try:
                word = self._send()
            except Superseded:
                word = Word.LEAVE
            except httpx2.HTTPError:
                continue
            if word is not Word.GO_ON:
                self._on_word(word)

    def _send(self) -> Word:
        with self._sending:
            if self._unsent is None:
                with self._lock:
                    self._number += 1
                    content = {"progress": asdict(self._progress), "events": self._events, "lines": self._lines}
                    self._events, self._lines = [], []
                self._unsent = {"report": self._number, **content}
            word = self._api.report(self._unsent)
            self._unsent = None
            return word

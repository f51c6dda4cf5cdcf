"""Ranges of files over HTTP. Knows requests, redirects and signed addresses; knows nothing of hubs or of models.

A file is asked for at its own address, with a token, and the answer names a signed address elsewhere, which is good for
a while and gets no token. One thread asks, all use what it got until it expires.
"""

import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx2

from merger.errors import MergerError, ReadFailed, SourceChanged, SourceError
from merger.secret import Token
from merger.storage.patience import PASSING, Again, Patience, asked_delay

_TIMEOUT = httpx2.Timeout(30.0, connect=15.0)  # seconds of silence
_SLOWEST = 64 << 10  # bytes a second; a connection that gives less is given up
_GRACE = 30.0  # seconds
_EXPIRED = {400, 401, 403, 404, 410}  # what storage answers to an address that is no longer good
_REDIRECTS = 5


@dataclass(frozen=True)
class Address:
    """Where the bytes of a file are now; `token` goes with the request where that is the place it is meant for."""

    url: str
    token: Token | None = None


class Addresses:
    """The addresses of this process's files, by the URL that they are resolved from. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._known: dict[str, Address] = {}

    def known(self, url: str) -> Address | None:
        """The address of a file, if it was resolved already."""
        return self._known.get(url)

    def learn(self, url: str, address: Address) -> None:
        """Take what another process resolved, unless this one knows better."""
        self._known.setdefault(url, address)

    def of(self, url: str, token: Token | None, useless: Address | None = None) -> Address:
        """The address of a file, resolved anew where all that is known is the `useless` one. Raises Again."""
        with self._lock:
            lock = self._locks.setdefault(url, threading.Lock())
        with lock:
            known = self._known.get(url)
            if known is None or known == useless:
                known = self._known[url] = _resolve(url, token)
            return known


ADDRESSES = Addresses()
_CLIENTS: dict[int, httpx2.Client] = {}
_CLIENTS_LOCK = threading.Lock()


def client() -> httpx2.Client:
    """The connections of this process."""
    with _CLIENTS_LOCK:
        process = os.getpid()
        if process not in _CLIENTS:
            limits = httpx2.Limits(max_connections=64, max_keepalive_connections=32)
            _CLIENTS[process] = httpx2.Client(timeout=_TIMEOUT, limits=limits, headers={"Accept-Encoding": "identity"})
        return _CLIENTS[process]


def _resolve(url: str, token: Token | None) -> Address:
    """Follow redirects: with the token on the same host, without on any other."""
    home = httpx2.URL(url)
    here = home
    for _ in range(_REDIRECTS):
        try:
            answer = client().request("HEAD", here, headers=_authorization(token))
        except httpx2.HTTPError as error:
            raise Again(f"{type(error).__name__}: {error}") from error
        if answer.status_code == 200:
            return Address(str(here), token)
        if answer.status_code not in (301, 302, 303, 307, 308):
            raise _failure(url, answer)
        target = here.join(answer.headers.get("location", ""))
        if home.scheme == "https" and target.scheme != "https":
            raise SourceError(f"is redirected to {target.host} without encryption", where=url)
        if _origin(target) != _origin(home):
            return Address(str(target))
        here = target
    raise SourceError("is redirected again and again", where=url)


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _authorization(token: Token | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token.reveal()}"} if token else {}


def _failure(url: str, answer: httpx2.Response) -> MergerError | Again:
    if answer.status_code in PASSING:
        return Again(f"HTTP {answer.status_code}", asked_delay(answer.headers))
    message = answer.headers.get("x-error-message", "")
    return ReadFailed(f"HTTP {answer.status_code} {message}".strip(), where=url)


# ---- reading ------------------------------------------------------------------------------------------


def fetch(url: str, token: Token | None, size: int, start: int, into: memoryview) -> None:
    """Fill `into` with the bytes from `start` on of the file of `size` bytes at `url`.

    Goes on where a connection was cut, asks again what may pass, resolves again what has expired. Raises ReadFailed,
    SourceChanged where the file has another size.
    """
    patience = Patience(url)
    done, useless = 0, None
    while done < len(into):
        try:
            address = ADDRESSES.of(url, token, useless)
            try:
                for count in _pieces(url, address, size, start + done, into[done:]):
                    done += count
                    patience.renew()
            except _Expired:
                useless = address
                raise
        except Again as failure:
            patience.spend(failure)


class _Expired(Again):
    """The signed address is no longer good."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}: the address has expired", 0.0)


def _pieces(url: str, address: Address, size: int, start: int, into: memoryview) -> Iterator[int]:
    """One request; yields how many bytes came, and raises Again where fewer came than were asked for."""
    stop = start + len(into)
    headers = {"Range": f"bytes={start}-{stop - 1}", **_authorization(address.token)}
    began, done = time.monotonic(), 0
    try:
        with client().stream("GET", address.url, headers=headers) as answer:
            _check_answer(url, address, answer, size, start, stop)
            for piece in answer.iter_raw():
                if done + len(piece) > len(into):
                    raise ReadFailed("gives more bytes than were asked for", where=url)
                into[done : done + len(piece)] = piece
                done += len(piece)
                yield len(piece)
                if time.monotonic() - began > _GRACE + done / _SLOWEST:
                    raise Again(f"{done:,} bytes in {time.monotonic() - began:.0f} s")
    except httpx2.HTTPError as error:
        raise Again(f"{type(error).__name__}: {error}") from error
    if done < len(into):
        raise Again(f"the answer ended after {done:,} of {len(into):,} bytes")


def _check_answer(url: str, address: Address, answer: httpx2.Response, size: int, start: int, stop: int) -> None:
    status = answer.status_code
    if status == 200:
        raise Again("the server sends the whole file where a range was asked for")
    if status == 416:
        raise SourceChanged("is shorter than it was", where=url)
    if status != 206:
        if status in _EXPIRED and address.token is None:
            raise _Expired(status)
        raise _failure(url, answer)
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.headers.get("content-range", ""))
    if not found or (int(found[1]), int(found[2])) != (start, stop - 1):
        raise Again("the server sends another range than was asked for")
    if found[3] not in ("*", str(size)):
        raise SourceChanged(f"has {found[3]} bytes, {size:,} were planned", where=url)

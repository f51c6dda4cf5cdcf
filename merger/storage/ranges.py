"""Ranges of files over HTTP. Knows requests, redirects and signed addresses; knows nothing of hubs or of models.

A file is asked for at its own address, with a token, and the answer names a signed address elsewhere, which is good for
a while and gets no token. One thread asks, all use what it got until it expires.
"""

import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any
from urllib.parse import unquote, urljoin
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import HTTPError
from urllib3.util import parse_url

from merger.errors import MergerError, ReadFailed, SourceChanged, SourceError
from merger.secret import Token
from merger.storage.patience import PASSING, Again, Patience, asked_delay

_TIMEOUT = urllib3.Timeout(connect=15.0, read=30.0)  # seconds of silence
_SLOWEST = 64 << 10  # bytes a second; a connection that gives less is given up
_GRACE = 30.0  # seconds
_PIECE = 1 << 20  # bytes that are taken at once, fewer where fewer have come
_EXPIRED = {400, 401, 403, 404, 410}  # what storage answers to an address that is no longer good
_REDIRECTS = 5


@dataclass(frozen=True)
class Address:
    """Where the bytes of a file are now; `token` goes with the request where that is the place it is meant for."""

    url: str
    token: Token | None = None


class Addresses:
    """The addresses of this process's files, by the URL that they are resolved from and the token that may: what one
    token opens is closed to the others. Safe for threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[tuple[str, Token | None], threading.Lock] = {}
        self._known: dict[tuple[str, Token | None], Address] = {}

    def known(self, url: str, token: Token | None) -> Address | None:
        """The address of a file, if it was resolved already."""
        return self._known.get((url, token))

    def learn(self, url: str, token: Token | None, address: Address) -> None:
        """Take what another process resolved, unless this one knows better."""
        self._known.setdefault((url, token), address)

    def of(self, url: str, token: Token | None, useless: Address | None = None) -> Address:
        """The address of a file, resolved anew where all that is known is the `useless` one. Raises Again."""
        key = url, token
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            known = self._known.get(key)
            if known is None or known == useless:
                known = self._known[key] = _resolve(url, token)
            return known


ADDRESSES = Addresses()
_POOLS: dict[tuple[int, str], urllib3.PoolManager] = {}
_POOLS_LOCK = threading.Lock()
_CONNECTIONS = 64  # to one host


def _pool(url: str) -> urllib3.PoolManager:
    """The connections of this process to a host, through the proxy that the environment names for it."""
    target, proxies = parse_url(url), getproxies()
    proxy = "" if proxy_bypass(target.host or "") else proxies.get(target.scheme or "") or proxies.get("all", "")
    with _POOLS_LOCK:
        key = (os.getpid(), proxy)
        if key not in _POOLS:
            options: dict[str, Any] = {"timeout": _TIMEOUT, "retries": False, "maxsize": _CONNECTIONS}
            _POOLS[key] = _through(proxy, options) if proxy else urllib3.PoolManager(**options)
        return _POOLS[key]


def _through(proxy: str, options: Mapping[str, Any]) -> urllib3.ProxyManager:
    """Connections through a proxy, with the user and the password that its address may hold."""
    address = proxy if "://" in proxy else f"http://{proxy}"
    auth = parse_url(address).auth
    headers = urllib3.make_headers(proxy_basic_auth=unquote(auth)) if auth else None
    return urllib3.ProxyManager(address, proxy_headers=headers, **options)


def _ask(method: str, url: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
    """One request, its answer's body not read yet; redirects are not followed."""
    own = {"Accept-Encoding": "identity", "User-Agent": "merger"}
    return _pool(url).request(
        method, url, headers={**own, **headers}, preload_content=False, redirect=False, decode_content=False
    )


def _give_back(answer: urllib3.BaseHTTPResponse) -> None:
    """Let the next request have the connection where the answer was read to its end, else close it."""
    if answer.length_remaining == 0:
        answer.drain_conn()  # notes the end
        answer.release_conn()
    else:
        answer.close()  # what is left of it would be taken for the next answer


def _resolve(url: str, token: Token | None) -> Address:
    """Follow redirects: with the token on the same host, without on any other."""
    here = url
    for _ in range(_REDIRECTS):
        try:
            answer = _ask("HEAD", here, _authorization(token))
            _give_back(answer)
        except HTTPError as error:
            raise Again(f"{type(error).__name__}: {error}") from error
        if answer.status == 200:
            return Address(here, token)
        if answer.status not in (301, 302, 303, 307, 308):
            raise _failure(url, answer)
        target = urljoin(here, answer.headers.get("location", ""))
        if url.startswith("https:") and not target.startswith("https:"):
            raise SourceError("is redirected to a place without encryption", where=url)
        if _origin(target) != _origin(url):
            return Address(target)
        here = target
    raise SourceError("is redirected again and again", where=url)


def _origin(url: str) -> tuple[str | None, str | None, int | None]:
    parts = parse_url(url)
    return parts.scheme, parts.host, parts.port


def _authorization(token: Token | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token.reveal()}"} if token else {}


def _failure(url: str, answer: urllib3.BaseHTTPResponse) -> MergerError | Again:
    if answer.status in PASSING:
        return Again(f"HTTP {answer.status}", asked_delay(answer.headers))
    return ReadFailed(f"HTTP {answer.status} {answer.headers.get('x-error-message', '')}".strip(), where=url)


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
    headers = {"Range": f"bytes={start}-{start + len(into) - 1}", **_authorization(address.token)}
    began, done = time.monotonic(), 0
    try:
        answer = _ask("GET", address.url, headers)
        try:
            _check_answer(url, address, answer, size, start, start + len(into))
            while done < len(into) and (count := _take(answer, into[done : done + _PIECE])):
                done += count
                yield count
                if time.monotonic() - began > _GRACE + done / _SLOWEST:
                    raise Again(f"{done:,} bytes in {time.monotonic() - began:.0f} s")
        finally:
            _give_back(answer)
    except (HTTPError, OSError) as error:
        raise Again(f"{type(error).__name__}: {error}") from error
    if done < len(into):
        raise Again(f"the answer ended after {done:,} of {len(into):,} bytes")


def _take(answer: urllib3.BaseHTTPResponse, into: memoryview) -> int:
    """Bytes of an answer's body as they come, at most as many as fit; none at its end.

    urllib3 returns them in memory of its own, which costs a third of the rate on a fast network: where the file that it
    reads from is the one of http.client, the bytes are taken from there.
    """
    below = getattr(answer, "_fp", None)
    if isinstance(below, HTTPResponse) and below.length is not None and answer.length_remaining == below.length:
        count = below.fp.readinto1(into[: below.length])
        below.length -= count
        answer.length_remaining = below.length
        return count
    piece = answer.read1(len(into))
    into[: len(piece)] = piece
    return len(piece)


def _check_answer(
    url: str, address: Address, answer: urllib3.BaseHTTPResponse, size: int, start: int, stop: int
) -> None:
    if answer.status == 200:
        raise Again("the server sends the whole file where a range was asked for")
    if answer.status == 416:
        raise SourceChanged("is shorter than it was", where=url)
    if answer.status != 206:
        if answer.status in _EXPIRED and address.token is None:
            raise _Expired(answer.status)
        raise _failure(url, answer)
    found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", answer.headers.get("content-range", ""))
    if found and found[3] not in ("*", str(size)):
        raise SourceChanged(f"has {int(found[3]):,} bytes, {size:,} were planned", where=url)
    if not found or (int(found[1]), int(found[2])) != (start, stop - 1):
        raise Again("the server sends another range than was asked for")

"""The origin of Xet's content-addressed store, the tokens for it, and the xorbs at the CDN.

Two ways of upload that newer clients try first (`xorb-grants`, `v2/shards`) are answered with 404, and so is the search
for chunks that others uploaded: the client then does without.
"""

import secrets
import time
from collections.abc import Iterator
from typing import Any

from tests.hub_server import xet_formats as formats
from tests.hub_server.errors import HubError, no_entry
from tests.hub_server.repos import MODEL
from tests.hub_server.site import REVISION, Routes, Site, XetToken, answer_json
from tests.hub_server.wire import Answer, Request, byte_range, ranged
from tests.hub_server.xet import Xet
from tests.hub_server.xet_formats import Term, XetFile

tokens = Routes()  # at the API's origin
routes = Routes()  # at the CAS's
stored = Routes()  # at the CDN's
_HASH = "(?P<name>[0-9a-f]{64})"


@tokens("GET", f"{MODEL}/xet-read-token/{REVISION}")
def read_token(site: Site, request: Request, repo: str, revision: str) -> Answer:
    found = site.reader(request, repo, contents=True)
    found.head(revision)
    return _token(site, found.name, False)


@tokens("GET", f"{MODEL}/xet-write-token/{REVISION}")
def write_token(site: Site, request: Request, repo: str, revision: str) -> Answer:
    """The revision may be None: that of a pull request which is not there yet."""
    found, _ = site.contributor(request, repo, pull="create_pr" in request.query)
    if revision != "None":
        found.head(revision)
    return _token(site, found.name, True)


def _token(site: Site, repo: str, write: bool) -> Answer:
    _store(site)
    token, expires = f"xet_{secrets.token_hex(12)}", int(time.time() + site.xet_lifetime)
    site.xet_tokens[token] = XetToken(repo, write, expires)
    headers = {"X-Xet-Cas-Url": site.cas, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
    return answer_json({"casUrl": site.cas, "exp": expires, "accessToken": token}, **headers)


def _store(site: Site) -> Xet:
    if site.xet is None:
        raise HubError(404, "this server has no Xet storage")
    return site.xet


def _checked(site: Site, request: Request, write: bool) -> XetToken:
    token = site.xet_tokens.get(request.token or "")
    if token is None or token.expires < time.time():
        raise HubError(401, "the Xet token is unknown or has expired")
    if write and not token.write:
        raise HubError(403, "the Xet token is for reading")
    return token


@routes("POST", f"/v1/xorbs/default/{_HASH}")
def add_xorb(site: Site, request: Request, name: str) -> Answer:
    _checked(site, request, True)
    return answer_json({"was_inserted": _store(site).add_xorb(name, request.read())})


@routes("POST", "/v1/shards")
def add_shard(site: Site, request: Request) -> Answer:
    """Register files. Each is put together once, so that a wrong sha256 is found here and the CDN has it whole."""
    token, store = _checked(site, request, True), _store(site)
    try:
        files, _ = formats.shard(request.read())
    except ValueError as error:
        raise HubError(400, f"shard: {error}") from error
    for file in files:
        store.add_file(file)
        if file.sha256 is not None:
            if file.sha256 not in site.blobs:
                site.blobs.receive(store.content(file), file.sha256, file.size)
            site.xet_hashes[file.sha256] = file.hash
            site.store.find(token.repo).large.add(file.sha256)
    return answer_json({"result": 1})


@routes("GET", f"/v1/reconstructions/{_HASH}")
def reconstruction_1(site: Site, request: Request, name: str) -> Answer:
    skipped, terms = _terms(site, request, name)
    fetch = {
        xorb: [{"range": one["chunks"], "url": url, "url_range": one["bytes"]} for one in ranges]
        for xorb, url, ranges in _fetched(site, terms)
    }
    return answer_json({"offset_into_first_range": skipped, "terms": _told(terms), "fetch_info": fetch})


@routes("GET", f"/v2/reconstructions/{_HASH}")
def reconstruction_2(site: Site, request: Request, name: str) -> Answer:
    """One range to each address: for several the client would ask at once, which the CDN here does not know."""
    skipped, terms = _terms(site, request, name)
    xorbs = {xorb: [{"url": url, "ranges": [one]} for one in ranges] for xorb, url, ranges in _fetched(site, terms)}
    return answer_json({"offset_into_first_range": skipped, "terms": _told(terms), "xorbs": xorbs})


def _fetched(site: Site, terms: list[Term]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """For every xorb its address, and ranges such that each term lies in exactly one. The client looks for the first
    range that begins where a term does or before, and fails if it does not hold the whole term."""
    for xorb in dict.fromkeys(term.xorb for term in terms):
        joined: list[list[int]] = []
        for start, end in sorted((term.start, term.end) for term in terms if term.xorb == xorb):
            if joined and start <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], end)
            else:
                joined.append([start, end])
        yield xorb, site.signed(f"/xorbs/{xorb}"), [_range(site, xorb, start, end) for start, end in joined]


def _range(site: Site, xorb: str, start: int, end: int) -> dict[str, Any]:
    """Of chunks the end is not in the range, of bytes it is."""
    chunks = _store(site).xorbs[xorb].chunks
    within = {"start": chunks[start].start, "end": chunks[end - 1].end - 1}
    return {"chunks": {"start": start, "end": end}, "bytes": within}


def _terms(site: Site, request: Request, name: str) -> tuple[int, list[Term]]:
    _checked(site, request, False)
    store = _store(site)
    file: XetFile | None = store.files.get(name)
    if file is None:
        raise no_entry(name)
    try:
        asked = byte_range(request.headers.get("range"), file.size)
    except ValueError as error:
        raise HubError(416, str(error)) from error
    return store.terms(file, *(asked or (0, file.size)))


def _told(terms: list[Term]) -> list[dict[str, Any]]:
    return [
        {"hash": term.xorb, "unpacked_length": term.length, "range": {"start": term.start, "end": term.end}}
        for term in terms
    ]


@stored("GET", f"/xorbs/{_HASH}")
def xorb(site: Site, request: Request, name: str) -> Answer:
    site.check_signature(request)
    store = _store(site)
    if name not in store.xorbs:
        raise HubError(404, "NoSuchKey")
    return ranged(request, store.xorbs[name].body(), {"Content-Type": "application/octet-stream"})

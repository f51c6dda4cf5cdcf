"""Ranges over real sockets: exact bytes whatever the server does, the token only where it belongs."""

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from urllib3 import HTTPResponse

from merger.errors import MergerError, ReadFailed, SourceChanged, SourceError
from merger.secret import Token
from merger.storage import patience, ranges
from merger.storage.patience import TRIES
from tests.hub_server.fixtures import hub

DATA = random.Random(0).randbytes(3_000_000)
SMALL = b"some text that git itself keeps"
PATH = "model.safetensors"


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    """Short waits, and a process that knows no address yet."""
    monkeypatch.setattr(patience, "_FIRST", 0.002)
    monkeypatch.setattr(patience, "_LONGEST", 0.004)
    monkeypatch.setattr(ranges, "ADDRESSES", ranges.Addresses())


@pytest.fixture
def server(tmp_path) -> Iterator:
    with hub(tmp_path) as one:
        one.write("org/a", {PATH: DATA, "small.txt": SMALL})
        yield one


@pytest.fixture
def token(server) -> Token:
    return Token(server.token)


Read = Callable[..., bytes]


@pytest.fixture
def read(server, token) -> Read:
    def read(start: int, stop: int, path: str = PATH, size: int = len(DATA), token: Token | None = token) -> bytes:
        into = bytearray(stop - start)
        ranges.fetch(f"{server.endpoint}/org/a/resolve/main/{path}", token, size, start, memoryview(into))
        return bytes(into)

    return read


def asked(server) -> list[str]:
    return [entry.range for entry in server.log("cdn", "GET")]


def refused(kind: type[MergerError], says: str, read: Read, *arguments: int) -> MergerError:
    with pytest.raises(kind, match=says) as caught:
        read(*arguments)
    assert type(caught.value) is kind
    assert f"/org/a/resolve/main/{PATH}" in caught.value.where
    told = f"{caught.value} {caught.value!r} {caught.value.__cause__!r}"
    assert "hf_test" not in told
    assert "sig=" not in told  # who knows a signed address can read the file
    return caught.value


# ---- what is read -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 3_000_000), (2_999_999, 3_000_000), (12_345, 1_234_567)])
def test_exactly_what_was_asked_for(server, read, start, stop):
    assert read(start, stop) == DATA[start:stop]
    assert asked(server) == [f"bytes={start}-{stop - 1}"]
    assert sum(entry.sent for entry in server.log("cdn")) == stop - start


def test_nothing_is_asked_for_nothing(server, read):
    assert read(5, 5) == b""
    assert server.log() == []


def test_a_small_file_comes_from_the_hub_itself(server, read):
    assert read(5, 9, "small.txt", len(SMALL)) == SMALL[5:9]
    assert server.log("cdn") == []
    assert {entry.token for entry in server.log("api")} == {server.token}


def test_an_address_serves_many_ranges(server, read):
    with ThreadPoolExecutor(8) as pool:
        parts = pool.map(lambda i: read(i * 1000, i * 1000 + 1000), range(50))
    assert b"".join(parts) == DATA[:50_000]
    assert len(server.log("api", "HEAD")) == 1
    assert len(server.log("cdn", "GET")) == 50


def test_connections_are_used_again(server, read, monkeypatch):
    pool = ranges._pool(server.endpoint)
    opened = []
    new = type(pool.connection_from_host("localhost", server._cdn.port)).ConnectionCls
    connect = new.connect
    monkeypatch.setattr(new, "connect", lambda self: (opened.append(self), connect(self)))
    failed = []
    monkeypatch.setattr(patience.time, "sleep", failed.append)
    for i in range(5):
        server.write("org/a", {f"{i}.safetensors": DATA[i:]})
        read(i, i + 100_000, f"{i}.safetensors", len(DATA) - i)
        read(i, i + 10, "small.txt", len(SMALL))
    assert len(opened) <= 2  # one to the Hub, one to where the bytes are
    assert failed == []


# ---- the token ----------------------------------------------------------------------------------------


def test_the_token_stays_with_the_hub(server, read):
    server.protect("org/a", private=True)
    assert read(0, 100) == DATA[:100]
    assert {entry.token for entry in server.log("api")} == {server.token}
    assert {entry.token for entry in server.log("cdn")} == {None}
    assert server.violations() == []


def test_a_redirect_on_the_same_host_keeps_the_token(server, read):
    server.write("org/b", {PATH: DATA})
    server.protect("org/b", private=True)
    server.redirect_elsewhere("org/a", PATH, f"{server.endpoint}/org/b/resolve/main/{PATH}")
    assert read(7, 70) == DATA[7:70]
    assert [entry.token for entry in server.log("api", "HEAD")] == [server.token] * 2
    assert server.violations() == []


def test_a_redirect_without_a_host_is_one_on_the_same_host(server, read):
    server.write("org/b", {PATH: DATA})
    server.redirect_elsewhere("org/a", PATH, f"/org/b/resolve/main/{PATH}")
    assert read(7, 70) == DATA[7:70]


def test_another_host_gets_no_token(server, read, tmp_path):
    with hub(tmp_path / "other") as other:
        other.write("org/c", {"config.json": DATA[:1000]})
        server.redirect_elsewhere("org/a", PATH, f"{other.endpoint}/org/c/resolve/main/config.json")
        assert read(0, 10, size=1000) == DATA[:10]
        assert {entry.token for entry in other.log()} == {None}


def test_what_one_token_opened_stays_closed_to_the_others(server, read):
    server.protect("org/a", private=True)
    assert read(0, 10) == DATA[:10]
    for stranger in (None, Token("hf_other")):
        with pytest.raises(ReadFailed, match="HTTP 40"):
            read(0, 10, token=stranger)


def test_a_redirect_to_where_nothing_is_encrypted_is_refused(monkeypatch):
    moved = HTTPResponse(status=302, headers={"location": "http://cdn/blob"})
    monkeypatch.setattr(ranges, "_ask", lambda *_: moved)
    with pytest.raises(SourceError, match="without encryption"):
        ranges.fetch("https://hub/file", Token("t"), 10, 0, memoryview(bytearray(10)))


def test_redirects_in_a_circle_are_refused(server, read):
    server.redirect_elsewhere("org/a", PATH, f"{server.endpoint}/org/a/resolve/main/{PATH}")
    refused(SourceError, "again and again", read, 0, 10)


# ---- what passes --------------------------------------------------------------------------------------


def test_a_cut_body_is_continued_where_it_was_cut(server, read):
    server.faults.add(origin="cdn", cut=1_000_000, times=2)
    assert read(100, 2_500_100) == DATA[100:2_500_100]
    assert asked(server) == ["bytes=100-2500099", "bytes=1000100-2500099", "bytes=2000100-2500099"]
    assert len(server.log("api", "HEAD")) == 1


def test_a_body_that_is_cut_again_and_again_is_finished_while_something_comes(server, read):
    server.faults.add(origin="cdn", cut=100_000)
    assert read(0, 2_500_000) == DATA[:2_500_000]
    assert len(asked(server)) == 25


def test_a_body_that_brings_nothing_is_given_up(server, read):
    server.faults.add(origin="cdn", cut=0)
    refused(ReadFailed, f"failed {TRIES} times", read, 0, 1000)
    assert len(asked(server)) == TRIES


@pytest.mark.parametrize("origin", ["api", "cdn"])
@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 500}, {"status": 408}, {"drop": True}], ids=str)
def test_a_failure_that_passes(server, read, origin, fault):
    server.faults.add(origin=origin, times=3, **fault)
    assert read(0, 1000) == DATA[:1000]


@pytest.mark.parametrize("origin", ["api", "cdn"])
@pytest.mark.parametrize("headers", [{"Retry-After": "7"}, {"RateLimit": '"resolvers";r=0;t=7'}], ids=str)
def test_who_asks_too_often_waits_as_long_as_it_is_told(server, read, monkeypatch, origin, headers):
    waited = []
    monkeypatch.setattr(patience.time, "sleep", waited.append)
    server.faults.add(origin=origin, status=429, headers=headers, times=2)
    assert read(0, 1000) == DATA[:1000]
    assert [int(seconds) for seconds in waited] == [7, 7]


@pytest.mark.parametrize("origin", ["api", "cdn"])
@pytest.mark.parametrize("fault", [{"status": 503}, {"drop": True}], ids=str)
def test_a_failure_that_does_not_pass_is_told(server, read, origin, fault):
    server.faults.add(origin=origin, **fault)
    refused(ReadFailed, f"failed {TRIES} times", read, 0, 1000)


def test_a_server_that_is_not_there(tmp_path):
    with hub(tmp_path) as server:
        url = f"{server.endpoint}/org/a/resolve/main/{PATH}"
    with pytest.raises(ReadFailed, match="Connection"):
        ranges.fetch(url, Token("hf_test"), 10, 0, memoryview(bytearray(10)))


@pytest.mark.parametrize("rate", [200_000, 1000])
def test_a_connection_that_gives_too_little_is_given_up(server, read, monkeypatch, rate):
    """Also one of which the first piece would take very long."""
    monkeypatch.setattr(ranges, "_GRACE", 0.1)
    monkeypatch.setattr(ranges, "_SLOWEST", 10_000_000)
    server.faults.add(origin="cdn", rate=rate, times=1)
    assert read(0, 2_000_000) == DATA[:2_000_000]
    first, second = asked(server)
    assert first == "bytes=0-1999999"
    begin = int(second.removeprefix("bytes=").partition("-")[0])
    assert 0 < begin < 500_000


def test_a_server_that_says_nothing_is_given_up(server, read, monkeypatch):
    monkeypatch.setattr(ranges, "_POOLS", {})
    monkeypatch.setattr(ranges, "_TIMEOUT", 0.1)
    server.faults.add(origin="cdn", delay=30, times=1)
    assert read(0, 1000) == DATA[:1000]


# ---- what must not be taken ---------------------------------------------------------------------------


def test_the_whole_file_is_never_taken_for_a_range(server, read):
    server.faults.add(origin="cdn", ignore_range=True)
    refused(ReadFailed, "the whole file where a range was asked for", read, 5, 10)
    assert len(asked(server)) == TRIES


def test_a_server_that_ignores_ranges_once_is_asked_again(server, read):
    server.faults.add(origin="cdn", ignore_range=True, times=1)
    assert read(5, 10) == DATA[5:10]


@pytest.mark.parametrize(
    "said", ["", "bytes 0-4/3000000", "bytes 5-8/3000000", "bytes 5-9", "5-9/3000000", "bytes */*"]
)
def test_another_range_than_was_asked_for_is_not_taken(server, read, said):
    server.faults.add(origin="cdn", status=206, message="12345", headers={"Content-Range": said})
    refused(ReadFailed, "another range than was asked for", read, 5, 10)


def test_a_total_that_nobody_knows_is_no_fault(server, read):
    headers = {"Content-Range": "bytes 0-9/*"}
    server.faults.add(origin="cdn", status=206, message="", headers=headers, times=1)
    assert read(0, 10) == b'{"error": '


@pytest.mark.parametrize("size", [2_000_000, 3_000_001, 9_000_000])
def test_a_file_of_another_size_has_changed(server, read, size):
    error = refused(SourceChanged, f"has 3,000,000 bytes, {size:,} were planned", lambda: read(0, 1000, size=size))
    assert error.remedy
    assert len(asked(server)) == 1


def test_a_range_beyond_the_end_shows_that_the_file_has_changed(server, read):
    refused(SourceChanged, "shorter", lambda: read(4_000_000, 4_000_010, size=5_000_000))
    refused(SourceChanged, "3,000,000 bytes", lambda: read(2_999_990, 3_000_010, size=5_000_000))


def test_an_answer_with_more_than_was_asked_for_does_not_spoil_the_next_one(server, read):
    server.faults.add(
        origin="cdn", status=206, message="x" * 100, headers={"Content-Range": "bytes 0-9/3000000"}, times=1
    )
    assert read(0, 10) == b'{"error": '
    assert read(0, 1000) == DATA[:1000]
    assert len(asked(server)) == 2


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_the_hub_refuses_is_refused_at_once(server, read, status):
    server.faults.add(origin="api", status=status, headers={"X-Error-Message": "not for you"})
    refused(ReadFailed, f"HTTP {status} not for you", read, 0, 10)
    assert len(server.log("api")) == 1


# ---- addresses that expire ----------------------------------------------------------------------------


def test_an_expired_address_is_resolved_once_for_all_threads(server, read):
    with ThreadPoolExecutor(8) as pool:
        for expiry in range(3):
            together = threading.Barrier(8)

            def part(i: int, together: threading.Barrier = together) -> bytes:
                together.wait()
                return read(i * 1000, i * 1000 + 1000)

            assert b"".join(pool.map(part, range(8))) == DATA[:8000]
            assert len(server.log("api", "HEAD")) == expiry + 1
            server.expire_urls()


def test_an_address_that_expires_in_the_middle_of_a_body(server, read):
    server.faults.add(origin="cdn", cut=1000, nth=1)
    server.faults.add(origin="cdn", status=403, nth=2)
    assert read(0, 5000) == DATA[:5000]
    assert asked(server) == ["bytes=0-4999", "bytes=1000-4999", "bytes=1000-4999"]
    assert len(server.log("api", "HEAD")) == 2


def test_addresses_that_are_never_good_are_given_up(server, read):
    server.faults.add(origin="cdn", status=403)
    refused(ReadFailed, "HTTP 403: the address has expired", read, 0, 10)
    assert len(server.log("api", "HEAD")) == TRIES


def test_what_another_process_has_resolved_is_used_until_it_expires(server, read, token):
    read(0, 1)
    url = f"{server.endpoint}/org/a/resolve/main/{PATH}"
    known = ranges.ADDRESSES.known(url, token)
    ranges.ADDRESSES = ranges.Addresses()
    ranges.ADDRESSES.learn(url, token, known)
    assert read(0, 10) == DATA[:10]
    assert len(server.log("api", "HEAD")) == 1
    server.expire_urls()
    assert read(0, 10) == DATA[:10]
    ranges.ADDRESSES.learn(url, token, known)  # a second pickle, as old as the first
    assert read(0, 10) == DATA[:10]
    assert len(server.log("api", "HEAD")) == 2


# ---- proxies ------------------------------------------------------------------------------------------


class Proxy(BaseHTTPRequestHandler):
    """Passes on what it is asked, and keeps a list."""

    seen: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers.get("proxy-authorization")))
        target = urlsplit(self.path)
        there = HTTPConnection(target.netloc)
        kept = {key: value for key, value in self.headers.items() if key.lower() in ("range", "authorization")}
        there.request(self.command, f"{target.path}?{target.query}", headers=kept)
        answer = there.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.read())
        there.close()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[ThreadingHTTPServer]:
    Proxy.seen = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as one:
        thread = threading.Thread(target=one.serve_forever, args=(0.01,))
        thread.start()
        yield one
        one.shutdown()
        thread.join()


@pytest.mark.parametrize("variable", ["http_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("form", ["http://127.0.0.1:{}", "127.0.0.1:{}", "http://me:p%40ss@127.0.0.1:{}"])
def test_requests_go_through_the_proxy_that_the_environment_names(server, read, monkeypatch, proxy, variable, form):
    monkeypatch.setenv(variable, form.format(proxy.server_address[1]))
    assert read(5, 10) == DATA[5:10]
    assert [urlsplit(url).path.startswith(("/org/a/resolve", "/blobs/")) for url, _ in Proxy.seen] == [True, True]
    assert {auth for _, auth in Proxy.seen} == {"Basic bWU6cEBzcw==" if "@" in form else None}
    assert server.violations() == []


def test_some_hosts_are_asked_without_the_proxy(server, read, monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_address[1]}")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    assert read(5, 10) == DATA[5:10]
    assert Proxy.seen == []

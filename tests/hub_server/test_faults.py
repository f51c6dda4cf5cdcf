"""Every fault does to a request what it says, and the log tells the truth about it."""

import os
import time

import httpx2
import pytest

from tests.hub_server.faults import Fault, Faults
from tests.hub_server.fixtures import hub

DATA = os.urandom(300_000)


@pytest.fixture
def server(tmp_path):
    with hub(tmp_path) as one:
        one.write("org/a", {"model.safetensors": DATA, "config.json": b"{}"})
        yield one


@pytest.fixture
def http(server):
    with httpx2.Client(base_url=server.endpoint) as client:
        yield client


@pytest.fixture
def location(http):
    return http.head("/org/a/resolve/main/model.safetensors").headers["location"]


def test_a_status_for_the_nth_request(server, http):
    server.faults.add(path="/api/models", nth=[2, 3], status=503)
    assert [http.get("/api/models/org/a").status_code for _ in range(4)] == [200, 503, 503, 200]
    assert [entry.status for entry in server.log(path="/api/models")] == [200, 503, 503, 200]
    assert [bool(entry.fault) for entry in server.log(path="/api/models")] == [False, True, True, False]


def test_the_first_times_and_other_paths(server, http):
    server.faults.add(path="/api/models/org/a$", method="GET", times=1, status=500)
    assert http.get("/api/models/org/a/refs").status_code == 200
    assert [http.get("/api/models/org/a").status_code for _ in range(2)] == [500, 200]


def test_too_many_requests_say_when_to_come_back(server, http):
    server.faults.add(times=1, status=429, headers={"RateLimit": '"api";r=0;t=7'})
    server.faults.add(nth=2, status=429)
    first, second = (http.get("/api/models/org/a") for _ in range(2))
    assert (first.status_code, first.headers["ratelimit"]) == (429, '"api";r=0;t=7')
    assert second.headers["ratelimit"] == '"api";r=0;t=0'


def test_a_cut_body(server, http, location):
    server.faults.add(origin="cdn", cut=1000, times=1)
    with http.stream("GET", location) as answer:
        assert answer.headers["content-length"] == str(len(DATA))
        pieces = answer.iter_bytes()
        assert next(pieces) == DATA[:1000]
        with pytest.raises(httpx2.RemoteProtocolError):
            next(pieces)
    assert [entry.sent for entry in server.log("cdn")] == [1000]
    assert http.get(location).content == DATA


def test_a_dropped_connection(server, http):
    server.faults.add(path="refs", drop=True, times=1)
    with pytest.raises(httpx2.RemoteProtocolError):
        http.get("/api/models/org/a/refs")
    assert [entry.status for entry in server.log(path="refs")] == [0]
    assert http.get("/api/models/org/a/refs").status_code == 200


def test_done_and_then_500(server, http):
    server.faults.add(path="/branch/", status=500, after=True)
    headers = {"Authorization": f"Bearer {server.token}"}
    assert http.post("/api/models/org/a/branch/new", json={}, headers=headers).status_code == 500
    assert "new" in server.refs("org/a")


def test_done_and_then_dropped(server, http):
    server.faults.add(path="/branch/", drop=True, after=True)
    with pytest.raises(httpx2.RemoteProtocolError):
        http.post("/api/models/org/a/branch/new", json={}, headers={"Authorization": f"Bearer {server.token}"})
    assert "new" in server.refs("org/a")


def test_a_range_is_ignored(server, http, location):
    server.faults.add(origin="cdn", ignore_range=True, times=1)
    whole = http.get(location, headers={"Range": "bytes=5-9"})
    assert (whole.status_code, len(whole.content)) == (200, len(DATA))
    part = http.get(location, headers={"Range": "bytes=5-9"})
    assert (part.status_code, part.content) == (206, DATA[5:10])
    assert [entry.range for entry in server.log("cdn")] == ["bytes=5-9"] * 2


def test_a_changed_byte(server, http, location):
    server.faults.add(origin="cdn", flip=10)
    got = http.get(location, headers={"Range": "bytes=100-199"}).content
    assert [place for place in range(100) if got[place] != DATA[100 + place]] == [10]


def test_slow_bodies_and_late_answers(server, http, location):
    server.faults.add(origin="cdn", rate=3_000_000, delay=0.05)
    began = time.monotonic()
    assert http.get(location).content == DATA
    assert time.monotonic() - began > 0.1  # 0.05 s before and 0.1 s of body; never faster
    assert server.log("cdn")[0].fault == "delay=0.05 rate=3000000"


def test_a_body_is_read_before_a_refusal(server, http):
    """Else its rest is taken for the connection's next request."""
    server.faults.add(method="POST", times=1, status=503)
    assert http.post("/api/repos/create", content=b"x" * 3_000_000).status_code == 503
    assert http.get("/api/models/org/a").status_code == 200
    assert server.log(method="POST")[0].received == 3_000_000


def test_chance_is_the_same_for_the_same_seed():
    def struck(order: list[int], seed: int) -> dict[int, Fault | None]:
        faults = Faults()
        faults.random(0.3, seed)
        return {number: faults.strike("api", "GET", f"/{number}?sig={seed}", None) for number in order}

    first, second = struck(list(range(500)), 1), struck(list(range(500))[::-1], 1)
    assert first == second
    assert first != struck(list(range(500)), 2)
    hits = [fault for fault in first.values() if fault]
    assert 110 < len(hits) < 190
    assert {fault.status for fault in hits} == {None, 429, 500, 503}
    assert any(fault.drop for fault in hits)
    assert any(fault.cut for fault in hits)


def test_chance_strikes_a_repeated_request_anew():
    faults = Faults()
    faults.random(0.5, 3)
    hits = [bool(faults.strike("api", "GET", "/same", None)) for _ in range(100)]
    assert 30 < sum(hits) < 70
    faults.clear()
    assert faults.strike("api", "GET", "/same", None) is None

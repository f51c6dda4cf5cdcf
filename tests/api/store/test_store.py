"""Every store gives the same answers: in memory, on SQLite, and on PostgreSQL if MERGER_TEST_DATABASE_URL has one."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import TypeVar

import pytest

from api.jobs import Attempt, Entry, Job, Limits, Needs, Problem, State, new_id
from api.machine import CancelAsked, Claimed, Dispatched, Refused, Reported, Waiting
from api.store.memory import MemoryStore
from api.store.migrate import migrate
from api.store.sql import SqlStore
from api.store.store import ClientKey, KeyReused, NotFound, Query, Request, Secret, Store
from tests.api.store.databases import database
from workers.reports import Progress

T = TypeVar("T")


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
        return
    with database(request.param, tmp_path) as url:
        store = SqlStore(url)
        migrate(store.engine)
        try:
            yield store
        finally:
            store.close()


def job(at: float = 1000.0, **fields: object) -> Job:
    new = Job(new_id(at), {"method": "average"}, "average", "/out", at, queued_at=at, allowed=3)
    return replace(new, **fields)  # type: ignore[arg-type]


def at_once(count: int, call: Callable[[int], T]) -> list[T]:
    """The answers of so many threads that start at the same moment."""
    barrier = Barrier(count)

    def run(number: int) -> T:
        barrier.wait()
        return call(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_every_field_comes_back(store: Store) -> None:
    full = job(
        project="p",
        labels={"a": "b", "ü": "é"},
        secrets={"hub_token": "team-hub"},
        priority=-3,
        needs=Needs(1.5, 2.0, 10**12),
        limits=Limits(7, 1.5, 2.5),
        not_before=1.25,
        progress=Progress("writing", 1, 2, 3, 4, 5),
        result={"files": [{"name": "a", "size": 10**13}]},
        error=Problem("kind", "message", "where", "remedy"),
        waiting_for="room",
        started_at=1001.5,
        canceling_at=1002.5,
        ends_as=State.TIMED_OUT,
    )
    made, new = store.add(full)
    assert new
    assert store.get(full.id) == made == replace(full, events=1)


def test_attempts_come_back(store: Store) -> None:
    made, _ = store.add(job())
    store.change(made.id, Dispatched(1001.0, "code"))
    found = store.change(made.id, Claimed(1002.0, 1, "code", "me", "token", 1017.0))
    expected = Attempt(1, 1001.0, "code", "me", "token", 1017.0, claimed_at=1002.0, moved=1002.0)
    assert store.get(made.id) == found
    assert found.attempts == (expected,)


def test_what_is_not_there(store: Store) -> None:
    for ask in (store.get, store.events, store.logs):
        with pytest.raises(NotFound):
            ask("nothing")
    with pytest.raises(NotFound):
        store.change("nothing", CancelAsked(1.0))


def test_events_are_numbered_without_a_gap_and_paged(store: Store) -> None:
    made, _ = store.add(job())
    store.change(made.id, Waiting(1001.0, "one"))
    store.change(made.id, Waiting(1002.0, "one"))
    store.change(made.id, Waiting(1003.0, "two"))
    events = store.events(made.id)
    assert [(e.id, e.kind, e.at) for e in events] == [
        (1, "queued", 1000.0),
        (2, "waiting", 1001.0),
        (3, "waiting", 1003.0),
    ]
    assert [e.id for e in store.events(made.id, after=1, limit=1)] == [2]
    assert store.events(made.id, after=3) == []


def test_a_refused_event_changes_nothing(store: Store) -> None:
    made, _ = store.add(job())
    with pytest.raises(Refused):
        store.change(made.id, Claimed(1.0, 1, "code", "me", "token", 2.0), ["a line"])
    assert store.get(made.id) == made
    assert len(store.events(made.id)) == 1
    assert store.logs(made.id) == []


def test_lines_of_a_report_are_kept_once(store: Store) -> None:
    made, _ = store.add(job())
    store.change(made.id, Dispatched(1.0, "code"))
    store.change(made.id, Claimed(2.0, 1, "code", "me", "token", 9.0))
    report = Reported(3.0, 1, 1, Progress("writing"), (Entry("shard", {"file": "a"}),), 10.0)
    for _ in range(2):
        store.change(made.id, report, ["one", "two\0"])
    store.change(made.id, replace(report, report=2, entries=()), ["three"])
    store.log(made.id, 1, ["four"], 5.0)
    assert [(line.id, line.text.rstrip("\0")) for line in store.logs(made.id)] == [
        (1, "one"),
        (2, "two"),
        (3, "three"),
        (4, "four"),
    ]
    assert [line.id for line in store.logs(made.id, after=2, limit=1)] == [3]
    assert [e.kind for e in store.events(made.id)] == ["queued", "starting", "running", "shard"]


def test_the_same_request_makes_one_job(store: Store) -> None:
    first, new = store.add(job(), Request("k", "digest"))
    again, second = store.add(job(), Request("k", "digest"))
    assert (new, second, again) == (True, False, first)
    assert store.find("default", Request("k", "digest")) == first
    assert store.find("other", Request("k", "digest")) is None
    for ask in (lambda r: store.add(job(), r), lambda r: store.find("default", r)):
        with pytest.raises(KeyReused):
            ask(Request("k", "another"))
    other, new = store.add(job(project="other"), Request("k", "digest"))
    assert new
    assert other.id != first.id


def test_pages_are_filtered_and_walk_backwards_in_time(store: Store) -> None:
    jobs = [job(1000.0 + i, priority=i, labels={"n": str(i % 2), "all": "x"}, project="p") for i in range(6)]
    for one in jobs:
        store.add(one)
    store.add(job(2000.0))
    store.change(jobs[5].id, CancelAsked(1.0))

    def ids(**query: object) -> list[int]:
        return [found.priority for found in store.page(Query("p", **query))]  # type: ignore[arg-type]

    assert ids() == [5, 4, 3, 2, 1, 0]
    assert ids(limit=2, before=jobs[4].id) == [3, 2]
    assert ids(states=[State.CANCELED]) == [5]
    assert ids(states=[State.CANCELED, State.QUEUED], limit=3) == [5, 4, 3]
    assert ids(labels={"n": "1"}) == [5, 3, 1]
    assert ids(labels={"n": "1", "all": "y"}) == []
    assert ids(created_after=1001.0, created_before=1004.0) == [3, 2]
    assert ids(method="lawa") == []


def test_the_queue_is_by_priority_then_age(store: Store) -> None:
    old, young, urgent, later = job(1.0), job(2.0), job(3.0, priority=1), job(4.0, priority=9, not_before=50.0)
    for one in (young, urgent, later, old):
        store.add(one)
    assert [found.id for found in store.queued(10.0, 10)] == [urgent.id, old.id, young.id]
    assert [found.id for found in store.queued(50.0, 2)] == [later.id, urgent.id]
    store.change(urgent.id, Dispatched(10.0, "code"))
    assert [found.id for found in store.queued(10.0, 10)] == [old.id, young.id]
    assert [found.id for found in store.active()] == [urgent.id]


def test_what_waits_too_long_is_found(store: Store) -> None:
    brief = job(100.0, limits=Limits(queue_seconds=10))
    for one in (brief, job(100.0)):
        store.add(one)
    assert store.expired(109.0) == []
    assert [found.id for found in store.expired(111.0)] == [brief.id]


def test_counts_and_the_oldest(store: Store) -> None:
    assert store.oldest_queued() is None
    first, second = job(5.0), job(6.0)
    for one in (first, second):
        store.add(one)
    assert store.oldest_queued() == 5.0
    store.change(first.id, CancelAsked(7.0))
    assert store.counts() == {State.QUEUED: 1, State.CANCELED: 1}
    assert store.oldest_queued() == 6.0


def test_a_lease_has_one_holder_until_it_runs_out_or_is_given_back(store: Store) -> None:
    assert store.hold("l", "a", 100.0, 10)
    assert store.hold("l", "a", 105.0, 10)
    assert not store.hold("l", "b", 114.0, 10)
    assert store.hold("other", "b", 100.0, 10)
    assert store.hold("l", "b", 116.0, 10)
    assert not store.hold("l", "a", 117.0, 10)
    store.release("l", "a")
    assert not store.hold("l", "a", 118.0, 10)
    store.release("l", "b")
    assert store.hold("l", "a", 119.0, 10)


def test_keys(store: Store) -> None:
    assert not store.has_keys()
    store.add_key("digest", "p", 1.0)
    assert store.has_keys()
    assert (store.project_of("digest"), store.project_of("other")) == ("p", None)
    store.check()


def test_secrets_belong_to_a_project_and_keep_the_time_of_their_first_value(store: Store) -> None:
    assert store.secret("p", "hub") is None
    assert store.secrets("p") == []
    for project, name in (("p", "hub-2"), ("p", "hub"), ("p", "hub1"), ("q", "hub")):
        assert store.put_secret(project, name, f"cipher of {project}", 1.5)
    assert not store.put_secret("p", "hub", "another", 2.5)
    assert store.secret("p", "hub") == Secret("hub", "another", 1.5, 2.5)
    assert store.secret("q", "hub") == Secret("hub", "cipher of q", 1.5, 1.5)
    assert [secret.name for secret in store.secrets("p")] == ["hub", "hub-2", "hub1"]
    assert store.remove_secret("p", "hub")
    assert not store.remove_secret("p", "hub")
    assert store.secret("p", "hub") is None
    assert store.secret("q", "hub") is not None


# ---- at the same moment -------------------------------------------------------------------------------


def test_changes_at_once_leave_no_gap(store: Store) -> None:
    made, _ = store.add(job())

    def change(number: int) -> None:
        for i in range(10):
            store.change(made.id, Waiting(1.0, f"{number}, {i}"))

    at_once(8, change)
    events = store.events(made.id)
    assert [event.id for event in events] == list(range(1, 82))
    assert len({event.data["reason"] for event in events}) == 81


def test_of_dispatchers_at_once_one_starts_the_attempt(store: Store) -> None:
    made, _ = store.add(job())

    def start(number: int) -> bool:
        try:
            store.change(made.id, Dispatched(1.0, str(number)))
        except Refused:
            return False
        return True

    assert sum(at_once(8, start)) == 1
    assert len(store.get(made.id).attempts) == 1


def test_a_request_sent_at_once_makes_one_job(store: Store) -> None:
    answers = at_once(8, lambda _: store.add(job(), Request("k", "digest")))
    assert len({found.id for found, _ in answers}) == 1
    assert sum(new for _, new in answers) == 1
    assert len(store.page(Query("default"))) == 1


def test_of_secrets_of_one_name_at_once_one_is_new(store: Store) -> None:
    assert sum(at_once(8, lambda number: store.put_secret("p", "hub", str(number), 1.0))) == 1
    assert len(store.secrets("p")) == 1


def test_of_holders_at_once_one_gets_the_lease(store: Store) -> None:
    assert sum(at_once(8, lambda number: store.hold("l", str(number), 1.0, 10))) == 1


def test_keys_are_listed_by_age_and_removed(store: Store) -> None:
    store.add_key("b" * 64, "p", 2.0, "later")
    store.add_key("a" * 64, "q", 1.0)
    assert store.client_keys() == [ClientKey("a" * 64, "q", 1.0), ClientKey("b" * 64, "p", 2.0, "later")]
    assert store.remove_key("a" * 64)
    assert not store.remove_key("a" * 64)
    assert store.project_of("a" * 64) is None
    assert [key.id for key in store.client_keys()] == ["b" * 12]


def test_a_secret_is_replaced_only_where_it_is_what_it_was(store: Store) -> None:
    store.put_secret("p", "one", "old", 1.0)
    store.put_secret("a", "two", "old", 1.0)
    assert not store.replace_secret("p", "one", "other", "new")
    assert not store.replace_secret("p", "none", "old", "new")
    assert store.replace_secret("p", "one", "old", "new")
    assert store.all_secrets() == [("a", Secret("two", "old", 1.0, 1.0)), ("p", Secret("one", "new", 1.0, 1.0))]

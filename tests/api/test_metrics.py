"""What Prometheus reads: counted once, the same from every replica, and nothing made up where nobody answers."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from api import machine
from api.dispatcher import Dispatcher
from api.jobs import Entry, Job, Needs, Problem, State, new_id
from api.metrics import Metrics
from api.ray_jobs import RayJobs, RayUnreachable
from api.settings import Settings
from api.store.memory import MemoryStore
from api.store.store import Unavailable
from tests.api.ray import ScriptedRay
from workers.reports import Progress


class Away(MemoryStore):
    """A store that nobody reaches."""

    def counts(self) -> Any:
        raise Unavailable("connection refused")


@pytest.fixture
def ray() -> Iterator[RayJobs]:
    with ScriptedRay().client() as client:
        yield client


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample by its name and the values of its labels, as Prometheus's own parser reads them."""
    families = text_string_to_metric_families(metrics.text().decode())
    return {" ".join([one.name, *one.labels.values()]): one.value for family in families for one in family.samples}


def started(at: float = 1000.0, **fields: object) -> Job:
    """A job whose first attempt runs."""
    new = replace(Job(new_id(at), {}, "average", "/out", at, allowed=3, queued_at=at), **fields)  # type: ignore[arg-type]
    job, _ = machine.transition(machine.Dispatched(at, "code"), new)
    return machine.transition(machine.Claimed(at + 1, 1, "code", "me", "token", at + 60), job)[0]


def report(job: Job, at: float, progress: Progress, *entries: Entry, again: bool = False) -> Job:
    number = job.attempt.reports + (0 if again else 1)
    return machine.transition(machine.Reported(at, job.attempt.number, number, progress, entries, at + 60), job)[0]


def shard(size: int, *, adopted: bool = False) -> Entry:
    return Entry("shard", {"file": "a", "size": size, "adopted": adopted})


# ---- jobs ---------------------------------------------------------------------------------------------


def test_jobs_are_counted_by_state_and_the_oldest_one_that_waits_gives_the_age(ray: RayJobs) -> None:
    store = MemoryStore()
    now = time.time()
    for waits in (500.0, 90.0):
        store.add(Job(new_id(now), {}, "average", "/out", now, queued_at=now - waits))
    store.add(started(now))
    found = samples(Metrics(store, ray))
    assert {state: found[f"merger_jobs {state}"] for state in State} == dict.fromkeys(State, 0) | {
        State.QUEUED: 2,
        State.RUNNING: 1,
    }
    assert 500 <= found["merger_queue_age_seconds"] < 560
    assert found["merger_database_up"] == 1


def test_without_the_database_nothing_is_said_of_jobs(ray: RayJobs) -> None:
    found = samples(Metrics(Away(), ray))
    assert found["merger_database_up"] == 0
    assert not [name for name in found if name.startswith(("merger_jobs", "merger_queue"))]


# ---- attempts -----------------------------------------------------------------------------------------


def test_bytes_are_those_of_shards_that_were_made_not_of_those_adopted(ray: RayJobs) -> None:
    metrics = Metrics(MemoryStore(), ray)
    before = started()
    after = report(before, 1002.0, Progress("writing", 70, 100, 2, 3, 11), shard(60, adopted=True), shard(10))
    metrics.reported(before, after, (shard(60, adopted=True), shard(10)))
    found = samples(metrics)
    assert (found["merger_bytes_written_total"], found["merger_bytes_read_total"]) == (10, 11)
    same = report(after, 1003.0, Progress("writing", 70, 100, 2, 3, 11), shard(10), again=True)
    metrics.reported(after, same, (shard(10),))
    assert samples(metrics) == found


def test_phases_are_timed_though_each_report_goes_to_another_replica(ray: RayJobs) -> None:
    replicas = [Metrics(MemoryStore(), ray) for _ in range(3)]
    job = started(1000.0)  # its first phase is that of starting
    for i, (at, phase) in enumerate(
        [(1010.0, "planning"), (1011.0, "planning"), (1040.0, "writing"), (1100.0, "writing")]
    ):
        before, job = job, report(job, at, Progress(phase, i))
        replicas[i % 3].reported(before, job, ())
    before = machine.transition(machine.Granted(1101.0, 1), job)[0]
    replicas[1].ended(before, machine.transition(machine.Succeeded(1140.0, 1, {}), before)[0])
    added: dict[str, float] = {}
    for each in map(samples, replicas):
        for name in [name for name in each if name.startswith("merger_phase_seconds_sum")]:
            added[name.split()[1]] = added.get(name.split()[1], 0.0) + each[name]
    assert added == {"starting": 10.0, "planning": 30.0, "writing": 100.0}
    assert samples(replicas[1])["merger_attempts_total succeeded"] == 1


@pytest.mark.parametrize("again", [True, False])
def test_an_attempt_that_failed_counts_once_whatever_becomes_of_the_job(ray: RayJobs, again: bool) -> None:
    metrics = Metrics(MemoryStore(), ray)
    before = started()
    happening = machine.Failed(1030.0, 1, Problem("ReadFailed", "ends early"), again)
    metrics.ended(before, machine.transition(happening, before)[0])
    found = samples(metrics)
    outcomes = {name.split()[1]: value for name, value in found.items() if name.startswith("merger_attempts_total")}
    assert outcomes == {"failed": 1, "succeeded": 0, "canceled": 0, "lost": 0}
    assert found["merger_phase_seconds_sum starting"] == 30


def test_an_attempt_of_before_this_was_kept_has_no_seconds(ray: RayJobs) -> None:
    metrics = Metrics(MemoryStore(), ray)
    before = started().with_attempt(phased=0.0)
    metrics.reported(before, report(before, 1002.0, Progress("writing")), ())
    assert not [name for name in samples(metrics) if name.startswith("merger_phase_seconds_sum")]


# ---- Ray ----------------------------------------------------------------------------------------------


def test_ray_is_up_or_down_as_it_last_answered_and_unknown_where_nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = ScriptedRay()
    with scripted.client() as client:
        metrics = Metrics(MemoryStore(), client)
        assert "merger_ray_up" not in samples(metrics)
        assert client.status("unknown") is None, "an answer too"
        assert samples(metrics)["merger_ray_up"] == 1
        scripted.down = True
        with pytest.raises(RayUnreachable):
            client.nodes()
        assert samples(metrics)["merger_ray_up"] == 0
        scripted.down, scripted.submit_fails = False, 1
        client.nodes()
        assert samples(metrics)["merger_ray_up"] == 1
        later = time.monotonic() + 61
        monkeypatch.setattr("api.metrics.time.monotonic", lambda: later)
        assert "merger_ray_up" not in samples(metrics), "a minute ago it did; now nobody knows"


# ---- the dispatcher -----------------------------------------------------------------------------------


class Two:
    """Two dispatchers over one store, each with the metrics of its process."""

    def __init__(self) -> None:
        self.ray, self.store, self.now = ScriptedRay(), MemoryStore(), 1000.0
        self.client = self.ray.client()
        self.metrics = [Metrics(self.store, self.client) for _ in range(2)]
        settings = Settings(lease_seconds=10, stall_seconds=100)
        self.dispatchers = [
            Dispatcher(self.store, self.client, settings, lambda: self.now, each.rounds()) for each in self.metrics
        ]

    def found(self) -> list[dict[str, float]]:
        return [samples(each) for each in self.metrics]


@pytest.fixture
def two() -> Iterator[Two]:
    two = Two()
    with two.client:
        yield two


def test_one_dispatcher_leads_and_says_when_its_last_round_was(two: Two) -> None:
    for dispatcher in two.dispatchers:
        dispatcher.round()
    first, second = two.found()
    assert (first["merger_dispatcher_leading"], second["merger_dispatcher_leading"]) == (1, 0)
    assert first["merger_dispatcher_round_timestamp_seconds"] == 1000
    two.now += 11  # the first one sleeps; its lease runs out
    two.dispatchers[1].round()
    two.dispatchers[0].round()
    first, second = two.found()
    assert (first["merger_dispatcher_leading"], second["merger_dispatcher_leading"]) == (0, 1)
    assert first["merger_dispatcher_lease_losses_total"] == 1
    assert second["merger_dispatcher_lease_losses_total"] == 0
    two.dispatchers[0].round()
    assert two.found()[0]["merger_dispatcher_lease_losses_total"] == 1, "standing by is no loss"


def test_a_round_that_fails_is_no_round(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    two.dispatchers[0].round()
    two.now += 5
    monkeypatch.setattr(two.store, "active", Away().counts)
    with pytest.raises(Unavailable):
        two.dispatchers[0].round()
    assert two.found()[0]["merger_dispatcher_round_timestamp_seconds"] == 1000


def test_lost_attempts_and_jobs_that_fit_no_node(two: Two) -> None:
    kept = two.store.add(started(two.now))[0]
    big = replace(Job(new_id(), {}, "average", "/out", 1000.0, queued_at=1000.0), needs=Needs(1, 0, 10**12))
    two.store.add(big)
    two.dispatchers[0].round()
    assert two.found()[0]["merger_jobs_without_node"] == 1
    assert two.found()[0]["merger_attempts_total lost"] == 0
    two.now += 61
    two.dispatchers[0].round()
    assert two.store.get(kept.id).state is State.QUEUED
    assert two.found()[0]["merger_attempts_total lost"] == 1
    two.ray.nodes[0]["resources_total"]["memory"] = 2e12  # type: ignore[index]
    two.dispatchers[0].round()
    assert two.found()[0]["merger_jobs_without_node"] == 0


def test_a_process_without_a_dispatcher_says_nothing_of_one(ray: RayJobs) -> None:
    assert not [name for name in samples(Metrics(MemoryStore(), ray)) if "dispatcher" in name]

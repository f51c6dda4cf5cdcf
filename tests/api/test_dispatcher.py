"""The dispatcher against a scripted Ray and a clock that the tests turn: what it starts, loses and ends."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest

from api import machine
from api.dispatcher import Dispatcher
from api.jobs import Job, Limits, Needs, State, new_id
from api.settings import Settings
from api.store.memory import MemoryStore
from api.store.store import Unavailable
from tests.api.ray import ScriptedRay
from workers.reports import Progress


@dataclass
class World:
    """A dispatcher with everything around it."""

    ray: ScriptedRay = field(default_factory=ScriptedRay)
    store: MemoryStore = field(default_factory=MemoryStore)
    settings: Settings = field(default_factory=lambda: Settings(max_running=2, lease_seconds=10, stall_seconds=100))
    now: float = 1000.0

    def __post_init__(self) -> None:
        self.client = self.ray.client()
        self.dispatcher = self.another()

    def another(self) -> Dispatcher:
        return Dispatcher(self.store, self.client, self.settings, lambda: self.now)

    def job(self, **fields: object) -> str:
        self.now += 0.01
        limits = Limits(max_attempts=3, queue_seconds=500, run_seconds=300)
        new = Job(new_id(self.now), {}, "average", "/out", self.now, limits=limits, allowed=3, queued_at=self.now)
        return self.store.add(replace(new, **fields))[0].id  # type: ignore[arg-type]

    def round(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.dispatcher.round()

    def state(self, job: str) -> State:
        return self.store.get(job).state

    def claim(self, job: str, token: str = "token") -> None:
        found = self.store.get(job)
        claim = self.ray.claim(found.submission)
        lease = self.now + self.settings.lease_seconds
        self.store.change(job, machine.Claimed(self.now, found.attempt.number, claim, "me", token, lease))

    def report(self, job: str, done: int = 0, uploads: int = 0) -> None:
        attempt = self.store.get(job).attempt
        lease = self.now + self.settings.lease_seconds
        progress = Progress("writing", done, 100, uploads=uploads)
        happening = machine.Reported(self.now, attempt.number, attempt.reports + 1, progress, (), lease)
        self.store.change(job, happening)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    with world.client:
        yield world


def test_jobs_start_by_priority_then_age_and_no_more_than_may_run(world: World) -> None:
    low, first, second, high = world.job(), world.job(priority=5), world.job(priority=5), world.job(priority=9)
    world.round()
    assert [world.state(job) for job in (high, first, second, low)] == ["starting", "starting", "queued", "queued"]
    assert list(world.ray.statuses) == [f"{high}-1", f"{first}-1"]


def test_the_claim_in_the_entrypoint_is_that_of_the_attempt(world: World) -> None:
    job = world.job()
    world.round()
    world.claim(job)
    assert world.state(job) == "running"


@pytest.mark.parametrize("code", ["-o-GZZYt", "--server", 'it\'s "quoted" $HOME'])
def test_a_claim_may_begin_with_anything(world: World, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr("api.dispatcher.secrets.token_urlsafe", lambda _: code)
    job = world.job()
    world.round()
    world.claim(job)
    assert world.state(job) == "running"


def test_a_runner_that_is_silent_is_lost_and_the_next_attempt_waits(world: World) -> None:
    job = world.job()
    world.round()
    world.claim(job)
    world.round(9)
    assert world.state(job) == "running"
    world.round(2)
    assert world.state(job) == "queued"
    assert world.ray.stopped == [f"{job}-1"]
    world.round(0.5)
    assert world.state(job) == "queued", "the backoff of one second has not passed"
    world.round(1)
    assert world.store.get(job).submission == f"{job}-2"


def test_reports_keep_an_attempt(world: World) -> None:
    job = world.job()
    world.round()
    world.claim(job)
    for i in range(10):
        world.now += 8
        world.report(job, i)
        world.round()
    assert world.state(job) == "running"


def test_a_lease_that_ran_out_while_nobody_looked_proves_nothing(world: World) -> None:
    job = world.job()
    world.round()
    world.claim(job)
    world.dispatcher.stop()
    world.now += 60  # the API was away
    world.dispatcher = world.another()
    world.round()
    assert world.state(job) == "running"
    world.report(job, 1)
    world.round(9)
    assert world.state(job) == "running"
    world.round(11)
    assert world.state(job) == "queued"


def test_a_runner_that_gets_no_further_is_lost(world: World) -> None:
    job = world.job()
    world.round()
    world.claim(job)
    for _ in range(14):
        world.now += 8
        world.report(job, 7)
        world.round()
    assert world.state(job) == "queued"
    assert "no further" in world.store.get(job).attempt.error.message


def test_a_runner_that_uploads_gets_further(world: World) -> None:
    job = world.job()
    world.round()
    world.claim(job)
    for i in range(20):
        world.now += 8
        world.report(job, 7, uploads=i)
        world.round()
    assert world.state(job) == "running"


def test_a_runner_that_ray_forgot_is_left_alone_while_it_gets_further(world: World) -> None:
    job = world.job()
    world.round()
    world.claim(job)
    world.ray.statuses.clear()
    for i in range(6):
        world.now += 8
        world.report(job, i)
        world.round()
    assert world.state(job) == "running"
    for _ in range(2):
        world.now += 8
        world.report(job, 5)
        world.round()
    assert world.state(job) == "running"
    world.round(8)
    assert world.state(job) == "queued", "two leases have passed, and it got no further"


def test_a_hand_over_that_failed_is_made_again_under_the_same_name(world: World) -> None:
    job = world.job()
    world.ray.submit_fails = 1
    with pytest.raises(Exception, match="500"):
        world.round()
    assert world.state(job) == "starting"
    world.round(1)
    assert list(world.ray.statuses) == [f"{job}-1"]
    world.claim(job)
    assert world.state(job) == "running"


def test_a_hand_over_that_took_its_time_and_was_made_again_starts_one_runner_that_counts(world: World) -> None:
    job = world.job()
    world.round()
    late = world.ray.statuses.pop(f"{job}-1")  # Ray has taken it, but does not know it yet
    entrypoint = world.ray.entrypoints[f"{job}-1"]
    world.round(1)
    assert world.ray.entrypoints[f"{job}-1"] == entrypoint, "whichever of the two arrives, its code is good"
    world.ray.statuses[f"{job}-1"] = late
    world.claim(job)
    assert world.state(job) == "running"


def test_a_runner_that_dies_before_it_speaks_leaves_its_log(world: World) -> None:
    job = world.job()
    world.round()
    world.ray.statuses[f"{job}-1"] = "FAILED"
    world.round(1)
    assert world.state(job) == "queued"
    assert [line.text for line in world.store.logs(job)] == [f"what {job}-1 wrote", "and died of"]


def test_a_runner_that_never_starts_is_lost(world: World) -> None:
    job = world.job()
    world.round()
    world.ray.statuses[f"{job}-1"] = "PENDING"
    world.round(119)
    assert world.state(job) == "starting"
    world.round(2)
    assert world.state(job) == "queued"


def test_a_job_fails_after_its_attempts(world: World) -> None:
    job = world.job()
    for _ in range(3):
        world.round(100)
        world.claim(job)
        world.round(11)
    assert world.state(job) == "failed"
    assert len(world.store.get(job).attempts) == 3


def test_without_ray_jobs_wait_and_leases_are_still_watched(world: World) -> None:
    running = world.job()
    world.round()
    world.claim(running)
    waiting = world.job()
    world.ray.down = True
    with pytest.raises(Exception, match="no route"):
        world.round(11)
    assert world.state(waiting) == "queued"
    assert world.state(running) == "queued"
    world.ray.down = False
    world.round(2)
    assert world.state(waiting) == world.state(running) == "starting"


def test_what_no_node_can_run_waits_and_says_why_until_its_time_has_passed(world: World) -> None:
    big, small = world.job(needs=Needs(memory=10**15), priority=9), world.job()
    world.round()
    assert world.state(small) == "starting"
    found = world.store.get(big)
    assert found.state == "queued"
    assert "1,000,000,000,000,000 bytes" in found.waiting_for
    events = len(world.store.events(big))
    world.round(1)
    assert len(world.store.events(big)) == events, "it is said once"
    world.round(500)
    assert world.state(big) == "timed_out"


def test_a_job_that_runs_too_long_is_stopped_and_timed_out(world: World) -> None:
    job = world.job()
    world.round()
    world.claim(job)
    for i in range(40):
        world.now += 8
        if world.state(job) == "running":
            world.report(job, i)
        world.round()
    world.ray.statuses[f"{job}-sweep-1"] = "SUCCEEDED"
    world.round(1)
    assert world.state(job) == "timed_out"


def test_a_cancel_is_left_to_the_runner_first_then_to_ray_then_swept(world: World) -> None:
    job = world.job()
    world.round()
    world.claim(job)
    world.store.change(job, machine.CancelAsked(world.now))
    world.round(1)
    assert world.ray.stopped == []
    world.round(4)
    assert world.ray.stopped == [f"{job}-1"]
    world.round(1)
    assert "workers.sweep" in world.ray.entrypoints[f"{job}-sweep-1"]
    assert world.state(job) == "canceling"
    world.ray.statuses[f"{job}-sweep-1"] = "SUCCEEDED"
    world.round(1)
    assert world.state(job) == "canceled"


def test_a_cancel_before_the_claim_stops_the_runner_at_once(world: World) -> None:
    job = world.job()
    world.round()
    world.store.change(job, machine.CancelAsked(world.now))
    world.round()
    assert world.ray.stopped == [f"{job}-1"]


def test_of_two_dispatchers_one_works_and_no_attempt_starts_twice(world: World) -> None:
    other = world.another()
    jobs = [world.job() for _ in range(6)]
    for _ in range(30):
        world.now += 1
        assert world.dispatcher.round() != other.round()
        for job in jobs:
            found = world.store.get(job)
            if found.state == "starting":
                world.claim(job)
            elif found.state == "running":
                world.store.change(job, machine.Granted(world.now, 1))
                world.store.change(job, machine.Succeeded(world.now, 1, {}))
    assert {world.state(job) for job in jobs} == {"succeeded"}
    assert sorted(world.ray.statuses) == sorted(f"{job}-1" for job in jobs)
    world.dispatcher.stop()
    assert other.round(), "the lease was given back"


# ---- nodes that an autoscaler may add -----------------------------------------------------------------


def shapes(*shapes: dict[str, object]) -> World:
    world = World(settings=Settings.model_validate({"node_shapes": shapes}))
    world.ray.nodes = [{"state": "ALIVE", "resources_total": {"CPU": 0.0, "memory": 4e9}}]  # the head
    return world


SMALL = Needs(cpus=2, memory=8 << 30)


def test_without_shapes_only_living_nodes_count() -> None:
    world = shapes()
    job = world.job(needs=SMALL)
    world.round()
    assert world.state(job) == "queued"
    assert "the largest node has 0, 0 and 4,000,000,000" in world.store.get(job).waiting_for


@pytest.mark.parametrize("count", [None, 2])
def test_a_job_starts_where_a_node_that_it_fits_may_be_added(count: int | None) -> None:
    world = shapes({"cpus": 2, "memory": "16Gi", "count": count})
    job = world.job(needs=SMALL)
    world.round()
    assert world.state(job) == "starting"


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"cpus": 1, "memory": "16Gi"}, "the largest node has 1, 0 and 17,179,869,184"),
        ({"cpus": 2, "memory": "4Gi"}, "the largest node has 2, 0 and 4,294,967,296"),
        ({"cpus": 2, "memory": "16Gi", "count": 1}, "no processor for the runner"),
        ({"cpus": 2, "memory": "16Gi", "count": 0}, "the largest node has 0, 0"),
    ],
)
def test_a_job_waits_and_says_why_where_no_node_that_may_be_added_is_enough(
    shape: dict[str, object], reason: str
) -> None:
    world = shapes(shape)
    job = world.job(needs=SMALL)
    world.round()
    assert world.state(job) == "queued"
    assert reason in world.store.get(job).waiting_for


def test_living_nodes_and_shapes_count_together_for_the_runner() -> None:
    world = shapes({"cpus": 2, "memory": "16Gi", "count": 1}, {"cpus": 1, "memory": "1Gi", "count": 1})
    job = world.job(needs=SMALL)
    gpu = world.job(needs=replace(SMALL, gpus=1.0))
    world.round()
    assert world.state(job) == "starting"
    assert world.state(gpu) == "queued"


# ---- beginning and ending -----------------------------------------------------------------------------


class Watched(MemoryStore):
    """A store that says how often the lease was asked for, and whose tables may be of another version."""

    def __init__(self) -> None:
        super().__init__()
        self.held = threading.Semaphore(0)
        self.foreign = False

    def check(self) -> None:
        if self.foreign:
            raise Unavailable("the database has the tables of another version")

    def hold(self, lease: str, holder: str, now: float, seconds: float) -> bool:
        answer = super().hold(lease, holder, now, seconds)
        self.held.release()
        return answer


def test_a_dispatcher_that_ends_gives_its_lease_back_whenever_it_is_told() -> None:
    store = Watched()
    world = World(store=store)
    for _ in range(5):
        with world.another().running():
            assert store.held.acquire(timeout=10)
        other = world.another()
        assert other.round(), "the lease was free"
        other.stop()
        while store.held.acquire(blocking=False):
            pass


def test_tables_of_another_version_are_left_to_another_dispatcher() -> None:
    store = Watched()
    world = World(store=store)
    store.foreign = True
    with pytest.raises(Unavailable):
        world.dispatcher.round()
    assert not world.dispatcher.leads
    store.foreign = False
    assert world.another().round(), "the first one holds no lease"


def test_a_dispatcher_says_whether_it_leads() -> None:
    world = World()
    other = world.another()
    assert not world.dispatcher.leads
    assert world.dispatcher.round()
    assert not other.round()
    assert world.dispatcher.leads
    assert not other.leads
    assert 0 <= world.dispatcher.idle_seconds < 60
    world.dispatcher.stop()
    assert not world.dispatcher.leads

"""The life of a job: every state against every event, and random lives that keep the invariants."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.jobs import ENDED, Attempt, Entry, Job, Limits, Problem, State
from api.machine import (
    CancelAsked,
    Claimed,
    Cleared,
    Dispatched,
    Failed,
    Granted,
    Happening,
    Lost,
    Refused,
    Reported,
    RetryAsked,
    Stale,
    Succeeded,
    Waiting,
    transition,
)
from workers.reports import Progress

ERROR = Problem("ReadFailed", "ends early")
Q, ST, R, C = State.QUEUED, State.STARTING, State.RUNNING, State.CANCELING
OK, FAIL, OFF, LATE = State.SUCCEEDED, State.FAILED, State.CANCELED, State.TIMED_OUT


def job_in(state: State, *, attempts: int = 1, granted: bool = False) -> Job:
    """A job in a state, in its first attempt unless it is queued."""
    limits = Limits(max_attempts=3)
    job = Job("id", {}, "average", "/out", 0.0, limits=limits, allowed=3)
    if state is not Q:
        closed = [Attempt(i, 0.0, "code", "me", "token", 5.0, ended_at=1.0) for i in range(1, attempts)]
        ended_at = 1.0 if state in ENDED else None
        last = Attempt(attempts, 0.0, "code", "" if state is ST else "me", granted=granted, ended_at=ended_at)
        job = replace(job, attempts=(*closed, last), ended_at=ended_at)
    return replace(job, state=state, ends_as=OFF if state is C else None)


HAPPENINGS: dict[str, Happening] = {
    "dispatched": Dispatched(10, "code"),
    "waiting": Waiting(10, "no node is large enough"),
    "claimed": Claimed(10, 1, "code", "me", "token", 20),
    "reported": Reported(10, 1, 1, Progress("writing", 1, 2), (Entry("shard"),), 20),
    "granted": Granted(10, 1),
    "succeeded": Succeeded(10, 1, {"files": []}),
    "failed for good": Failed(10, 1, ERROR, again=False),
    "failed": Failed(10, 1, ERROR, again=True),
    "lost": Lost(10, 1, "silence"),
    "cancel": CancelAsked(10),
    "deadline": CancelAsked(10, LATE, "too long"),
    "cleared": Cleared(10),
    "retry": RetryAsked(10),
}

# What becomes of a job in its first attempt, by state; whatever is not named is refused.
NEXT: dict[str, dict[State, State]] = {
    "dispatched": {Q: ST},
    "waiting": {Q: Q},
    "claimed": {ST: R, R: R},
    "reported": {R: R, C: C},
    "granted": {R: R},
    "succeeded": {},  # not without a grant
    "failed for good": {ST: FAIL, R: FAIL},
    "failed": {ST: Q, R: Q},
    "lost": {ST: Q, R: Q},
    "cancel": {Q: OFF, ST: C, R: C, C: C},
    "deadline": {Q: LATE, ST: C, R: C, C: C},
    "cleared": {C: OFF},
    "retry": {FAIL: Q, OFF: Q, LATE: Q},
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("name", HAPPENINGS)
def test_every_event_in_every_state(name: str, state: State) -> None:
    job, happening = job_in(state), HAPPENINGS[name]
    if state in NEXT[name]:
        after, entries = transition(happening, job)
        assert after.state is NEXT[name][state]
        assert all(len(entry.kind) <= 32 for entry in entries)
        assert (after.ended_at is not None) == (after.state in ENDED)
    else:
        with pytest.raises(Refused):
            transition(happening, job)


@pytest.mark.parametrize("state", [Q, *sorted(ENDED)])
@pytest.mark.parametrize("name", ["claimed", "reported", "granted", "succeeded", "failed", "lost"])
def test_what_an_attempt_says_after_its_end_is_stale(name: str, state: State) -> None:
    with pytest.raises(Stale):
        transition(HAPPENINGS[name], job_in(state))


@pytest.mark.parametrize("name", ["claimed", "reported", "granted", "succeeded", "failed", "lost"])
def test_an_earlier_attempt_is_stale(name: str) -> None:
    for state in (ST, R):
        with pytest.raises(Stale):
            transition(HAPPENINGS[name], job_in(state, attempts=2))


@pytest.mark.parametrize(("claim", "nonce"), [("wrong", "me"), ("code", "another")])
def test_an_attempt_is_claimed_by_one_runner(claim: str, nonce: str) -> None:
    with pytest.raises(Stale):
        transition(Claimed(10, 1, claim, nonce, "token", 20), job_in(R))


def test_a_claim_made_again_changes_the_token_and_tells_nothing() -> None:
    after, entries = transition(Claimed(10, 1, "code", "me", "newer", 20), job_in(R))
    assert (after.attempt.token, entries) == ("newer", ())


def test_a_report_counts_once_and_always_lengthens_the_lease() -> None:
    report = HAPPENINGS["reported"]
    once, entries = transition(report, job_in(R))
    assert [entry.kind for entry in entries] == ["shard"]
    assert (once.progress.done, once.attempt.lease, once.attempt.moved, once.attempt.reports) == (1, 20, 10, 1)
    twice, again = transition(replace(report, at=30, lease=40), once)
    assert again == ()
    assert (twice.progress, twice.attempt.lease, twice.attempt.moved) == (once.progress, 40, 10)
    late, _ = transition(replace(report, lease=5), twice)
    assert late.attempt.lease == 40, "a report that comes late does not shorten it"


def test_from_the_grant_on_a_job_cannot_be_canceled_until_its_runner_is_lost() -> None:
    granted = job_in(R, granted=True)
    with pytest.raises(Refused, match="too late"):
        transition(HAPPENINGS["cancel"], granted)
    lost, _ = transition(HAPPENINGS["lost"], granted)
    assert transition(HAPPENINGS["cancel"], lost)[0].state is C


def test_a_granted_attempt_succeeds() -> None:
    after, [entry] = transition(HAPPENINGS["succeeded"], replace(job_in(R, granted=True), error=ERROR))
    assert (after.state, after.result, after.error, entry.kind) == (OK, {"files": []}, None, "succeeded")


def test_a_grant_asked_for_again_tells_nothing() -> None:
    assert transition(HAPPENINGS["granted"], job_in(R, granted=True))[1] == ()


def test_attempts_follow_each_other_with_growing_pauses_until_none_is_left() -> None:
    job, pauses = job_in(Q), []
    job = replace(job, allowed=9)
    for number in range(1, 10):
        job, _ = transition(Dispatched(100.0, "code"), job)
        job, entries = transition(Lost(100.0, number, "silence"), job)
        pauses.append(job.not_before - 100.0)
    assert pauses[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert job.state is FAIL
    assert [entry.kind for entry in entries] == ["attempt_lost", "failed"]
    assert (job.error.kind, len(job.attempts)) == ("lost", 9)


def test_a_queued_job_with_attempts_is_cleared_before_it_ends() -> None:
    queued, _ = transition(HAPPENINGS["lost"], job_in(R))
    canceling, _ = transition(HAPPENINGS["deadline"], queued)
    assert canceling.state is C
    ended, [entry] = transition(HAPPENINGS["cleared"], canceling)
    assert (ended.state, entry.kind) == (LATE, "timed_out")


def test_a_retry_allows_as_many_attempts_again() -> None:
    failed, _ = transition(HAPPENINGS["failed for good"], job_in(R, attempts=1))
    again, _ = transition(HAPPENINGS["retry"], failed)
    assert (again.allowed, again.error, again.ended_at, again.started_at) == (4, None, None, None)


def test_the_same_reason_to_wait_is_told_once() -> None:
    waiting, [entry] = transition(HAPPENINGS["waiting"], job_in(Q))
    assert entry.data == {"reason": "no node is large enough"}
    assert transition(HAPPENINGS["waiting"], waiting) == (waiting, ())


@st.composite
def lives(draw: st.DrawFn) -> list[Happening]:
    """Events in any order, of the current attempt or of others."""
    names = draw(st.lists(st.sampled_from(sorted(HAPPENINGS)), max_size=40))
    numbers = draw(st.lists(st.integers(1, 6), min_size=len(names), max_size=len(names)))
    found = []
    for i, (name, number) in enumerate(zip(names, numbers, strict=True)):
        happening = replace(HAPPENINGS[name], at=float(i))
        found.append(replace(happening, number=number) if hasattr(happening, "number") else happening)
    return found


@given(lives())
def test_any_life_keeps_the_invariants(life: list[Happening]) -> None:
    job = job_in(Q)
    for happening in life:
        before = job
        try:
            job, _ = transition(happening, job)
        except Refused:
            continue
        still_open = [attempt for attempt in job.attempts if attempt.ended_at is None]
        assert [attempt.number for attempt in job.attempts] == list(range(1, len(job.attempts) + 1))
        assert len(still_open) <= 1
        assert not still_open or still_open == [job.attempt]
        assert bool(still_open) <= (job.state in (ST, R, C))
        assert (job.state in (ST, R)) <= bool(still_open)
        assert len(job.attempts) <= job.allowed
        assert job.state is not OK or job.attempt.granted
        assert before.state not in ENDED or isinstance(happening, RetryAsked)
        assert before.attempts == job.attempts[: len(before.attempts)] or len(before.attempts) == len(job.attempts)


def test_an_attempt_that_had_to_make_room_does_not_count() -> None:
    moved = Failed(10, 1, ERROR, again=True, counts=False)
    job = replace(job_in(R), allowed=1)
    assert transition(replace(moved, counts=True), job)[0].state is FAIL
    after, _ = transition(moved, job)
    assert after.state is Q
    assert after.allowed == 2
    assert after.attempt.error == ERROR

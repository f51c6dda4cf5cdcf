"""The life of a job: what may happen in which state, and what comes of it. Pure; knows no clock, database or Ray.

    queued -> starting -> running -> succeeded | failed
       ^          |          |
       `----------+----------'  an attempt was lost or failed for a passing cause, and another is allowed
    starting, running -> canceling -> canceled | timed_out

`transition` gives the next job and the entries that tell of it. What the dispatcher has to do follows from the
state alone, so that nothing is owed by a process that may be dead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import singledispatch
from hmac import compare_digest
from typing import Any

from api.jobs import ENDED, Attempt, Entry, Job, Problem, State
from workers.reports import Progress

BACKOFF = 1.0  # seconds before the second attempt, doubled for each one more
LONGEST_BACKOFF = 60.0


class Refused(Exception):
    """The event cannot happen to the job as it is. The message says why."""


class Stale(Refused):
    """The event comes from an attempt that no longer counts."""


@dataclass(frozen=True)
class Happening:
    """Something that happens to a job at the time `at`."""

    at: float


@dataclass(frozen=True)
class Dispatched(Happening):
    """The dispatcher starts another attempt, whose runner will prove itself with `claim`."""

    claim: str


@dataclass(frozen=True)
class Waiting(Happening):
    """Why a queued job is not started."""

    reason: str


@dataclass(frozen=True)
class Claimed(Happening):
    """A runner that calls itself `nonce` takes the attempt, speaks with `token` from now on and has a lease."""

    number: int
    claim: str
    nonce: str
    token: str
    lease: float


@dataclass(frozen=True)
class Reported(Happening):
    """The `report`-th report of the runner: how far it is, what happened, and a longer lease."""

    number: int
    report: int
    progress: Progress
    entries: Sequence[Entry]
    lease: float


@dataclass(frozen=True)
class Granted(Happening):
    """The runner asks to publish; from here on the job can no longer be canceled while the runner lives."""

    number: int


@dataclass(frozen=True)
class Succeeded(Happening):
    """The result is published."""

    number: int
    result: Mapping[str, Any]


@dataclass(frozen=True)
class Failed(Happening):
    """The attempt ended with an error; `again` where another attempt may do better. One that had to make room, as on a
    machine that goes away, does not count among those that a job may have.
    """

    number: int
    error: Problem
    again: bool
    counts: bool = True


@dataclass(frozen=True)
class Lost(Happening):
    """Nothing was heard of the attempt for longer than its lease, or it never started."""

    number: int
    reason: str


@dataclass(frozen=True)
class CancelAsked(Happening):
    """Somebody, or a deadline, wants the job to stop; it then ends `ends_as`."""

    ends_as: State = State.CANCELED
    reason: str = "asked"


@dataclass(frozen=True)
class Cleared(Happening):
    """A job that was being canceled has no process and no staging left."""


@dataclass(frozen=True)
class RetryAsked(Happening):
    """Somebody wants an ended job to be tried again."""


Transition = tuple[Job, tuple[Entry, ...]]


@singledispatch
def transition(happening: Happening, _job: Job) -> Transition:
    """What becomes of a job. Raises Refused, and Stale where the event's attempt is not the current one."""
    raise TypeError(f"{happening} is not known")


@transition.register
def _(happening: Dispatched, job: Job) -> Transition:
    _expect(job, State.QUEUED)
    number = len(job.attempts) + 1
    attempt = Attempt(number, happening.at, claim=happening.claim)
    moved = replace(job, state=State.STARTING, attempts=(*job.attempts, attempt), waiting_for="")
    started = replace(moved, started_at=job.started_at or happening.at, progress=Progress("starting"))
    return started, (Entry("starting", {"attempt": number}),)


@transition.register
def _(happening: Waiting, job: Job) -> Transition:
    _expect(job, State.QUEUED)
    if job.waiting_for == happening.reason:
        return job, ()
    return replace(job, waiting_for=happening.reason), (Entry("waiting", {"reason": happening.reason}),)


@transition.register
def _(happening: Claimed, job: Job) -> Transition:
    _expect_current(job, happening.number)
    attempt = job.attempt
    if not compare_digest(attempt.claim, happening.claim) or (attempt.nonce and attempt.nonce != happening.nonce):
        raise Stale("the attempt was claimed by another runner")
    _expect(job, State.STARTING, State.RUNNING)
    changed = job.with_attempt(
        nonce=happening.nonce,
        token=happening.token,
        lease=happening.lease,
        claimed_at=attempt.claimed_at or happening.at,
        moved=happening.at,
    )
    if job.state is State.RUNNING:  # the answer to the first claim was lost
        return changed, ()
    return replace(changed, state=State.RUNNING), (Entry("running", {"attempt": happening.number}),)


@transition.register
def _(happening: Reported, job: Job) -> Transition:
    _expect_current(job, happening.number)
    _expect(job, State.RUNNING, State.CANCELING)
    known = happening.report <= job.attempt.reports  # sent again because the answer was lost
    progress = job.progress if known else happening.progress
    reports = max(job.attempt.reports, happening.report)
    moved = job.attempt.moved if progress == job.progress else happening.at
    lease = max(job.attempt.lease, happening.lease)
    changed = replace(job.with_attempt(lease=lease, reports=reports, moved=moved), progress=progress)
    return changed, () if known else tuple(happening.entries)


@transition.register
def _(happening: Granted, job: Job) -> Transition:
    _expect_current(job, happening.number)
    _expect(job, State.RUNNING)
    if job.attempt.granted:
        return job, ()
    return job.with_attempt(granted=True), (Entry("publishing", {"attempt": happening.number}),)


@transition.register
def _(happening: Succeeded, job: Job) -> Transition:
    _expect_current(job, happening.number)
    _expect(job, State.RUNNING)
    if not job.attempt.granted:
        raise Refused("the attempt was not granted to publish")
    done = replace(job.progress, phase="done", done=job.progress.total, shards_done=job.progress.shards)
    ended = _ended(job, State.SUCCEEDED, happening.at)
    return replace(ended, progress=done, result=happening.result, error=None), (Entry("succeeded", happening.result),)


@transition.register
def _(happening: Failed, job: Job) -> Transition:
    _expect_current(job, happening.number)
    _expect(job, State.STARTING, State.RUNNING)
    job = job if happening.counts else replace(job, allowed=job.allowed + 1)
    return _attempt_over(job, happening.at, happening.error, "failed", again=happening.again)


@transition.register
def _(happening: Lost, job: Job) -> Transition:
    _expect_current(job, happening.number)
    _expect(job, State.STARTING, State.RUNNING)
    return _attempt_over(job, happening.at, Problem("lost", happening.reason), "lost", again=True)


@transition.register
def _(happening: CancelAsked, job: Job) -> Transition:
    if job.state is State.CANCELING:
        return job, ()
    _expect(job, State.QUEUED, State.STARTING, State.RUNNING)
    if job.state is State.RUNNING and job.attempt.granted:
        raise Refused("the result is being published; it is too late to cancel")
    entry = Entry("canceling", {"reason": happening.reason})
    if job.state is State.QUEUED and not job.attempts:
        ended = _ended(job, happening.ends_as, happening.at)
        return ended, (entry, Entry(happening.ends_as.value))
    return replace(job, state=State.CANCELING, ends_as=happening.ends_as, canceling_at=happening.at), (entry,)


@transition.register
def _(happening: Cleared, job: Job) -> Transition:
    _expect(job, State.CANCELING)
    state = job.ends_as or State.CANCELED
    return _ended(job, state, happening.at), (Entry(state.value),)


@transition.register
def _(happening: RetryAsked, job: Job) -> Transition:
    if job.state not in ENDED or job.state is State.SUCCEEDED:
        raise Refused(f"the job is {job.state}; only one that failed, was canceled or timed out can be tried again")
    again = replace(
        job,
        state=State.QUEUED,
        ends_as=None,
        allowed=len(job.attempts) + job.limits.max_attempts,
        queued_at=happening.at,
        not_before=happening.at,
        started_at=None,
        ended_at=None,
        canceling_at=None,
        error=None,
        progress=Progress(),
    )
    return again, (Entry("queued", {"reason": "tried again on request"}),)


def _expect(job: Job, *states: State) -> None:
    if job.state not in states:
        raise Refused(f"the job is {job.state}")


def _expect_current(job: Job, number: int) -> None:
    if job.state in ENDED or not job.attempts or job.attempt.number != number or job.attempt.ended_at is not None:
        raise Stale(f"attempt {number} no longer counts: the job is {job.state}")


def _ended(job: Job, state: State, at: float) -> Job:
    if job.attempts and job.attempt.ended_at is None:
        job = job.with_attempt(ended_at=at)
    return replace(job, state=state, ended_at=at, waiting_for="")


def _attempt_over(job: Job, at: float, error: Problem, kind: str, *, again: bool) -> Transition:
    """The attempt is over: another follows where that may help and is allowed, else the job has failed."""
    data: dict[str, Any] = {"attempt": job.attempt.number, "error": asdict(error)}
    job = replace(job.with_attempt(ended_at=at, error=error), error=error)
    if not again or len(job.attempts) >= job.allowed:
        return _ended(job, State.FAILED, at), (Entry(f"attempt_{kind}", data), Entry("failed", data))
    wait = min(BACKOFF * 2 ** (len(job.attempts) - 1), LONGEST_BACKOFF)
    queued = replace(job, state=State.QUEUED, queued_at=at, not_before=at + wait, progress=Progress())
    return queued, (Entry(f"attempt_{kind}", data), Entry("queued", {"reason": "next attempt", "after_seconds": wait}))

"""What the service queues: jobs, attempts, events, as frozen values. Knows states; knows no database, Ray or HTTP."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from workers.reports import Progress


class State(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    CANCELING = "canceling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    TIMED_OUT = "timed_out"


ENDED = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELED, State.TIMED_OUT})
ACTIVE = frozenset({State.STARTING, State.RUNNING, State.CANCELING})


@dataclass(frozen=True)
class Needs:
    """What one shard's task asks of a machine: processors, GPUs, bytes of memory."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory: int = 0


@dataclass(frozen=True)
class Limits:
    """How often a job is tried, and the seconds that it may wait and run."""

    max_attempts: int = 5
    queue_seconds: float = 7 * 86400.0
    run_seconds: float = 86400.0


@dataclass(frozen=True)
class Problem:
    """Why something did not work: the kind of error, what happened, where, and what to do."""

    kind: str
    message: str
    where: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Attempt:
    """One try to run a job.

    `claim` is the code that one runner can start with, once; `token` the SHA-256 of what it speaks with from then on,
    `nonce` its own name for itself. `lease` is the time until which the runner is believed to be alive, `granted`
    whether it may publish, `reports` how many of its reports were taken, `moved` when it last got further, `phased`
    when its phase began.
    """

    number: int
    created_at: float
    claim: str = ""
    nonce: str = ""
    token: str = ""
    lease: float = 0.0
    granted: bool = False
    reports: int = 0
    moved: float = 0.0
    phased: float = 0.0
    claimed_at: float | None = None
    ended_at: float | None = None
    error: Problem | None = None


@dataclass(frozen=True)
class Job:
    """A recipe to be made, and where that stands. Times are seconds since 1970."""

    id: str
    recipe: Mapping[str, Any]
    method: str
    output: str
    created_at: float
    project: str = "default"
    labels: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    secrets: Mapping[str, str] = field(default_factory=dict)  # what for, and the name of the secret
    needs: Needs = Needs()
    limits: Limits = Limits()
    state: State = State.QUEUED
    ends_as: State | None = None  # what a job that is being canceled will be
    allowed: int = 0  # attempts that may be made before it fails; more after a retry
    queued_at: float = 0.0
    not_before: float = 0.0
    started_at: float | None = None
    ended_at: float | None = None
    canceling_at: float | None = None
    progress: Progress = Progress()  # noqa: RUF009  (frozen)
    result: Mapping[str, Any] | None = None
    error: Problem | None = None
    waiting_for: str = ""
    events: int = 0
    attempts: tuple[Attempt, ...] = ()

    @property
    def attempt(self) -> Attempt:
        """The current or last attempt."""
        return self.attempts[-1]

    def with_attempt(self, **changes: Any) -> "Job":
        """The job with its current attempt changed."""
        return replace(self, attempts=(*self.attempts[:-1], replace(self.attempt, **changes)))

    @property
    def expires_at(self) -> float:
        """When it is no longer worth starting."""
        return self.queued_at + self.limits.queue_seconds

    @property
    def submission(self) -> str:
        """The name of the current attempt in Ray."""
        return f"{self.id}-{self.attempt.number}"


@dataclass(frozen=True)
class Entry:
    """An event as it is told: its kind and what belongs to it."""

    kind: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """The `id`-th thing that happened to a job, counted from 1 without a gap."""

    job: str
    id: int
    at: float
    kind: str
    attempt: int
    data: Mapping[str, Any]


@dataclass(frozen=True)
class LogLine:
    """The `id`-th line that the runners of a job have written."""

    id: int
    at: float
    attempt: int
    text: str


def new_id(now: float | None = None) -> str:
    """A UUID of version 7 (RFC 9562): later ones sort after earlier ones."""
    milliseconds = int((time.time() if now is None else now) * 1000)
    number = milliseconds << 80 | int.from_bytes(os.urandom(10))
    number = number & ~(0xF << 76) | 0x7 << 76
    number = number & ~(0x3 << 62) | 0x2 << 62
    text = f"{number:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"

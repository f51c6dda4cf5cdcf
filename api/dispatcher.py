"""Brings what the database says about jobs to pass on Ray. Knows leases, deadlines and order; computes nothing.

One dispatcher works at a time, by a lease in the database. Each round looks at every job that is not queued, and does
what its state asks for; then it starts queued jobs. Whatever a round leaves undone, the next one does: nothing is
remembered between rounds but when this dispatcher began to look, because a lease that ran out while nobody could
renew it proves nothing.
"""

import hashlib
import logging
import math
import secrets
import shlex
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from api import machine
from api.jobs import Attempt, Job, Needs, State
from api.machine import Cleared, Dispatched, Happening, Lost, Refused, Waiting
from api.ray_jobs import STOPPED, RayJobs, RayUnreachable, Submission
from api.settings import NodeShape, Settings
from api.store.store import NotFound, Store, Unavailable

_LEASE = "dispatcher"
_LOG = logging.getLogger(__name__)


def digest(secret: str) -> str:
    """How a secret is kept: by its SHA-256."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Dispatcher:
    """Starts, watches and ends attempts; `round` is one look at everything, `run` goes on until it is stopped."""

    def __init__(self, store: Store, ray: RayJobs, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        self._store, self._ray, self._settings, self._clock = store, ray, settings, clock
        self._name = f"dispatcher-{uuid.uuid4()}"
        self._stopped = threading.Event()
        self._looking_since: float | None = None
        self._last_step = time.monotonic()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let a thread of its own do rounds until the end of the block."""
        thread = threading.Thread(target=self.run, name="dispatcher", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.stop()
            thread.join(self._settings.grace_seconds)

    @property
    def leads(self) -> bool:
        """Whether this is the dispatcher that works, as far as it knows."""
        return self._looking_since is not None

    @property
    def idle_seconds(self) -> float:
        """How long ago it last did anything: began a round, or looked at another job in one."""
        return time.monotonic() - self._last_step

    def run(self, pause: float = 0.3) -> None:
        """Rounds until `stop`. An unreachable database or cluster ends a round, not the dispatcher."""
        self._rounds(pause)
        self._release()  # once more: the last round may have begun with taking the lease

    def _rounds(self, pause: float) -> None:
        trouble = ""
        while not self._stopped.wait(pause):
            try:
                self.round()
                trouble = ""
            except (Unavailable, RayUnreachable) as error:
                if isinstance(error, Unavailable):
                    self._looking_since = None
                if str(error) != trouble:
                    _LOG.warning("a round was cut short: %s", error)
                trouble = str(error)
            except Exception:
                _LOG.exception("a round failed")

    def stop(self) -> None:
        """End `run` and give the lease back."""
        self._stopped.set()
        self._release()

    def _release(self) -> None:
        self._looking_since = None
        with suppress(Unavailable):  # it runs out by itself then
            self._store.release(_LEASE, self._name)

    def round(self) -> bool:
        """Do what is to do now; False where another dispatcher is at work."""
        self._last_step = time.monotonic()
        now = self._clock()
        if self._looking_since is None:
            self._store.check()  # before it takes the lease: another one may know these tables
        if not self._store.hold(_LEASE, self._name, now, self._settings.lease_seconds):
            self._looking_since = None
            return False
        if self._looking_since is None:
            self._looking_since = now
        for job in self._store.expired(now):
            self._change(job, machine.CancelAsked(now, State.TIMED_OUT, "it waited too long"))
        active = self._store.active()
        for job in active:
            if self._stopped.is_set():  # the lease is given back
                return True
            self._last_step = time.monotonic()
            with suppress(RayUnreachable):  # the next round tries again; leases are watched meanwhile
                self._see_to(job, now)
        if not self._stopped.is_set():
            self._start_queued(self._settings.max_running - len(active), now)
        return True

    def _change(self, job: Job, happening: Happening) -> Job | None:
        """The changed job, or None where it has moved on since it was looked at."""
        try:
            return self._store.change(job.id, happening)
        except (Refused, NotFound):
            return None

    # ---- starting -------------------------------------------------------------------------------------

    def _start_queued(self, room: int, now: float) -> None:
        if room <= 0:
            return
        queued = self._store.queued(now, room + 50)
        nodes = self._ray.nodes() if queued else []
        for job in queued:
            reason = _obstacle(job.needs, self._settings.runner_cpus, nodes, self._settings.node_shapes)
            if reason:
                if reason != job.waiting_for:
                    self._change(job, Waiting(now, reason))
                continue
            if room == 0:
                return
            room -= 1
            started = self._change(job, Dispatched(now, secrets.token_urlsafe(24)))
            if started:
                _LOG.info("attempt starts", extra={"job": job.id, "attempt": started.attempt.number})
                self._submit(started)

    def _submit(self, job: Job) -> None:
        """Hand the current attempt to Ray. The claim is good for one runner, so it may be seen on Ray's dashboard."""
        command = [  # a claim that begins with a dash would be taken for an option, were it an argument of its own
            self._settings.python,
            *("-m", "workers.runner", "--server", self._settings.url),
            *("--job", job.id, "--attempt", str(job.attempt.number), f"--claim={job.attempt.claim}"),
        ]
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": "3"}
        self._ray.submit(Submission(job.submission, _entrypoint(command), self._settings.runner_cpus, environment))

    # ---- watching -------------------------------------------------------------------------------------

    def _see_to(self, job: Job, now: float) -> None:
        started = job.started_at or now
        if job.state is not State.CANCELING and started + job.limits.run_seconds < now:
            self._change(job, machine.CancelAsked(now, State.TIMED_OUT, "it ran too long"))
        elif job.state is State.STARTING:
            self._see_to_starting(job, job.attempt, now)
        elif job.state is State.RUNNING:
            self._see_to_running(job, job.attempt, now)
        elif job.state is State.CANCELING:
            self._see_to_canceling(job, job.attempt, now)

    def _see_to_starting(self, job: Job, attempt: Attempt, now: float) -> None:
        status = self._ray.status(job.submission)
        if status in STOPPED:
            self._lose(job, attempt, f"the runner did not start (Ray: {status})", now)
        elif max(attempt.created_at, self._looking_since or now) + self._settings.start_seconds < now:
            self._lose(job, attempt, f"the runner did not start in {self._settings.start_seconds:.0f} s", now)
        elif status is None:  # the hand-over was cut short, or Ray has lost it
            self._submit(job)

    def _see_to_running(self, job: Job, attempt: Attempt, now: float) -> None:
        settings = self._settings
        since = self._looking_since or now
        if max(attempt.lease, since + settings.lease_seconds) < now:
            self._lose(job, attempt, f"nothing was heard of the runner for {settings.lease_seconds:.0f} s", now)
        elif max(attempt.moved, since) + settings.stall_seconds < now:
            self._lose(job, attempt, f"the runner got no further for {settings.stall_seconds:.0f} s", now)
        elif max(attempt.moved, since) + 2 * settings.lease_seconds < now and self._is_orphan(job):
            self._lose(job, attempt, "Ray does not know the runner any more, and it gets no further", now)

    def _is_orphan(self, job: Job) -> bool:
        """Whether the runner may have outlived its cluster. Only a hint: one that gets further is left to it."""
        return self._ray.status(job.submission) in {None, *STOPPED}

    def _lose(self, job: Job, attempt: Attempt, reason: str, now: float) -> None:
        self._keep_ray_logs(job, attempt, now)
        if self._change(job, Lost(now, attempt.number, reason)):
            _LOG.warning("attempt lost: %s", reason, extra={"job": job.id, "attempt": attempt.number})
            with suppress(RayUnreachable):
                self._ray.stop(job.submission)

    def _keep_ray_logs(self, job: Job, attempt: Attempt, now: float) -> None:
        """What a runner that never spoke left behind: the reason of its death is in there."""
        if attempt.claimed_at is None:
            with suppress(RayUnreachable):
                lines = self._ray.logs(job.submission).splitlines()[-50:]
                self._store.log(job.id, attempt.number, lines, now)

    # ---- ending ---------------------------------------------------------------------------------------

    def _see_to_canceling(self, job: Job, attempt: Attempt, now: float) -> None:
        """The runner is told with its next report. One that does not obey, or never spoke, is ended by Ray; then what
        it has left is swept away.
        """
        alive = attempt.ended_at is None
        waited = now - (job.canceling_at or now)
        if alive and attempt.claimed_at and waited < self._settings.cancel_seconds:
            return
        if alive and self._ray.status(job.submission) not in {None, *STOPPED}:
            self._ray.stop(job.submission)
            return
        sweep = f"{job.id}-sweep-{attempt.number}"
        status = self._ray.status(sweep)
        if status is None:
            output = str(Path(job.output))
            command = [self._settings.python, "-m", "workers.sweep", "--job", job.id, "--output", output]
            self._ray.submit(Submission(sweep, _entrypoint(command), self._settings.runner_cpus, {}))
        elif status in STOPPED:
            self._change(job, Cleared(now))


def _entrypoint(command: list[str]) -> str:
    """For Ray's shell, which is replaced: a signal then reaches the runner itself, and Ray waits for it to end."""
    return f"exec {shlex.join(command)}"


def _obstacle(needs: Needs, runner_cpus: float, nodes: Sequence[Needs], shapes: Sequence[NodeShape]) -> str:
    """Why no node could ever run a task that needs this much, living or one that an autoscaler may add; empty where
    one could.
    """
    shapes = [shape for shape in shapes if shape.count != 0]
    able = [*nodes, *(Needs(shape.cpus, shape.gpus, shape.memory) for shape in shapes)]
    if any(n.cpus >= needs.cpus and n.gpus >= needs.gpus and n.memory >= needs.memory for n in able):
        fits = any(n.cpus >= runner_cpus for n in able)
        addable = sum(shape.cpus * (math.inf if shape.count is None else shape.count) for shape in shapes if shape.cpus)
        room = max(sum(n.cpus for n in nodes), addable)  # living nodes may be of these shapes
        return "" if fits and room >= needs.cpus + runner_cpus else "no processor for the runner"
    largest = max(able, key=lambda node: (node.memory, node.cpus), default=Needs(0, 0, 0))
    return (
        f"a task needs {needs.cpus:g} processors, {needs.gpus:g} GPUs and {needs.memory:,} bytes; "
        f"the largest node has {largest.cpus:g}, {largest.gpus:g} and {largest.memory:,}"
    )

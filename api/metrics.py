"""What Prometheus may know: jobs by state, queue age, attempts, bytes, seconds per phase, requests, the dispatcher's
rounds, whether the database and Ray answer. Knows no routes.

What the database knows is the same from every process (take the largest); counters belong to one process (add them).
"""

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from api.jobs import Entry, Job, State
from api.ray_jobs import RayJobs
from api.store.store import Store, Unavailable

_SECONDS = (0.1, 0.5, 1, 5, 15, 60, 300, 1800, 7200, 28800)
_FRESH = 60.0  # seconds for which an answer of Ray says something; the API's readiness asks more often


class Metrics:
    """The counters of one process, and what the store says when somebody asks."""

    def __init__(self, store: Store, ray: RayJobs) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Jobs(store))
        self._registry.register(_Ray(ray))
        self._attempts = _attempts(self._registry)
        self._read = Counter("merger_bytes_read", "Bytes of sources read.", registry=self._registry)
        self._written = Counter("merger_bytes_written", "Bytes of finished shards made.", registry=self._registry)
        self._phases = Histogram(
            "merger_phase_seconds", "Seconds per phase.", ["phase"], buckets=_SECONDS, registry=self._registry
        )
        self.requests = Histogram(
            "merger_http_seconds", "Seconds per request.", ["method", "route", "status"], registry=self._registry
        )

    def reported(self, before: Job, after: Job, entries: Sequence[Entry]) -> None:
        """Count what a report adds. Shards that were adopted from an earlier attempt were counted then."""
        if after.attempt.reports == before.attempt.reports:
            return  # sent again because the answer was lost
        self._read.inc(max(0, after.progress.read - before.progress.read))
        made = (each.data for each in entries if each.kind == "shard" and not each.data.get("adopted"))
        self._written.inc(sum(int(data.get("size", 0)) for data in made))
        if after.progress.phase != before.progress.phase:
            self._observe_phase(before, after.attempt.phased)

    def ended(self, before: Job, after: Job) -> None:
        """Count an attempt that its runner has ended, and its last phase."""
        failed = after.attempt.error is not None
        outcome = "failed" if failed else "succeeded" if after.state is State.SUCCEEDED else "canceled"
        self._attempts.labels(outcome).inc()
        self._observe_phase(before, after.attempt.ended_at or 0.0)

    def _observe_phase(self, job: Job, until: float) -> None:
        """Any replica may hear of the end of a phase: its beginning stands with the attempt."""
        if job.attempt.phased:
            self._phases.labels(job.progress.phase).observe(max(0.0, until - job.attempt.phased))

    def rounds(self) -> "Rounds":
        """What a dispatcher of this process fills. Processes without one say nothing of it."""
        return Rounds(self._registry, self._attempts)

    def text(self) -> bytes:
        """Everything, in the format of Prometheus."""
        return generate_latest(self._registry)


class Rounds:
    """What one dispatcher tells of its rounds."""

    def __init__(self, registry: CollectorRegistry | None = None, attempts: Counter | None = None) -> None:
        self._attempts = attempts or _attempts(registry)
        self._leads = False
        self._leading = Gauge(
            "merger_dispatcher_leading", "1 where this dispatcher holds the lease.", registry=registry
        )
        self._last = Gauge(
            "merger_dispatcher_round_timestamp_seconds", "When its last whole round ended.", registry=registry
        )
        self._losses = Counter(
            "merger_dispatcher_lease_losses", "How often another one took its lease.", registry=registry
        )
        self._homeless = Gauge(
            "merger_jobs_without_node", "Queued jobs that no node could run, at the last look.", registry=registry
        )

    def led(self, now: float) -> None:
        """A round was done."""
        self._leads = True
        self._leading.set(1)
        self._last.set(now)

    def stood_by(self) -> None:
        """Another dispatcher leads."""
        if self._leads:
            self._losses.inc()
        self._leads = False
        self._leading.set(0)
        self._homeless.set(0)

    def lost(self) -> None:
        """An attempt was given up."""
        self._attempts.labels("lost").inc()

    def looked(self, homeless: int) -> None:
        """So many of the queued jobs looked at fit no node."""
        self._homeless.set(homeless)


def _attempts(registry: CollectorRegistry | None) -> Counter:
    """All outcomes from zero: an increase that begins with one is not seen as one."""
    attempts = Counter("merger_attempts", "Attempts that have ended, by how.", ["outcome"], registry=registry)
    for outcome in ("succeeded", "failed", "canceled", "lost"):
        attempts.labels(outcome)
    return attempts


class _Jobs(Collector):
    def __init__(self, store: Store) -> None:
        self._store = store

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Asks the store; says nothing of jobs while it does not answer."""
        up = GaugeMetricFamily("merger_database_up", "1 where the database answers.")
        try:
            counts, oldest = self._store.counts(), self._store.oldest_queued()
        except Unavailable:
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        jobs = GaugeMetricFamily("merger_jobs", "Jobs by state.", labels=["state"])
        for state in State:
            jobs.add_metric([state.value], counts.get(state, 0))
        yield jobs
        age = 0.0 if oldest is None else max(0.0, time.time() - oldest)
        yield GaugeMetricFamily("merger_queue_age_seconds", "How long the oldest queued job waits.", value=age)


class _Ray(Collector):
    """Whether Ray answered this process; nothing where it was not asked lately. Asking here could hold up a scrape."""

    def __init__(self, ray: RayJobs) -> None:
        self._ray = ray

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        heard = self._ray.heard
        if heard and time.monotonic() - heard.at < _FRESH:
            yield GaugeMetricFamily("merger_ray_up", "1 where Ray answered this process last.", value=heard.answered)

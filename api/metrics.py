"""What Prometheus may know: jobs by state, queue age, bytes, seconds per phase, requests. Knows no routes."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from api.jobs import Job, State
from api.store.store import Store, Unavailable

_SECONDS = (0.1, 0.5, 1, 5, 15, 60, 300, 1800, 7200, 28800)


class Metrics:
    """The counters of one process, and what the store says when somebody asks."""

    def __init__(self, store: Store) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Jobs(store))
        self._read = Counter("merger_bytes_read", "Bytes of sources read.", registry=self._registry)
        self._written = Counter("merger_bytes_written", "Bytes of results written.", registry=self._registry)
        self._phases = Histogram(
            "merger_phase_seconds", "Seconds per phase.", ["phase"], buckets=_SECONDS, registry=self._registry
        )
        self.requests = Histogram(
            "merger_http_seconds", "Seconds per request.", ["method", "route", "status"], registry=self._registry
        )
        self._since: dict[str, tuple[str, float]] = {}

    def reported(self, before: Job, after: Job) -> None:
        """Count what a report adds."""
        self._read.inc(max(0, after.progress.read - before.progress.read))
        self._written.inc(max(0, after.progress.done - before.progress.done))
        phase, since = self._since.get(after.id, ("", 0.0))
        if phase != after.progress.phase:
            if phase:
                self._phases.labels(phase).observe(time.monotonic() - since)
            self._since[after.id] = (after.progress.phase, time.monotonic())

    def ended(self, job: Job) -> None:
        """Count the last phase of an attempt."""
        phase, since = self._since.pop(job.id, ("", 0.0))
        if phase:
            self._phases.labels(phase).observe(time.monotonic() - since)

    def text(self) -> bytes:
        """Everything, in the format of Prometheus."""
        return generate_latest(self._registry)


class _Jobs(Collector):
    def __init__(self, store: Store) -> None:
        self._store = store

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Asks the store; says nothing of jobs while it does not answer."""
        try:
            counts, oldest = self._store.counts(), self._store.oldest_queued()
        except Unavailable:
            return
        jobs = GaugeMetricFamily("merger_jobs", "Jobs by state.", labels=["state"])
        for state in State:
            jobs.add_metric([state.value], counts.get(state, 0))
        yield jobs
        age = 0.0 if oldest is None else max(0.0, time.time() - oldest)
        yield GaugeMetricFamily("merger_queue_age_seconds", "How long the oldest queued job waits.", value=age)

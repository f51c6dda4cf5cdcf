"""Jobs in memory, for unit tests: the same interface, nothing kept after the process."""

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from api.jobs import ACTIVE, Event, Job, LogLine, State
from api.machine import Happening
from api.store.store import ClientKey, KeyReused, NotFound, Query, Request, Secret, Store, apply, created


class MemoryStore(Store):
    """Dictionaries behind one lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._jobs: dict[str, Job] = {}
        self._events: dict[str, list[Event]] = {}
        self._logs: dict[str, list[LogLine]] = {}
        self._requests: dict[tuple[str, str], tuple[str, str]] = {}
        self._leases: dict[str, tuple[str, float]] = {}
        self._keys: dict[str, ClientKey] = {}
        self._secrets: dict[tuple[str, str], Secret] = {}

    def add(self, job: Job, request: Request | None = None) -> tuple[Job, bool]:
        with self._lock:
            if request and (known := self.find(job.project, request)):
                return known, False
            if request:
                self._requests[job.project, request.key] = (request.digest, job.id)
            job, event = created(job)
            self._jobs[job.id], self._events[job.id], self._logs[job.id] = job, [event], []
            return job, True

    def find(self, project: str, request: Request) -> Job | None:
        digest, job = self._requests.get((project, request.key), (request.digest, None))
        if digest != request.digest:
            raise KeyReused(request.key)
        return self._jobs[job] if job else None

    def get(self, job: str) -> Job:
        try:
            return self._jobs[job]
        except KeyError:
            raise NotFound(job) from None

    def page(self, query: Query) -> list[Job]:
        with self._lock:
            found = [job for job in self._jobs.values() if _matches(job, query)]
        return sorted(found, key=lambda job: job.id, reverse=True)[: query.limit]

    def change(self, job: str, happening: Happening, lines: Sequence[str] = ()) -> Job:
        with self._lock:
            before = self.get(job)
            after, events = apply(before, happening)
            self._jobs[job] = after
            self._events[job] += events
            if lines and after.attempt.reports > before.attempt.reports:
                self.log(job, after.attempt.number, lines, happening.at)
            return after

    def log(self, job: str, attempt: int, lines: Sequence[str], at: float) -> None:
        with self._lock:
            kept = self._logs[job]
            kept += [LogLine(len(kept) + i, at, attempt, line) for i, line in enumerate(lines, 1)]

    def queued(self, now: float, limit: int) -> list[Job]:
        with self._lock:
            found = [job for job in self._jobs.values() if job.state is State.QUEUED and job.not_before <= now]
        return sorted(found, key=lambda job: (-job.priority, job.id))[:limit]

    def expired(self, now: float) -> list[Job]:
        with self._lock:
            return [job for job in self._jobs.values() if job.state is State.QUEUED and job.expires_at < now]

    def active(self) -> list[Job]:
        with self._lock:
            return [job for job in self._jobs.values() if job.state in ACTIVE]

    def events(self, job: str, after: int = 0, limit: int = 500) -> list[Event]:
        return self._events[self.get(job).id][after : after + limit]

    def logs(self, job: str, after: int = 0, limit: int = 1000) -> list[LogLine]:
        return self._logs[self.get(job).id][after : after + limit]

    def counts(self) -> Mapping[State, int]:
        with self._lock:
            return Counter(job.state for job in self._jobs.values())

    def oldest_queued(self) -> float | None:
        with self._lock:
            return min((job.queued_at for job in self._jobs.values() if job.state is State.QUEUED), default=None)

    def hold(self, lease: str, holder: str, now: float, seconds: float) -> bool:
        with self._lock:
            owner, until = self._leases.get(lease, (holder, 0.0))
            if owner != holder and until > now:
                return False
            self._leases[lease] = (holder, now + seconds)
            return True

    def release(self, lease: str, holder: str) -> None:
        with self._lock:
            if self._leases.get(lease, ("", 0.0))[0] == holder:
                del self._leases[lease]

    def add_key(self, digest: str, project: str, at: float, name: str = "") -> None:
        with self._lock:
            self._keys[digest] = ClientKey(digest, project, at, name)

    def client_keys(self) -> list[ClientKey]:
        with self._lock:
            return sorted(self._keys.values(), key=lambda key: (key.created_at, key.digest))

    def remove_key(self, digest: str) -> bool:
        with self._lock:
            return self._keys.pop(digest, None) is not None

    def project_of(self, digest: str) -> str | None:
        key = self._keys.get(digest)
        return key.project if key else None

    def has_keys(self) -> bool:
        return bool(self._keys)

    def put_secret(self, project: str, name: str, ciphertext: str, at: float) -> bool:
        with self._lock:
            known = self._secrets.get((project, name))
            self._secrets[project, name] = Secret(name, ciphertext, known.created_at if known else at, at)
            return known is None

    def secret(self, project: str, name: str) -> Secret | None:
        return self._secrets.get((project, name))

    def secrets(self, project: str) -> list[Secret]:
        with self._lock:
            found = [secret for (owner, _), secret in self._secrets.items() if owner == project]
        return sorted(found, key=lambda secret: secret.name)

    def all_secrets(self) -> list[tuple[str, Secret]]:
        with self._lock:
            return [(project, secret) for (project, _), secret in sorted(self._secrets.items())]

    def replace_secret(self, project: str, name: str, before: str, after: str) -> bool:
        with self._lock:
            known = self._secrets.get((project, name))
            if known is None or known.ciphertext != before:
                return False
            self._secrets[project, name] = replace(known, ciphertext=after)
            return True

    def remove_secret(self, project: str, name: str) -> bool:
        with self._lock:
            return self._secrets.pop((project, name), None) is not None

    def check(self) -> None:
        return


def _matches(job: Job, query: Query) -> bool:
    return (
        job.project == query.project
        and (not query.states or job.state in query.states)
        and query.method in (None, job.method)
        and query.labels.items() <= job.labels.items()
        and (query.created_after is None or job.created_at > query.created_after)
        and (query.created_before is None or job.created_at < query.created_before)
        and (query.before is None or job.id < query.before)
    )

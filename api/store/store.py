"""What the service asks of a place for jobs. Knows questions and answers; knows no SQL and no HTTP.

Every change of a job goes through `change`: the pure transition of `api.machine`, with its entries, in one transaction.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from api.jobs import Event, Job, LogLine, State
from api.machine import Happening, transition


class NotFound(Exception):
    """There is no such job."""


class KeyReused(Exception):
    """The idempotency key was used before, for another request."""


class Unavailable(Exception):
    """The store cannot be reached now; the same call may work soon."""


@dataclass(frozen=True)
class Query:
    """Which jobs of a project, the newest first: those that match all that is given, older than the job `before`."""

    project: str
    states: Sequence[State] = ()
    method: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    created_after: float | None = None
    created_before: float | None = None
    before: str | None = None
    limit: int = 50


@dataclass(frozen=True)
class Request:
    """A client's own name for a request, and a digest of what it asked."""

    key: str
    digest: str


@dataclass(frozen=True)
class Secret:
    """A named secret of a project, as it is kept: encrypted. Times are seconds since 1970."""

    name: str
    ciphertext: str
    created_at: float
    updated_at: float


@dataclass(frozen=True)
class ClientKey:
    """A client's key as it is kept: its SHA-256 digest, whose first characters name it, and what a person calls it."""

    digest: str
    project: str
    created_at: float
    name: str = ""

    @property
    def id(self) -> str:
        return self.digest[:12]


class Store(ABC):
    """Jobs, their events and logs, leases of the service's own processes, the keys of its clients and their secrets.

    Every method may raise Unavailable.
    """

    @abstractmethod
    def add(self, job: Job, request: Request | None = None) -> tuple[Job, bool]:
        """Keep a new job; False with the first job where the same request was made before. Raises KeyReused."""

    @abstractmethod
    def find(self, project: str, request: Request) -> Job | None:
        """The job that this request made before. Raises KeyReused where the key came with another request."""

    @abstractmethod
    def get(self, job: str) -> Job:
        """Raises NotFound."""

    @abstractmethod
    def page(self, query: Query) -> list[Job]:
        """The jobs that match, newest first."""

    @abstractmethod
    def change(self, job: str, happening: Happening, lines: Sequence[str] = ()) -> Job:
        """Let something happen to a job, and keep the log lines that came with it once.

        Raises NotFound, Refused and Stale, with nothing changed.
        """

    @abstractmethod
    def log(self, job: str, attempt: int, lines: Sequence[str], at: float) -> None:
        """Keep log lines."""

    @abstractmethod
    def queued(self, now: float, limit: int) -> list[Job]:
        """The queued jobs that may start: the highest priority first, of equals the oldest."""

    @abstractmethod
    def expired(self, now: float) -> list[Job]:
        """The queued jobs whose time to start has passed."""

    @abstractmethod
    def active(self) -> list[Job]:
        """The jobs that are starting, running or being canceled."""

    @abstractmethod
    def events(self, job: str, after: int = 0, limit: int = 500) -> list[Event]:
        """What happened to a job after the event `after`, in order."""

    @abstractmethod
    def logs(self, job: str, after: int = 0, limit: int = 1000) -> list[LogLine]:
        """What its runners wrote after the line `after`, in order."""

    @abstractmethod
    def counts(self) -> Mapping[State, int]:
        """How many jobs are in each state."""

    @abstractmethod
    def oldest_queued(self) -> float | None:
        """Since when the job has waited that waits longest."""

    @abstractmethod
    def hold(self, lease: str, holder: str, now: float, seconds: float) -> bool:
        """Take or renew a lease; False where somebody else holds it."""

    @abstractmethod
    def release(self, lease: str, holder: str) -> None:
        """Give a lease back."""

    @abstractmethod
    def add_key(self, digest: str, project: str, at: float, name: str = "") -> None:
        """Admit the client whose key has this SHA-256 digest to a project."""

    @abstractmethod
    def client_keys(self) -> list[ClientKey]:
        """All clients' keys, the oldest first."""

    @abstractmethod
    def remove_key(self, digest: str) -> bool:
        """Admit that client no longer; False where there is no such key."""

    @abstractmethod
    def project_of(self, digest: str) -> str | None:
        """The project of a key, None for an unknown one."""

    @abstractmethod
    def has_keys(self) -> bool:
        """Whether any client is admitted."""

    @abstractmethod
    def put_secret(self, project: str, name: str, ciphertext: str, at: float) -> bool:
        """Keep a secret under its name; False where it takes the place of another."""

    @abstractmethod
    def secret(self, project: str, name: str) -> Secret | None:
        """The secret of that name, None where there is none."""

    @abstractmethod
    def secrets(self, project: str) -> list[Secret]:
        """The secrets of a project, by name."""

    @abstractmethod
    def all_secrets(self) -> list[tuple[str, Secret]]:
        """The secrets of all projects, each with its project."""

    @abstractmethod
    def replace_secret(self, project: str, name: str, before: str, after: str) -> bool:
        """Put another ciphertext of the same value in the place of `before`; False where that is not there any more."""

    @abstractmethod
    def remove_secret(self, project: str, name: str) -> bool:
        """Forget a secret; False where there is none of that name."""

    @abstractmethod
    def check(self) -> None:
        """See that the store answers and has the tables of this version. Raises Unavailable."""

    def close(self) -> None:
        """Let go of connections."""
        return


def apply(job: Job, happening: Happening) -> tuple[Job, list[Event]]:
    """A transition with its entries numbered on from the job's last event."""
    after, entries = transition(happening, job)
    number = len(after.attempts)
    events = [Event(job.id, job.events + i, happening.at, e.kind, number, e.data) for i, e in enumerate(entries, 1)]
    return replace(after, events=job.events + len(events)), events


def created(job: Job) -> tuple[Job, Event]:
    """A new job with its first event."""
    return replace(job, events=1), Event(job.id, 1, job.created_at, "queued", 0, {"reason": "submitted"})

"""What the API takes and gives, as pydantic models: the source of the OpenAPI document. Knows no store and no Ray."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Secret, StringConstraints

from api.jobs import Event, Job, Limits, Problem, State

_RECIPE = {
    "method": "lawa",
    "checkpoints": "runs/tiny/step-*",
    "k": 6,
    "output": {"path": "out/lawa-6"},
}
Label = Annotated[str, StringConstraints(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")]
LabelValue = Annotated[str, StringConstraints(max_length=255, pattern=r"^[^\x00]*$")]
SECRET_NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"
SecretName = Annotated[str, StringConstraints(pattern=SECRET_NAME)]
# One line of text: neither control characters nor the line ends that Unicode adds to them.
SecretValue = Annotated[
    str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$")
]

_ATTEMPT: dict[str, Any] = {
    "number": 1,
    "created_at": "2026-11-21T09:00:01Z",
    "started_at": "2026-11-21T09:00:03Z",
    "ended_at": "2026-11-21T09:00:09Z",
    "error": None,
}
_EVENT: dict[str, Any] = {
    "id": 5,
    "at": "2026-11-21T09:00:05Z",
    "kind": "shard",
    "attempt": 1,
    "data": {"file": "model.safetensors", "size": 4096000, "xxh3": "d41d8cd98f00b204", "adopted": False},
}
_JOB: dict[str, Any] = {
    "id": "01a1fbd7-9baf-7d0b-b3e9-c51c7b807d38",
    "state": "succeeded",
    "method": "lawa",
    "labels": {"team": "pretraining"},
    "priority": 0,
    "secrets": {"hub_token": "team-hub"},
    "created_at": "2026-11-21T09:00:00Z",
    "started_at": "2026-11-21T09:00:01Z",
    "ended_at": "2026-11-21T09:00:09Z",
    "waiting_for": "",
    "progress": {
        "phase": "done",
        "bytes_done": 4096000,
        "bytes_total": 4096000,
        "shards_done": 1,
        "shards": 1,
    },
    "output": "/data/out/lawa-6",
    "result": {
        "fingerprint": "8c1f...",
        "parameters": 2048000,
        "published": None,
        "files": [{"name": "model.safetensors", "size": 4096000, "xxh3": "d41d8cd98f00b204"}],
        "warnings": [],
    },
    "error": None,
    "attempts": [_ATTEMPT],
    "recipe": _RECIPE,
}


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)  # `false` is no priority


class LimitsIn(_Message):
    """How often a job is tried, and how long it may wait and run; the service's own limits without."""

    max_attempts: int | None = Field(default=None, ge=1, le=100)
    queue_seconds: float | None = Field(default=None, gt=0, le=366 * 86400)
    run_seconds: float | None = Field(default=None, gt=0, le=366 * 86400)


class Secrets(_Message):
    """The secrets that a job uses, by their names."""

    hub_token: SecretName | None = Field(
        default=None, description="The secret that is the token for the Hub.", examples=["team-hub"]
    )


class RecipeIn(_Message):
    """A recipe to look at."""

    recipe: str | dict[str, Any] = Field(
        description="The document, `output` included, as JSON or as a YAML text.", examples=[_RECIPE]
    )
    secrets: Secrets = Secrets()


class JobIn(RecipeIn):
    """A job to be queued."""

    labels: dict[Label, LabelValue] = Field(default={}, max_length=64, examples=[{"team": "pretraining"}])
    priority: int = Field(default=0, ge=-1000, le=1000, description="Higher ones start first.")
    limits: LimitsIn = LimitsIn()


class SecretIn(_Message):
    """The value of a secret; it is written only."""

    value: Secret[SecretValue] = Field(json_schema_extra={"writeOnly": True, "format": "password"})


class SecretOut(BaseModel):
    """A secret: its name and when it was stored, first and last."""

    name: str
    created_at: datetime
    updated_at: datetime


class SecretsOut(BaseModel):
    """The secrets of a project."""

    secrets: list[SecretOut]


class ProblemOut(BaseModel):
    """What went wrong in a job: `where` is the file, tensor or field, `remedy` what to do about it."""

    kind: str
    message: str
    where: str
    remedy: str


class ProgressOut(BaseModel):
    """How far the current attempt is, in bytes and files of the result."""

    phase: str
    bytes_done: int
    bytes_total: int
    shards_done: int
    shards: int


class AttemptOut(BaseModel):
    """One try to run a job."""

    number: int
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    error: ProblemOut | None


class JobOut(BaseModel):
    """A job."""

    model_config = ConfigDict(json_schema_extra={"examples": [_JOB]})

    id: str
    state: State
    method: str
    labels: dict[str, str]
    priority: int
    secrets: Secrets
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    waiting_for: str = Field(description="Why a queued job is not started; empty where it only waits for its turn.")
    progress: ProgressOut
    output: str = Field(description="The folder of the result, or where it is only pushed to.")
    result: dict[str, Any] | None = Field(
        description="Files with checksums, fingerprint, warnings, the address where it was pushed to; once succeeded."
    )
    error: ProblemOut | None
    attempts: list[AttemptOut]
    recipe: dict[str, Any]


class JobsOut(BaseModel):
    """A page of jobs, the newest first."""

    jobs: list[JobOut]
    next: str | None = Field(description="The cursor of the next page; null on the last.")


class PlanOut(BaseModel):
    """What a recipe would do."""

    fingerprint: str
    shards: int
    tensors: int
    parameters: int
    bytes_read: int
    bytes_written: int
    output: str
    needs: dict[str, float] = Field(description="What each shard's task asks of a machine.")
    notes: list[str]
    warnings: list[str]


class EventOut(BaseModel):
    """Something that happened to a job. Ids count from 1 without a gap."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EVENT]})

    id: int
    at: datetime
    kind: str
    attempt: int
    data: dict[str, Any]


class EventsOut(BaseModel):
    """Events in order."""

    events: list[EventOut]


class ArtifactOut(BaseModel):
    """A file of the result."""

    name: str
    size: int
    xxh3: str | None = Field(description="The checksum of a file of weights.")
    url: str


class ArtifactsOut(BaseModel):
    """The files of the result."""

    artifacts: list[ArtifactOut]


class MethodOut(BaseModel):
    """A method: what it is, where it comes from, an example, and the JSON schema of its fields."""

    name: str
    summary: str
    paper: str
    example: str
    fields: dict[str, Any]


class MethodsOut(BaseModel):
    """What there is."""

    methods: list[MethodOut]


class ReadyOut(BaseModel):
    """Whether this replica can serve, and what it depends on."""

    database: str
    ray: str


def time_of(seconds: float) -> datetime:
    """A time as people write it."""
    return datetime.fromtimestamp(seconds, UTC)


def _place_of(job: Job) -> str:
    """Where people find a result: one that is only pushed leaves no folder."""
    output = job.recipe.get("output", {})
    return job.output if output.get("path") or not output.get("push") else str(output["push"])


def job_out(job: Job) -> JobOut:
    """A job as clients see it."""
    progress = job.progress
    return JobOut(
        id=job.id,
        state=job.state,
        method=job.method,
        labels=dict(job.labels),
        priority=job.priority,
        secrets=Secrets(**job.secrets),
        created_at=time_of(job.created_at),
        started_at=_time_or_none(job.started_at),
        ended_at=_time_or_none(job.ended_at),
        waiting_for=job.waiting_for,
        progress=ProgressOut(
            phase=progress.phase,
            bytes_done=progress.done,
            bytes_total=progress.total,
            shards_done=progress.shards_done,
            shards=progress.shards,
        ),
        output=_place_of(job),
        result=dict(job.result) if job.result is not None else None,
        error=_problem_out(job.error),
        attempts=[
            AttemptOut(
                number=attempt.number,
                created_at=time_of(attempt.created_at),
                started_at=_time_or_none(attempt.claimed_at),
                ended_at=_time_or_none(attempt.ended_at),
                error=_problem_out(attempt.error),
            )
            for attempt in job.attempts
        ],
        recipe=dict(job.recipe),
    )


def event_out(event: Event) -> EventOut:
    """An event as clients see it."""
    return EventOut(id=event.id, at=time_of(event.at), kind=event.kind, attempt=event.attempt, data=dict(event.data))


def limits_of(asked: LimitsIn, own: Limits) -> Limits:
    """The limits of a job: what was asked, at most the service's own."""
    given: Mapping[str, Any] = asked.model_dump(exclude_none=True)
    return Limits(**{name: min(value, given.get(name, value)) for name, value in vars(own).items()})


def _time_or_none(seconds: float | None) -> datetime | None:
    return None if seconds is None else time_of(seconds)


def _problem_out(problem: Problem | None) -> ProblemOut | None:
    return None if problem is None else ProblemOut(**vars(problem))

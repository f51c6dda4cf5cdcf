"""Jobs: submit, list, look at, cancel, try again."""

import hashlib
import json
import time
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Header, Query, Response

from api import machine
from api.context import Context, InContext, Project
from api.jobs import Job, Limits, State, new_id
from api.messages import JobIn, JobOut, JobsOut, PlanOut, RecipeIn, job_out, limits_of
from api.problems import RecipeRefused, responses
from api.store import store
from api.validation import Validated, validate
from merger.errors import MergerError

router = APIRouter(prefix="/v1", tags=["jobs"], responses=responses(400, 401, 413, 422, 503))
_NAMING = responses(409)  # a secret, where the service keeps none

Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="The client's own name for this request: sent again, it gives the first answer.",
    ),
]


@router.post("/jobs", status_code=201, summary="Submit a job", responses=_NAMING)
def submit(body: JobIn, response: Response, context: InContext, project: Project, key: Key = None) -> JobOut:
    """Check a recipe down to headers, disk and memory, and queue it."""
    request = store.Request(key, _digest(body)) if key else None
    known = _replayed(context, project, request)
    job, new = (known, False) if known else context.store.add(_new_job(body, context, project), request)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    if not new:
        response.headers["Idempotent-Replayed"] = "true"
    return job_out(job)


def _digest(body: JobIn) -> str:
    return hashlib.sha256(json.dumps(body.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def _replayed(context: Context, project: str, request: store.Request | None) -> Job | None:
    """The job that this very request made before: the world may have changed since, the answer does not."""
    return context.store.find(project, request) if request else None


def _new_job(body: JobIn, context: Context, project: str) -> Job:
    validated = _validate(body, context, project)
    settings, now = context.settings, time.time()
    limits = limits_of(body.limits, Limits(settings.max_attempts, settings.queue_seconds, settings.run_seconds))
    return Job(
        id=new_id(now),
        recipe=validated.content,
        method=validated.document.recipe.method,
        output=str(validated.output),
        created_at=now,
        project=project,
        labels=body.labels,
        priority=body.priority,
        secrets=_named(body),
        needs=validated.needs,
        limits=limits,
        allowed=limits.max_attempts,
        queued_at=now,
    )


def _named(body: RecipeIn) -> dict[str, str]:
    """The names of the secrets that a job uses."""
    return body.secrets.model_dump(exclude_none=True)


def _validate(body: RecipeIn, context: Context, project: str) -> Validated:
    hub_token = context.hub_token(project, _named(body))
    try:
        return validate(body.recipe, context.settings, hub_token)
    except MergerError as error:
        raise RecipeRefused(error, body.recipe) from error


@router.post("/jobs:validate", summary="Plan without running", responses=_NAMING)
def plan(body: RecipeIn, context: InContext, project: Project) -> PlanOut:
    """What a recipe would read and write, or why it would be refused. No weight is read, nothing is written."""
    return PlanOut.model_validate(_validate(body, context, project).plan)


@router.get("/jobs", summary="List jobs")
def jobs(
    response: Response,
    context: InContext,
    project: Project,
    state: Annotated[list[State] | None, Query(description="One or several.")] = None,
    method: Annotated[str | None, Query(max_length=255, pattern=r"^[^\x00]*$")] = None,
    label: Annotated[
        list[Annotated[str, Query(pattern=r"^[^=\x00]+=[^\x00]*$", max_length=320)]] | None,
        Query(description="`name=value`; all of several must match.", max_length=16),
    ] = None,
    created_after: Annotated[float | None, Query(description="Seconds since 1970.", ge=0, le=1e11)] = None,
    created_before: Annotated[float | None, Query(description="Seconds since 1970.", ge=0, le=1e11)] = None,
    cursor: Annotated[UUID | None, Query(description="`next` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> JobsOut:
    """The jobs of the project, the newest first, a page at a time."""
    labels = dict(text.split("=", 1) for text in label or ())
    before = str(cursor) if cursor else None
    query = store.Query(project, state or (), method, labels, created_after, created_before, before, limit + 1)
    found = context.store.page(query)
    following = found[limit - 1].id if len(found) > limit else None
    if following:
        response.headers["Link"] = f'</v1/jobs?cursor={following}&limit={limit}>; rel="next"'
    return JobsOut(jobs=[job_out(job) for job in found[:limit]], next=following)


@router.get("/jobs/{job:uuid}", summary="One job", responses=responses(404))
def job(job: UUID, context: InContext, project: Project) -> JobOut:
    """A job, with its attempts."""
    return job_out(owned(context, project, job))


@router.post("/jobs/{job:uuid}:cancel", summary="Cancel a job", responses=responses(404, 409))
def cancel(job: UUID, context: InContext, project: Project) -> JobOut:
    """Stop a job and remove what it has staged. A result that is being published can no longer be stopped."""
    owned(context, project, job)
    return job_out(context.store.change(str(job), machine.CancelAsked(time.time())))


@router.post("/jobs/{job:uuid}:retry", summary="Try again", responses=responses(404, 409))
def retry(job: UUID, context: InContext, project: Project) -> JobOut:
    """Queue a job once more that failed, was canceled or timed out; it goes on after its finished shards."""
    owned(context, project, job)
    return job_out(context.store.change(str(job), machine.RetryAsked(time.time())))


def owned(context: Context, project: str, job: UUID) -> Job:
    """The job, where it belongs to the project of the one who asks. Raises NotFound."""
    found = context.store.get(str(job))
    if found.project != project:
        raise store.NotFound(str(job))
    return found

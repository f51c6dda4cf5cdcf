"""What runners say: claim, report, ask to publish, end. Each attempt speaks with a token of its own."""

import secrets
import time
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, HTTPException, Response
from pydantic import BaseModel, ConfigDict, Field

from api import machine
from api.context import Context, Credentials, InContext
from api.dispatcher import digest
from api.jobs import Entry, Job, Problem, State
from api.vault import NoKeys, NoSecret
from merger.secret import Token
from workers.reports import Order, Progress, Word

router = APIRouter(prefix="/v1/internal/jobs/{job:uuid}/attempts/{number:int}", include_in_schema=False)


class _Body(BaseModel):
    """What a runner of this version says; one of a later version, while both are there, may say more."""

    model_config = ConfigDict(extra="ignore")


class _Claim(_Body):
    claim: str = Field(max_length=128, pattern=r"^[\x21-\x7e]+$")
    nonce: str = Field(max_length=64)


class _Event(_Body):
    kind: Literal["planned", "shard", "chosen"]
    data: dict[str, Any]


class _Report(_Body):
    report: int = Field(gt=0)
    progress: Progress
    events: list[_Event]
    lines: list[Annotated[str, Field(max_length=10_000)]]


class _Result(_Body):
    result: dict[str, Any]


class _Failure(_Body):
    error: Problem
    again: bool
    counts: bool = True


class _Nothing(_Body):
    pass


@router.post("/claim")
def claim(job: UUID, number: int, body: _Claim, context: InContext, response: Response) -> dict[str, Any]:
    """Give the attempt to the runner that shows its code, once; the runner speaks with the token from now on.

    Secrets are decrypted now, so that another value acts on the next attempt, and only after the code was right.
    """
    settings, now, token = context.settings, time.time(), secrets.token_urlsafe(32)
    lease = now + settings.lease_seconds
    happening = machine.Claimed(now, number, body.claim, body.nonce, digest(token), lease)
    found = context.store.change(str(job), happening)
    order = Order(
        recipe=found.recipe,
        output=found.output,
        working_folder=str(settings.working_folder.absolute()),
        source_roots=tuple(map(str, settings.readable_roots)),
        object_roots=settings.object_roots,
        task_cpus=settings.task_cpus,
        task_memory=settings.task_memory,
        task_device=settings.task_device,
        heartbeat_seconds=settings.heartbeat_seconds,
        hub_token=_hub_token(context, found),
        shared_folders=settings.shared_folders,
    )
    response.headers["Cache-Control"] = "no-store"
    return {"token": token, "order": order.content()}


@router.post("/report")
def report(job: UUID, number: int, body: _Report, context: InContext, credentials: Credentials) -> dict[str, str]:
    """Take a report and lengthen the lease; the answer says whether to go on."""
    before, now = _speaking(context, job, number, credentials), time.time()
    entries = [Entry(event.kind, event.data) for event in body.events]
    lease = now + context.settings.lease_seconds
    happening = machine.Reported(now, number, body.report, body.progress, entries, lease)
    after = context.store.change(str(job), happening, body.lines)
    context.metrics.reported(before, after)
    return {"word": (Word.CANCEL if after.state is State.CANCELING else Word.GO_ON).value}


@router.post("/grant")
def grant(job: UUID, number: int, _body: _Nothing, context: InContext, credentials: Credentials) -> dict[str, str]:
    """Let the holder of the lease publish, unless the job is being canceled."""
    if _speaking(context, job, number, credentials).state is State.CANCELING:
        return {"word": Word.CANCEL.value}
    context.store.change(str(job), machine.Granted(time.time(), number))
    return {"word": Word.GO_ON.value}


@router.post("/succeeded")
def succeeded(job: UUID, number: int, body: _Result, context: InContext, credentials: Credentials) -> dict[str, str]:
    """The result is published."""
    return _end(context, job, number, credentials, machine.Succeeded(time.time(), number, body.result))


@router.post("/failed")
def failed(job: UUID, number: int, body: _Failure, context: InContext, credentials: Credentials) -> dict[str, str]:
    """The attempt ended with an error; for a job that is being canceled that is all one."""
    before, now = _speaking(context, job, number, credentials), time.time()
    if before.state is State.CANCELING:
        return {}  # the dispatcher sweeps
    return _end(context, job, number, credentials, machine.Failed(now, number, body.error, body.again, body.counts))


@router.post("/canceled")
def canceled(job: UUID, number: int, _body: _Nothing, context: InContext, credentials: Credentials) -> dict[str, str]:
    """The runner has stopped and has cleared away what it had staged."""
    return _end(context, job, number, credentials, machine.Cleared(time.time()))


def _hub_token(context: Context, job: Job) -> Token | None:
    """The token for the Hub that a claimed job names; without it the job fails for good."""
    try:
        return context.hub_token(job.project, job.secrets)
    except (NoKeys, NoSecret) as error:
        problem = Problem(type(error).__name__, str(error), "secrets.hub_token", error.remedy)
        happening = machine.Failed(time.time(), job.attempt.number, problem, again=False)
        context.metrics.ended(context.store.change(job.id, happening))
        raise HTTPException(409, str(error)) from error


def _speaking(context: Context, job: UUID, number: int, credentials: Credentials) -> Job:
    """The job, where the token is that of the attempt. Raises 401."""
    found = context.store.get(str(job))
    known = [attempt.token for attempt in found.attempts if attempt.number == number]
    token = digest(credentials.credentials) if credentials else ""
    if not known or not known[0] or not secrets.compare_digest(known[0], token):
        raise HTTPException(401, "not the token of this attempt", {"WWW-Authenticate": "Bearer"})
    return found


def _end(
    context: Context, job: UUID, number: int, credentials: Credentials, happening: machine.Happening
) -> dict[str, str]:
    """Let the attempt end; said again because the answer was lost, it is taken once."""
    before = _speaking(context, job, number, credentials)
    try:
        context.metrics.ended(context.store.change(str(job), happening))
    except machine.Refused:
        if before.attempt.number != number or before.attempt.ended_at is None:
            raise
    return {}

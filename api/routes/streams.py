"""What goes on in a job: its events and its log, at once or as they come, and the files that it has made."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Header, HTTPException, Query
from fastapi.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from api.context import Context, InContext, Project
from api.jobs import ENDED, Job, State
from api.messages import ArtifactOut, ArtifactsOut, EventsOut, event_out
from api.problems import responses
from api.routes.jobs import owned
from api.store.store import Unavailable

router = APIRouter(prefix="/v1/jobs/{job:uuid}", tags=["jobs"], responses=responses(401, 404, 422, 503))

_PAUSE = 0.5  # seconds between two looks at the store
_SILENCE = 15.0  # seconds after which a stream says that it is alive
After = Annotated[int, Query(ge=0, le=2**31 - 1, description="Only what follows this id.")]


@router.get(
    "/events",
    summary="Events",
    response_model=EventsOut,
    responses={
        200: {
            "description": "A page as JSON; for `Accept: text/event-stream` all of them, as they come, until the job "
            "has ended. Events without an id tell the progress.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    },
)
def events(
    job: UUID,
    context: InContext,
    project: Project,
    after: After = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 500,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
    last_event_id: Annotated[
        int, Header(alias="Last-Event-ID", ge=0, le=2**31 - 1, description="Go on after this one.")
    ] = 0,
) -> Response:
    """What has happened to a job. Ids count from 1 without a gap, so a stream can be taken up where it broke off."""
    owned(context, project, job)
    if "text/event-stream" in accept:
        start = last_event_id or after
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_event_stream(context, str(job), start), 200, headers, "text/event-stream")
    found = context.store.events(str(job), after, limit)
    return Response(
        EventsOut(events=[event_out(event) for event in found]).model_dump_json(), 200, None, "application/json"
    )


async def _event_stream(context: Context, job: str, after: int) -> AsyncIterator[bytes]:
    silent, progress = 0.0, None
    while not context.stopping.is_set():
        try:
            state = await run_in_threadpool(context.store.get, job)
            found = await run_in_threadpool(context.store.events, job, after)
        except Unavailable:
            state, found = None, []
        for event in found:
            after = event.id
            yield format_sse_event(data_str=event_out(event).model_dump_json(), event=event.kind, id=str(event.id))
        if state and state.progress != progress and state.state not in ENDED:
            progress = state.progress
            yield format_sse_event(data_str=json.dumps(vars(progress)), event="progress")
            silent = 0.0
        if state and state.state in ENDED and not found:
            return
        silent = 0.0 if found else silent + _PAUSE
        if silent >= _SILENCE:
            yield format_sse_event(comment="still here")
            silent = 0.0
        if not found:
            await asyncio.sleep(_PAUSE)


@router.get("/logs", summary="Log", response_class=PlainTextResponse)
def logs(
    job: UUID,
    context: InContext,
    project: Project,
    after: After = 0,
    follow: Annotated[bool, Query(description="Go on until the job has ended.")] = False,
) -> Response:
    """What the runners of a job wrote, as text."""
    owned(context, project, job)
    return StreamingResponse(
        _log_stream(context, str(job), after, follow=follow), media_type="text/plain; charset=utf-8"
    )


async def _log_stream(context: Context, job: str, after: int, *, follow: bool) -> AsyncIterator[str]:
    while not context.stopping.is_set():
        try:
            state = await run_in_threadpool(context.store.get, job)
            found = await run_in_threadpool(context.store.logs, job, after)
        except Unavailable:
            await asyncio.sleep(_PAUSE)
            continue
        for line in found:
            after = line.id
            yield f"{line.text}\n"
        if not found:
            if not follow or state.state in ENDED:
                return
            await asyncio.sleep(_PAUSE)


@router.get("/artifacts", summary="Files of the result", responses=responses(409))
def artifacts(job: UUID, context: InContext, project: Project) -> ArtifactsOut:
    """The files that a job has made, with the checksums of the weights."""
    found = owned(context, project, job)
    checksums = {file["name"]: file["xxh3"] for file in (found.result or {}).get("files", ())}
    return ArtifactsOut(
        artifacts=[
            ArtifactOut(
                name=path.name,
                size=path.stat().st_size,
                xxh3=checksums.get(path.name),
                url=f"/v1/jobs/{job}/artifacts/{path.name}",
            )
            for path in _files(found)
        ]
    )


@router.get(
    "/artifacts/{name}",
    summary="Download a file",
    response_class=FileResponse,
    responses={
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
        **responses(409),
    },
)
def artifact(job: UUID, name: str, context: InContext, project: Project) -> FileResponse:
    """One file of the result; ranges are answered."""
    for path in _files(owned(context, project, job)):
        if path.name == name:
            return FileResponse(path, media_type="application/octet-stream", filename=name)
    raise HTTPException(404, f"the result has no file {name}")


def _files(job: Job) -> list[Path]:
    if job.state is not State.SUCCEEDED:
        raise HTTPException(409, f"the job is {job.state}; files are there once it has succeeded")
    folder = Path(job.output)
    if not folder.is_dir():
        address = (job.result or {}).get("published")
        reason = "is not there any more, or on storage that this API does not see"
        raise HTTPException(404, f"the result is at {address}" if address else f"{folder} {reason}")
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())

"""`python -m api.dispatching`: the dispatcher alone, with a small HTTP port for those who watch it.

Knows probes and metrics; what is dispatched, `api.dispatcher` knows.
"""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import click
from fastapi import FastAPI, HTTPException
from fastapi.responses import PlainTextResponse, Response

from api.dispatcher import Dispatcher
from api.metrics import Metrics
from api.process import begin, refusals
from api.ray_jobs import connect
from api.server import Server, listening
from api.store.sql import SqlStore
from api.store.store import Store, Unavailable

# Longer than the slowest step: Ray and the database have seconds to answer each of a few questions.
_STUCK = 120.0


def create_watched(dispatcher: Dispatcher, store: Store, stuck: float = _STUCK) -> FastAPI:
    """The dispatcher's own application, which runs it: is it alive, is it ready, what does it count."""
    metrics = Metrics(store)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        with dispatcher.running():
            yield

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    @app.get("/livez", response_class=PlainTextResponse)
    async def livez() -> str:
        if dispatcher.idle_seconds > stuck:
            raise HTTPException(503, f"nothing was done for {dispatcher.idle_seconds:.0f} s")
        return "ok"

    @app.get("/readyz")
    def readyz() -> dict[str, object]:
        try:
            store.check()
        except Unavailable as error:
            raise HTTPException(503, str(error)) from error
        return {"database": "ok", "leads": dispatcher.leads}

    @app.get("/metrics", response_class=PlainTextResponse)
    def text() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


@click.command()
@click.option("--host", default="0.0.0.0", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8081, show_default=True, help="0 for any free one.")
def main(host: str, port: int) -> None:
    """Start, watch and end the jobs of the database. Of several such processes one works, the others stand by."""
    settings = begin()
    store = SqlStore(settings.database_url)
    with refusals(), listening(host, port) as listener, connect(settings) as ray:
        app = create_watched(Dispatcher(store, ray, settings), store)
        Server(app, settings.grace_seconds, threading.Event()).run(sockets=[listener])


if __name__ == "__main__":
    main()

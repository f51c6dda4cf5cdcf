"""The application: wiring only. Knows which routes, handlers and background threads make up an API process."""

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext

from anyio import to_thread
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import merger
from api import problems
from api.context import Context
from api.dispatcher import Dispatcher
from api.metrics import Metrics
from api.ray_jobs import RayJobs
from api.routes import attempts, jobs, secrets, streams, system
from api.settings import Settings
from api.store.store import Store
from api.vault import Vault

# Nothing waits for a network then, and more threads only take turns: with 40 of them 500 requests from 20 clients had a
# 95th percentile of 103 ms, with 3 one of 89 ms.
_THREADS_WITH_SQLITE = 3
_LOG = logging.getLogger(__name__)


def create_app(settings: Settings, store: Store, ray: RayJobs, *, dispatching: bool = True) -> FastAPI:
    """The API over a store and a Ray cluster; with a dispatcher of its own unless told otherwise."""
    context = Context(settings, store, ray, Metrics(store), Vault(store, settings.secret_keys))

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if settings.database_url.startswith("sqlite"):
            to_thread.current_default_thread_limiter().total_tokens = _THREADS_WITH_SQLITE
        with Dispatcher(store, ray, settings).running() if dispatching else nullcontext():
            yield

    app = FastAPI(
        title="merger",
        version=merger.__version__,
        summary="Jobs that make new model checkpoints out of old ones.",
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        lifespan=lifespan,
        responses=problems.responses(500),
        redirect_slashes=False,
    )
    app.state.context = context
    problems.install(app)
    for routes in (jobs, streams, secrets, attempts, system):
        app.include_router(routes.router)
    app.add_middleware(_Bounded, limit=settings.max_body)
    app.add_middleware(_Timed, metrics=context.metrics)
    return app


class _Bounded:
    """Refuses bodies of more than `limit` bytes, whatever their headers say."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._limit:
                raise HTTPException(413, f"a request may have {self._limit:,} bytes")
            return message

        await self._app(scope, bounded, send)


class _Timed:
    """Measures requests by route, and tells of them."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()

        async def timed(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                labels = (scope["method"], route, str(message["status"]))
                seconds = time.perf_counter() - began
                self._metrics.requests.labels(*labels).observe(seconds)
                _tell(scope, labels, seconds)
            await send(message)

        await self._app(scope, receive, timed)


def _tell(scope: Scope, labels: tuple[str, str, str], seconds: float) -> None:
    """What clients ask is worth a line; what runners, probes and Prometheus ask all the time is not."""
    method, route, status = labels
    often = not route.startswith("/v1/") or route.startswith("/v1/internal/")
    known = {name: str(value) for name, value in scope.get("path_params", {}).items() if name == "job"}
    said = {"method": method, "route": route, "status": int(status), "seconds": round(seconds, 4), **known}
    _LOG.log(logging.DEBUG if often else logging.INFO, "request", extra=said)

"""The service itself: its methods, whether it is alive and ready, its metrics."""

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from api.context import InContext, Project
from api.messages import MethodOut, MethodsOut, ReadyOut
from api.problems import responses
from api.ray_jobs import RayUnreachable
from merger.methods import METHODS

router = APIRouter(tags=["service"])


@router.get("/v1/methods", summary="Methods", responses=responses(401, 503))
def methods(_project: Project) -> MethodsOut:
    """Every method with the JSON schema of its fields."""
    return MethodsOut(
        methods=[
            MethodOut(
                name=name,
                summary=(method.__doc__ or "").strip().splitlines()[0],
                paper=method.paper,
                example=method.example,
                fields=method.model_json_schema(by_alias=True),
            )
            for name, method in METHODS.items()
        ]
    )


@router.get("/livez", summary="Alive", response_class=PlainTextResponse)
async def livez() -> str:
    """The process answers; it asks nobody else."""
    return "ok"


@router.get("/readyz", summary="Ready", responses=responses(503))
def readyz(context: InContext) -> ReadyOut:
    """The database answers and has the right tables. Without Ray the API still serves, and jobs wait."""
    context.store.check()
    try:
        context.ray.nodes()
        ray = "ok"
    except RayUnreachable:
        ray = "unreachable"
    return ReadyOut(database="ok", ray=ray)


@router.get("/metrics", summary="Metrics", response_class=PlainTextResponse)
def metrics(context: InContext) -> Response:
    """Counters in the text format of Prometheus."""
    return Response(context.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

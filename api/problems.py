"""Every error of the API as a problem of RFC 9457. Knows one table from exceptions to statuses."""

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from api.machine import Refused
from api.store.store import KeyReused, NotFound, Unavailable
from api.vault import NoKeys, NoSecret
from merger.errors import OUTSIDE, MergerError

MEDIA_TYPE = "application/problem+json"
_LOG = logging.getLogger(__name__)

# The schema of every problem, for the OpenAPI document.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "description": "What kind of problem it is, as a stable relative URI."},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "What happened, where, and what to do."},
        "remedy": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["pointer", "detail"],
                "properties": {
                    "pointer": {"type": "string", "description": "A JSON pointer into the request's body."},
                    "detail": {"type": "string"},
                },
            },
        },
    },
    "examples": [
        {
            "type": "/problems/recipe-error",
            "title": "The recipe is not well formed.",
            "status": 422,
            "detail": "k: input should be greater than 0",
            "remedy": "`merger methods NAME` lists the fields of a method with an example.",
            "errors": [{"pointer": "/recipe/k", "detail": "input should be greater than 0"}],
        }
    ],
}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problems that an operation may answer with, for the OpenAPI document."""
    titles = {
        400: "The request cannot be read",
        401: "The key is missing or unknown",
        404: "There is no such thing",
        409: "The state of the job, or of the service, does not allow it",
        413: "The request is too large",
        422: "The request was understood and is wrong",
        500: "The service failed",
        503: "The service cannot answer now",
    }
    return {status: {"description": titles[status], "content": {MEDIA_TYPE: {"schema": SCHEMA}}} for status in statuses}


class RecipeRefused(Exception):
    """A recipe that cannot run: the error, and the recipe as it was sent."""

    def __init__(self, error: MergerError, recipe: object) -> None:
        super().__init__(str(error))
        self.error, self.recipe = error, recipe


def problem(
    status: int, kind: str, title: str, detail: str, *, headers: Mapping[str, str] | None = None, **more: Any
) -> JSONResponse:
    """A problem as a response."""
    content = {"type": f"/problems/{kind}", "title": title, "status": status, "detail": detail}
    content |= {name: value for name, value in more.items() if value}
    return JSONResponse(content, status, headers, media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Make the application answer with problems, whatever goes wrong."""
    app.add_exception_handler(RecipeRefused, _refused_recipe)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Refused, _conflict)
    app.add_exception_handler(NotFound, _not_found)
    app.add_exception_handler(KeyReused, _key_reused)
    app.add_exception_handler(NoKeys, _no_keys)
    app.add_exception_handler(NoSecret, _no_secret)
    app.add_exception_handler(Unavailable, _unavailable)
    app.add_exception_handler(Exception, _failed)


def _refused_recipe(_request: Request, refused: Exception) -> JSONResponse:
    assert isinstance(refused, RecipeRefused)
    error = refused.error
    status = next(OUTSIDE[kind][1] for kind in type(error).__mro__ if kind in OUTSIDE)
    where = f"{error.where}: " if error.where else ""
    errors = [{"pointer": _pointer(error.where, refused.recipe), "detail": error.message}]
    title = (type(error).__doc__ or "").split("`where`")[0].strip().splitlines()[0]
    return problem(
        status, _kebab(type(error).__name__), title, f"{where}{error.message}", remedy=error.remedy, errors=errors
    )


def _kebab(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower()


def _pointer(where: str, recipe: object) -> str:
    """The JSON pointer of a field's path such as `source.checkpoints[0]`, or of the value that a path of a file came
    from; of the recipe as a whole where it is about neither.
    """
    if isinstance(recipe, Mapping):
        named = next((path for path, value in _leaves(recipe, "/recipe") if value == where), None)
        if named:  # a path such as rows.jsonl looks like a field's
            return named
        keys = re.findall(r"[^.\[\]]+", where)
        if keys and (keys[0] in recipe or re.fullmatch(r"[\w.\[\]-]+", where)):
            return "/recipe/" + "/".join(map(_escape, keys))
        for path, value in _leaves(recipe, "/recipe"):
            if len(value) > 1 and value in where:
                return path
    return "/recipe"


def _escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _leaves(content: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _leaves(value, f"{path}/{_escape(str(key))}")
    elif isinstance(content, list):
        for i, value in enumerate(content):
            yield from _leaves(value, f"{path}/{i}")
    elif isinstance(content, str):
        yield path, content


def _invalid(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    errors = [
        {"pointer": "".join(f"/{_escape(str(key))}" for key in one["loc"][1:]), "detail": one["msg"]}
        for one in error.errors()
    ]
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return problem(422, "invalid-request", "The request is not well formed.", f"{place}: {first['msg']}", errors=errors)


def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_allowed(request))
    kinds = {
        400: "unreadable",
        401: "unauthorized",
        404: "not-found",
        405: "method-not-allowed",
        409: "conflict",
        413: "too-large",
    }
    kind = kinds.get(error.status_code, "http")
    return problem(error.status_code, kind, kind.replace("-", " ").capitalize(), error.detail, headers=headers)


def _allowed(request: Request) -> list[str]:
    """The methods of all routes at this path: the framework tells those of the first one only."""
    partial = [route for route in request.app.routes if route.matches(request.scope)[0] is Match.PARTIAL]
    return sorted({method for route in partial for method in getattr(route, "methods", None) or ()})


def _conflict(_request: Request, error: Exception) -> JSONResponse:
    return problem(409, "conflict", "The job's state does not allow it.", str(error))


def _not_found(_request: Request, error: Exception) -> JSONResponse:
    return problem(404, "not-found", "There is no such job.", f"there is no job {error}")


def _key_reused(_request: Request, error: Exception) -> JSONResponse:
    detail = f"the Idempotency-Key {error} was used before, for another request"
    return problem(422, "key-reused", "The Idempotency-Key was used before.", detail, remedy="Send another key.")


def _no_keys(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, NoKeys)
    return problem(409, "no-secret-keys", "This service keeps no secrets.", str(error), remedy=error.remedy)


def _no_secret(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, NoSecret)
    detail = str(error)
    errors = [{"pointer": "/secrets/hub_token", "detail": detail}]
    return problem(422, "no-secret", "A secret cannot be used.", detail, remedy=error.remedy, errors=errors)


def _unavailable(_request: Request, error: Exception) -> JSONResponse:
    detail = f"the database does not answer: {error}"
    headers = {"Retry-After": "2"}
    return problem(503, "unavailable", "The service cannot answer now.", detail, headers=headers, remedy="Try again.")


def _failed(_request: Request, error: Exception) -> JSONResponse:
    _LOG.error("a request failed", exc_info=error)
    return problem(500, "failed", "The service failed.", "an error of the service itself; its log says more")

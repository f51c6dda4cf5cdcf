"""Named secrets: store, list, remove. A value goes in and never comes out."""

import time
from typing import Annotated

from fastapi import APIRouter, HTTPException, Path, Response

from api.context import InContext, Project
from api.messages import SECRET_NAME, SecretIn, SecretOut, SecretsOut, time_of
from api.problems import responses
from merger.secret import Token

router = APIRouter(prefix="/v1/secrets", tags=["secrets"], responses=responses(401, 409, 503))

Name = Annotated[str, Path(pattern=SECRET_NAME, description="Lower-case letters, digits and dashes; at most 63.")]


@router.put(
    "/{name}",
    status_code=204,
    summary="Store a secret",
    response_class=Response,
    responses={201: {"description": "A new secret"}, 204: {"description": "Another value"}, **responses(400, 413, 422)},
)
def put(name: Name, body: SecretIn, context: InContext, project: Project) -> Response:
    """Keep a value under a name, in the place of an earlier one. It is encrypted, and no answer ever holds it."""
    new = context.vault.put(project, name, Token(body.value.get_secret_value()), time.time())
    return Response(status_code=201 if new else 204)


@router.get("", summary="List secrets")
def secrets(context: InContext, project: Project) -> SecretsOut:
    """The names of the project's secrets, never their values."""
    return SecretsOut(
        secrets=[
            SecretOut(name=one.name, created_at=time_of(one.created_at), updated_at=time_of(one.updated_at))
            for one in context.vault.secrets(project)
        ]
    )


@router.delete(
    "/{name}",
    status_code=204,
    summary="Remove a secret",
    response_class=Response,
    responses={204: {"description": "It is gone"}, **responses(404, 422)},
)
def remove(name: Name, context: InContext, project: Project) -> None:
    """Forget a secret. Jobs that name it and have not started yet will fail, and say so."""
    if not context.vault.remove(project, name):
        raise HTTPException(404, f"there is no secret {name}")

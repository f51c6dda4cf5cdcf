"""What routes share: the store, Ray, the settings, the metrics, and who is asking."""

import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.dispatcher import digest
from api.metrics import Metrics
from api.ray_jobs import RayJobs
from api.settings import Settings
from api.store.store import Store
from api.vault import Vault
from merger.secret import Token


@dataclass(frozen=True)
class Context:
    """One running API. `stopping` is set when it is about to end: streams that would go on then end themselves."""

    settings: Settings
    store: Store
    ray: RayJobs
    metrics: Metrics
    vault: Vault
    stopping: threading.Event = field(default_factory=threading.Event)

    def hub_token(self, project: str, secrets: Mapping[str, str]) -> Token | None:
        """The token for the Hub of a job that uses these secrets. Raises NoKeys, and NoSecret with the name."""
        name = secrets.get("hub_token")
        return self.vault.reveal(project, name) if name else None


def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


InContext = Annotated[Context, Depends(_context)]

bearer = HTTPBearer(auto_error=False, description="An API key: `Authorization: Bearer mk_...`")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]


def _project(context: InContext, credentials: Credentials) -> str:
    """The project of the key that came with a request."""
    key = credentials.credentials if credentials else ""
    fixed = context.settings.api_key
    if fixed and secrets.compare_digest(key.encode(), fixed.get_secret_value().encode()):
        return "default"
    project = context.store.project_of(digest(key)) if key else None
    if project is None:
        message = "unknown key" if key else "no key: send `Authorization: Bearer KEY`"
        raise HTTPException(401, message, {"WWW-Authenticate": "Bearer"})
    return project


Project = Annotated[str, Depends(_project)]


def new_key() -> str:
    """A key for a client: 256 random bits."""
    return f"mk_{secrets.token_hex(4)}_{secrets.token_urlsafe(32)}"

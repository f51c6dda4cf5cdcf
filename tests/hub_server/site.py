"""What all routes share: the store, the blobs, tokens and rights, origins and signed addresses.

Knows who may do what and how an address of the CDN is signed. Knows nothing of single endpoints.
"""

import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, urlencode

from tests.hub_server.blobs import Blobs
from tests.hub_server.errors import HubError, no_repo
from tests.hub_server.store import Repo, Store
from tests.hub_server.wire import Answer, Request
from tests.hub_server.xet import Xet

REPO = r"(?P<repo>[^/]+/[^/]+?)"
# A revision is quoted as a whole by the client; `refs/pr/1` is also understood as it is.
REVISION = r"(?P<revision>refs/(?:pr|heads|convert)/[^/]+|[^/]+)"


@dataclass(frozen=True)
class Account:
    """A user by one of their tokens."""

    user: str
    orgs: tuple[str, ...] = ()
    role: str = "write"

    def may_write(self, namespace: str) -> bool:
        return self.role == "write" and namespace in (self.user, *self.orgs)


@dataclass(frozen=True)
class XetToken:
    """What a short token for the content-addressed store allows."""

    repo: str
    write: bool
    expires: float


class Site:
    def __init__(self, blobs: Blobs, xet: Xet | None) -> None:
        self.blobs, self.store = blobs, Store()
        self.xet = xet  # None: contents go by LFS only
        self.api = self.cdn = self.cas = ""  # the origins, once they have ports
        self.tokens: dict[str, Account] = {}
        self.lifetime = 3600.0  # seconds that a signed address is good for
        self.part_size = 64 << 20  # larger uploads come in parts of this size
        self.page_size = 1000
        self.xet_hashes: dict[str, str] = {}  # of sha256
        self.xet_tokens: dict[str, XetToken] = {}
        self.xet_lifetime = 3600.0  # seconds that a token for the content-addressed store is good for
        self._secret = secrets.token_bytes(16)

    def account(self, request: Request) -> Account | None:
        """Who asks. None: nobody in particular.

        Raises:
            HubError: a token that the server does not know.
        """
        if request.token is None:
            return None
        if request.token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.tokens[request.token]

    def reader(self, request: Request, name: str, contents: bool = False) -> Repo:
        """A repository for one who may see it, and if `contents` also its files."""
        account, repo = self.account(request), self.store.find(unquote(name))
        known = account is not None and (
            account.user in repo.readers or repo.namespace in (account.user, *account.orgs)
        )
        if repo.private and not known:
            raise no_repo()
        if contents and repo.gated and not known:
            message = f"Access to model {repo.name} is restricted and you are not in the authorized list."
            raise HubError(403 if account else 401, message, "GatedRepo")
        return repo

    def writer(self, request: Request, name: str) -> tuple[Repo, str]:
        """A repository and the user that may write to it."""
        repo = self.reader(request, name)
        return repo, self.author(request, repo.namespace)

    def contributor(self, request: Request, name: str, *, pull: bool) -> tuple[Repo, str]:
        """A repository and the user that may write to it, or (`pull`) open a pull request to it: whoever may read."""
        if not pull:
            return self.writer(request, name)
        repo, account = self.reader(request, name), self.account(request)
        if account is None or account.role != "write":
            raise HubError(401 if account is None else 403, "This token may not open pull requests.")
        return repo, account.user

    def author(self, request: Request, namespace: str) -> str:
        account = self.account(request)
        if account is None:
            raise HubError(401, "Invalid username or password.")
        if not account.may_write(namespace):
            raise HubError(403, f"You don't have the rights to write to the namespace {namespace}")
        return account.user

    def signed(self, path: str, lifetime: float | None = None, **query: str) -> str:
        """An address of the CDN that is good for some time."""
        expires = f"{time.time() + (self.lifetime if lifetime is None else lifetime):.3f}"
        told = {**query, "expires": expires, "sig": self._signature(path, expires)}
        return f"{self.cdn}{path}?{urlencode(told)}"

    def check_signature(self, request: Request) -> None:
        expires = request.query.get("expires", "")
        if request.query.get("sig") != self._signature(request.path, expires):
            raise HubError(403, "the signature is wrong or no longer good")
        if float(expires) < time.time():
            raise HubError(403, "the address has expired")

    def expire_all(self) -> None:
        self._secret = secrets.token_bytes(16)

    def _signature(self, path: str, expires: str) -> str:
        return hmac.new(self._secret, f"{path} {expires}".encode(), hashlib.sha256).hexdigest()


Route = Callable[..., Answer]


class Routes:
    """Endpoints by method and path. The first pattern that fits the whole (still quoted) path is taken."""

    def __init__(self, *others: "Routes") -> None:
        self._routes: list[tuple[str, re.Pattern[str], Route]] = [one for other in others for one in other._routes]

    def __call__(self, method: str, pattern: str) -> Callable[[Route], Route]:
        def register(route: Route) -> Route:
            self._routes.append((method, re.compile(pattern), route))
            return route

        return register

    def answer(self, site: Site, request: Request) -> Answer:
        method = "GET" if request.method == "HEAD" else request.method
        for known, pattern, route in self._routes:
            if known == method and (match := pattern.fullmatch(request.path)):
                parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return route(site, request, **parts)
        raise HubError(404, f"Sorry, we can't find the page you are looking for: {request.path}")


def answer_json(content: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(
        status, {"Content-Type": "application/json; charset=utf-8", **headers}, (json.dumps(content).encode(),)
    )


def body_json(request: Request) -> Any:
    try:
        return json.loads(request.read() or b"{}")
    except ValueError as error:
        raise HubError(400, f"the body is not JSON: {error}") from None


def quoted(path: str) -> str:
    return quote(path, safe="/")

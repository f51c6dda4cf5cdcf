"""Endpoints about users and whole repositories: who am I, create, delete, move, settings, what is in a model."""

import contextlib
from typing import Any

import yaml

from tests.hub_server.errors import HubError
from tests.hub_server.git import Commit, File, pointer
from tests.hub_server.site import REPO, REVISION, Routes, Site, answer_json, body_json
from tests.hub_server.store import Repo
from tests.hub_server.wire import Answer, Request

routes = Routes()
MODEL = f"/api/models/{REPO}"


@routes("GET", "/api/whoami-v2")
def who_am_i(site: Site, request: Request) -> Answer:
    account = site.account(request)
    if account is None:
        raise HubError(401, "Invalid username or password.")
    token = {"displayName": "test", "role": account.role, "createdAt": "2026-01-01T00:00:00.000Z"}
    orgs = [{"type": "org", "name": org, "fullname": org, "roleInOrg": "write"} for org in account.orgs]
    known = {"type": "user", "id": account.user, "name": account.user, "fullname": account.user, "orgs": orgs}
    return answer_json({**known, "auth": {"type": "access_token", "accessToken": token}})


def _named(site: Site, request: Request) -> tuple[str, str, dict[str, Any]]:
    """The full name, the acting user and the body of a request that names a repository in its body."""
    body = body_json(request)
    if body.get("type") not in (None, "model"):
        raise HubError(400, "this test server has models only")
    account = site.account(request)
    namespace = body.get("organization") or (account.user if account else "")
    user = site.author(request, namespace)
    return f"{namespace}/{body['name']}", user, body


@routes("POST", "/api/repos/create")
def create(site: Site, request: Request) -> Answer:
    name, user, body = _named(site, request)
    private = body.get("visibility") == "private" or bool(body.get("private"))
    told = {"url": f"{site.api}/{name}", "name": name}
    try:
        site.store.create(name, user, private)
    except HubError as error:
        return answer_json({**told, "error": error.message}, error.status, **{"X-Error-Message": error.message})
    return answer_json({**told, "id": name})


@routes("DELETE", "/api/repos/delete")
def delete(site: Site, request: Request) -> Answer:
    name, _, _ = _named(site, request)
    site.store.delete(name)
    return Answer(200)


@routes("POST", "/api/repos/move")
def move(site: Site, request: Request) -> Answer:
    body = body_json(request)
    repo, _ = site.writer(request, body["fromRepo"])
    site.author(request, body["toRepo"].partition("/")[0])
    site.store.rename(repo.name, body["toRepo"])
    return Answer(200)


@routes("PUT", f"{MODEL}/settings")
def settings(site: Site, request: Request, repo: str) -> Answer:
    found, _ = site.writer(request, repo)
    body = body_json(request)
    if "visibility" in body or "private" in body:
        found.private = body.get("visibility") == "private" or bool(body.get("private"))
    if "gated" in body:
        found.gated = bool(body["gated"])
    return answer_json({"private": found.private, "gated": "auto" if found.gated else False})


@routes("GET", MODEL)
def model(site: Site, request: Request, repo: str) -> Answer:
    found = site.reader(request, repo)
    return answer_json(_described(found, found.head("main"), request))


@routes("GET", f"{MODEL}/revision/{REVISION}")
def model_at(site: Site, request: Request, repo: str, revision: str) -> Answer:
    found = site.reader(request, repo)
    return answer_json(_described(found, found.head(revision), request))


@routes("GET", f"{MODEL}/auth-check")
def auth_check(site: Site, request: Request, repo: str) -> Answer:
    """Whether the token may read the contents."""
    site.reader(request, repo, contents=True)
    return answer_json({})


def _described(repo: Repo, head: Commit, request: Request) -> dict[str, Any]:
    blobs = request.query.get("blobs", "").lower() in ("1", "true")
    card = _card(head)
    return {
        "_id": "0" * 24,
        "id": repo.name,
        "modelId": repo.name,
        "author": repo.namespace,
        "sha": head.oid,
        "lastModified": head.iso_date,
        "createdAt": repo.created.strftime("%Y-%m-%dT%H:%M:%S.000Z"),
        "private": repo.private,
        "gated": "auto" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card.get("tags", []),
        **({"cardData": card} if card else {}),
        "siblings": [_sibling(repo, path, file, blobs) for path, file in sorted(head.files.items())],
    }


def _sibling(repo: Repo, path: str, file: File, blobs: bool) -> dict[str, Any]:
    told: dict[str, Any] = {"rfilename": path}
    if blobs:
        size = repo.sizes.get(path, file.size)
        told |= {"size": size, "blobId": file.oid}
        if file.sha256 is not None:
            told["lfs"] = {"sha256": file.sha256, "size": size, "pointerSize": len(pointer(file.sha256, file.size))}
    return told


def _card(head: Commit) -> dict[str, Any]:
    """The front matter of the README."""
    readme = head.files.get("README.md")
    text = (readme.data or b"").decode(errors="replace") if readme else ""
    if not text.startswith("---\n"):
        return {}
    with contextlib.suppress(yaml.YAMLError):
        card = yaml.safe_load(text.split("---\n")[1])
        return card if isinstance(card, dict) else {}
    return {}

"""Endpoints of discussions and pull requests, and of the check of a model card's front matter."""

import re
from typing import Any

import yaml

from tests.hub_server.errors import HubError
from tests.hub_server.repos import MODEL
from tests.hub_server.site import Routes, Site, answer_json, body_json
from tests.hub_server.store import Discussion, Repo
from tests.hub_server.wire import Answer, Request

routes = Routes()
_ONE = f"{MODEL}/discussions/(?P<num>[0-9]+)"


def _told(repo: Repo, one: Discussion) -> dict[str, Any]:
    created = one.created.strftime("%Y-%m-%dT%H:%M:%S.000Z")
    told = {
        "num": one.num,
        "title": one.title,
        "author": {"name": one.author},
        "createdAt": created,
        "status": one.status,
        "isPullRequest": one.base is not None,
        "repo": {"name": repo.name, "type": "model"},
        "repoOwner": {"name": repo.namespace},
    }
    comment = {
        "id": f"{one.num:024x}",
        "type": "comment",
        "author": {"name": one.author},
        "createdAt": created,
        "data": {"edited": False, "hidden": False, "latest": {"raw": one.description, "html": ""}, "history": []},
    }
    details: dict[str, Any] = {"events": [comment], "filesWithConflicts": [], "diff": ""}
    if one.base is not None:
        details["changes"] = {"base": one.base, "mergeCommitId": one.merged}
    return {**told, **details}


def _found(repo: Repo, num: str) -> Discussion:
    if int(num) not in repo.discussions:
        raise HubError(404, "Discussion not found")
    return repo.discussions[int(num)]


@routes("GET", f"{MODEL}/discussions")
def listed(site: Site, request: Request, repo: str) -> Answer:
    found = site.reader(request, repo)
    kind, status = request.query.get("type"), request.query.get("status")
    some = [
        one
        for one in found.discussions.values()
        if kind in (None, "all", "pull_request" if one.base else "discussion")
        and status in (None, "all", "closed" if one.status in ("merged", "closed") else "open")
    ]
    return answer_json({"discussions": [_told(found, one) for one in some], "count": len(some), "start": 0})


@routes("POST", f"{MODEL}/discussions")
def create(site: Site, request: Request, repo: str) -> Answer:
    """Anybody who may read may discuss; a pull request begins empty, at the head of `main`."""
    found, account = site.reader(request, repo), site.account(request)
    if account is None:
        raise HubError(401, "Invalid username or password.")
    body = body_json(request)
    base = found.head("main") if body.get("pullRequest") else None
    one = found.discuss(body["title"], body.get("description", ""), account.user, base)
    one.status = "draft" if base else "open"
    return answer_json(
        {"num": one.num, "pullRequest": base is not None, "url": f"{site.api}/{repo}/discussions/{one.num}"}
    )


@routes("GET", _ONE)
def details(site: Site, request: Request, repo: str, num: str) -> Answer:
    found = site.reader(request, repo)
    return answer_json(_told(found, _found(found, num)))


@routes("POST", f"{_ONE}/status")
def change_status(site: Site, request: Request, repo: str, num: str) -> Answer:
    found, user = site.writer(request, repo)
    one, status = _found(found, num), body_json(request)["status"]
    one.status = status
    event = {"id": "0" * 24, "type": "status-change", "author": {"name": user}, "data": {"status": status}}
    return answer_json({"newStatus": {**event, "createdAt": one.created.strftime("%Y-%m-%dT%H:%M:%S.000Z")}})


@routes("POST", f"{_ONE}/merge")
def merge(site: Site, request: Request, repo: str, num: str) -> Answer:
    """The pull request's changes as one commit on `main`."""
    found, user = site.writer(request, repo)
    with found.lock:
        one = _found(found, num)
        if one.base is None or one.status in ("merged", "closed"):
            raise HubError(400, "nothing to merge")
        tip = found.head(one.ref)
        known = {commit.oid for commit in found.history(found.head("main"))}
        base = next((commit for commit in found.history(tip) if commit.oid in known), None)
        before = base.files if base else {}
        changes = {path: file for path, file in tip.files.items() if before.get(path) != file}
        gone = {path: None for path in before if path not in tip.files}
        one.merged = found.commit("main", {**changes, **gone}, user, f"{one.title} (#{one.num})").oid
        one.status = "merged"
    return answer_json({"success": True})


@routes("POST", "/api/validate-yaml")
def validate(site: Site, request: Request) -> Answer:
    """Whether the front matter is YAML. The Hub also checks its fields; this does not."""
    match = re.match(r"---\r?\n(.*?)\r?\n---", body_json(request).get("content", ""), re.DOTALL)
    try:
        yaml.safe_load(match.group(1) if match else "")
    except yaml.YAMLError as error:
        return answer_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    return answer_json({"errors": [], "warnings": []})

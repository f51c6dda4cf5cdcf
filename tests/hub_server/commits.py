"""Endpoints that write: what kind a file is (`preupload`), the commit, branches and tags; and the list of commits."""

import base64
import fnmatch
import json
from collections.abc import Iterable
from typing import Any

from tests.hub_server import git
from tests.hub_server.errors import HubError, no_entry
from tests.hub_server.repos import MODEL
from tests.hub_server.site import REVISION, Routes, Site, answer_json, body_json
from tests.hub_server.store import Repo
from tests.hub_server.wire import Answer, Request

routes = Routes()
LARGE = 10 << 20
_PATTERNS = (
    *("*.safetensors", "*.bin", "*.model", "*.png", "*.jpg", "*.parquet", "*.gz", "*.zip", "*.pt", "*.pth", "*.ckpt"),
    *("*.gguf", "*.onnx", "*.npy", "*.npz", "*.pkl", "*.h5", "*.msgpack"),
)


def is_large(path: str, size: int, sample: bytes = b"") -> bool:
    """Whether a file is for LFS: by its name, its size, or because its first bytes are no text."""
    named = any(fnmatch.fnmatch(path.rpartition("/")[2], pattern) for pattern in _PATTERNS)
    return size > 0 and (named or size > LARGE or b"\0" in sample)


@routes("POST", f"{MODEL}/preupload/{REVISION}")
def preupload(site: Site, request: Request, repo: str, revision: str) -> Answer:
    found, _ = site.contributor(request, repo, pull="create_pr" in request.query)
    head, told = found.head(revision), []
    for one in body_json(request)["files"]:
        large = is_large(one["path"], one["size"], base64.b64decode(one.get("sample", "")))
        file = {"path": one["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if (old := head.files.get(one["path"])) is not None:
            file["oid"] = old.sha256 or old.oid
        told.append(file)
    return answer_json({"files": told})


@routes("POST", f"{MODEL}/commit/{REVISION}")
def commit(site: Site, request: Request, repo: str, revision: str) -> Answer:
    """All changes or none. With `create_pr` they go to a new pull request and the branch stays."""
    found, user = site.contributor(request, repo, pull="create_pr" in request.query)
    lines = [json.loads(line) for line in request.read().splitlines() if line.strip()]
    header = next((line["value"] for line in lines if line["key"] == "header"), None)
    if header is None or not header.get("summary"):
        raise HubError(400, "a commit needs a header with a summary")
    with found.lock:
        head = found.head(revision)
        changes = _changes(site, found, head, lines)
        told, parent = {}, header.get("parentCommit")
        if request.query.get("create_pr"):
            if parent is not None and parent not in found.commits:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            base = found.commits[parent] if parent else head
            pull = found.discuss(header["summary"], header.get("description", ""), user, base)
            revision, parent = pull.ref, None
            told["pullRequestUrl"] = f"{site.api}/{found.name}/discussions/{pull.num}"
        new = found.commit(revision, changes, user, header["summary"], header.get("description", ""), parent)
    url = f"{site.api}/{found.name}/commit/{new.oid}"
    return answer_json({"success": True, "commitOid": new.oid, "commitUrl": url, "hookOutput": "", **told})


def _changes(site: Site, repo: Repo, head: git.Commit, lines: Iterable[dict[str, Any]]) -> dict[str, git.File | None]:
    changes: dict[str, git.File | None] = {}
    for line in lines:
        key, value = line["key"], line["value"]
        if key == "header":
            continue
        path = _checked(value["path"])
        if key == "file":
            changes[path] = _small(path, base64.b64decode(value["content"]))
        elif key == "lfsFile":
            changes[path] = _large(site, repo, path, value)
        elif key == "deletedFile":
            if path not in head.files:
                raise no_entry(path, head.oid)
            changes[path] = None
        elif key == "deletedFolder":
            folder = path.rstrip("/") + "/"
            changes.update({one: None for one in head.files if one.startswith(folder)})
        else:
            raise HubError(400, f"unknown operation {key}")
    return changes


def _checked(path: str) -> str:
    parts = path.rstrip("/").split("/")
    if any(part in ("", ".", "..", ".git") for part in parts):
        raise HubError(400, f"Invalid path: {path}")
    return path


def _small(path: str, data: bytes) -> git.File:
    if len(data) > LARGE:
        raise HubError(400, f"{path} is larger than 10 MiB: it has to be uploaded as a large file")
    return git.small(data)


def _large(site: Site, repo: Repo, path: str, value: dict[str, Any]) -> git.File:
    oid = value["oid"]
    if oid not in repo.large:
        raise HubError(400, f"The LFS object {oid} of {path} was never uploaded to this repository")
    size = site.blobs[oid].size
    if value.get("size") not in (None, size):
        raise HubError(400, f"{path} has {size} bytes, not {value['size']}")
    return git.large(oid, size)


@routes("GET", f"{MODEL}/refs")
def refs(site: Site, request: Request, repo: str) -> Answer:
    found = site.reader(request, repo)

    def listed(prefix: str, known: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in known.items()]

    told = {"branches": listed("refs/heads/", found.branches), "tags": listed("refs/tags/", found.tags)}
    if request.query.get("include_prs"):
        told["pullRequests"] = listed("", found.pulls)
    return answer_json({**told, "converts": []})


@routes("GET", f"{MODEL}/commits/{REVISION}")
def commits(site: Site, request: Request, repo: str, revision: str) -> Answer:
    found = site.reader(request, repo)
    history = list(found.history(found.head(revision)))
    start, size = int(request.query.get("p") or 0), min(int(request.query.get("limit") or 50), 50)
    page = history[start * size : (start + 1) * size]
    following = f'<{site.api}{request.path}?p={start + 1}&limit={size}>; rel="next"'
    headers = {"Link": following} if (start + 1) * size < len(history) else {}
    return answer_json([_listed(one) for one in page], **{"X-Total-Count": str(len(history)), **headers})


def _listed(one: git.Commit) -> dict[str, Any]:
    told = {"id": one.oid, "title": one.title, "message": one.message, "date": one.iso_date}
    return {**told, "authors": [{"user": one.author, "avatar": ""}]}


@routes("POST", f"{MODEL}/branch/(?P<branch>.+)")
def create_branch(site: Site, request: Request, repo: str, branch: str) -> Answer:
    found, _ = site.writer(request, repo)
    body = body_json(request)
    if branch in found.branches and not body.get("overwrite"):
        raise HubError(409, f"Reference already exists: refs/heads/{branch}")
    found.branches[branch] = found.head(body.get("startingPoint") or "main").oid
    return Answer(200)


@routes("DELETE", f"{MODEL}/branch/(?P<branch>.+)")
def delete_branch(site: Site, request: Request, repo: str, branch: str) -> Answer:
    found, _ = site.writer(request, repo)
    if branch == "main":
        raise HubError(403, "Cannot delete refs/heads/main")
    if found.branches.pop(branch, None) is None:
        raise HubError(404, f"Reference does not exist: {branch}", "RevisionNotFound")
    return Answer(200)


@routes("POST", f"{MODEL}/tag/{REVISION}")
def create_tag(site: Site, request: Request, repo: str, revision: str) -> Answer:
    found, _ = site.writer(request, repo)
    tag = body_json(request)["tag"]
    if tag in found.tags:
        raise HubError(409, f"Tag reference exists already: {tag}")
    found.tags[tag] = found.head(revision).oid
    return Answer(200)


@routes("DELETE", f"{MODEL}/tag/(?P<tag>.+)")
def delete_tag(site: Site, request: Request, repo: str, tag: str) -> Answer:
    found, _ = site.writer(request, repo)
    if found.tags.pop(tag, None) is None:
        raise HubError(404, f"Reference does not exist: {tag}", "RevisionNotFound")
    return Answer(200)

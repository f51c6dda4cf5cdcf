"""Endpoints about files of a revision: the tree, some paths, and `resolve`, which gives a file or says where it is."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

from tests.hub_server.errors import no_entry
from tests.hub_server.git import Commit, File, pointer
from tests.hub_server.repos import MODEL
from tests.hub_server.site import REPO, REVISION, Routes, Site, answer_json, quoted
from tests.hub_server.store import Repo
from tests.hub_server.wire import Answer, Request, ranged

routes = Routes()


def _true(value: str | None) -> bool:
    return (value or "").lower() in ("1", "true")


@routes("GET", f"{MODEL}/tree/{REVISION}(?:/(?P<path>.*))?")
def tree(site: Site, request: Request, repo: str, revision: str, path: str = "") -> Answer:
    """The entries below a folder, in pages; `Link` names the next one."""
    found, query = site.reader(request, repo), request.query
    head, path = found.head(revision), path.strip("/")
    if path not in head.folders:
        raise no_entry(path, head.oid)
    paths = list(_below(head, path, _true(query.get("recursive"))))
    start, size = int(query.get("cursor") or 0), min(int(query.get("limit") or site.page_size), site.page_size)
    expand = _true(query.get("expand"))
    page = [_entry(site, found, head, one, expand) for one in paths[start : start + size]]
    headers = {"X-Repo-Commit": head.oid}
    if start + size < len(paths):
        following = urlencode({**query, "cursor": start + size})
        headers["Link"] = f'<{site.api}{request.path}?{following}>; rel="next"'
    return answer_json(page, **headers)


@routes("POST", f"{MODEL}/paths-info/{REVISION}")
def paths_info(site: Site, request: Request, repo: str, revision: str) -> Answer:
    found = site.reader(request, repo)
    head = found.head(revision)
    form = parse_qs(request.read().decode())
    asked = [path.strip("/") for path in form.get("paths", [])]
    expand = _true(form.get("expand", [""])[0])
    known = [path for path in asked if path in head.files or path in head.folders]
    return answer_json([_entry(site, found, head, path, expand) for path in known])


def _below(head: Commit, folder: str, recursive: bool) -> Iterator[str]:
    prefix = f"{folder}/" if folder else ""
    for path in sorted([*head.files, *(f for f in head.folders if f)]):
        if path.startswith(prefix) and path != folder and (recursive or "/" not in path[len(prefix) :]):
            yield path


def _entry(site: Site, repo: Repo, head: Commit, path: str, expand: bool) -> dict[str, Any]:
    if path not in head.files:
        told: dict[str, Any] = {"type": "directory", "oid": head.folders[path], "size": 0, "path": path}
    else:
        told = _file_entry(site, repo, path, head.files[path])
    if expand:
        last = _last_change(repo, head, path)
        told["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.iso_date}
    return told


def _file_entry(site: Site, repo: Repo, path: str, file: File) -> dict[str, Any]:
    size = repo.sizes.get(path, file.size)
    told: dict[str, Any] = {"type": "file", "oid": file.oid, "size": size, "path": path}
    if file.sha256 is not None:
        told["lfs"] = {"oid": file.sha256, "size": size, "pointerSize": len(pointer(file.sha256, file.size))}
        if file.sha256 in site.xet_hashes:
            told["xetHash"] = site.xet_hashes[file.sha256]
    return told


def _last_change(repo: Repo, head: Commit, path: str) -> Commit:
    def oid(commit: Commit) -> str | None:
        return commit.files[path].oid if path in commit.files else commit.folders.get(path)

    last = head
    for commit in repo.history(head):
        if oid(commit) != oid(head):
            break
        last = commit
    return last


@routes("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)")
def resolve(site: Site, request: Request, repo: str, revision: str, path: str) -> Answer:
    """A small file itself; for a large one the signed address at the CDN."""
    found = site.reader(request, repo, contents=True)
    head = found.head(revision)
    headers = {"X-Repo-Commit": head.oid}
    if path in found.detours:
        return Answer(302, {**headers, "Location": found.detours[path], **_linked(found, head, path)})
    if path not in head.files:
        raise no_entry(path, head.oid)
    file = head.files[path]
    if file.sha256 is None:
        kind = {"Content-Type": "text/plain; charset=utf-8", "ETag": f'"{file.oid}"'}
        return ranged(request, (file.data or b"",), {**headers, **kind})
    if file.sha256 in site.xet_hashes:
        token = f"{site.api}/api/models/{quoted(found.name)}/xet-read-token/{head.oid}"
        headers["X-Xet-Hash"] = site.xet_hashes[file.sha256]
        headers["Link"] = f'<{token}>; rel="xet-auth"'
    disposition = f'inline; filename="{quote(path.rpartition("/")[2])}"'
    location = site.signed(f"/blobs/{file.sha256}", **{"response-content-disposition": disposition})
    return Answer(302, {**headers, "Location": location, **_linked(found, head, path)})


def _linked(repo: Repo, head: Commit, path: str) -> dict[str, str]:
    """What is known of a file that lies elsewhere."""
    file = head.files.get(path)
    if file is None:
        return {}
    size = repo.sizes.get(path, file.size)
    return {"X-Linked-ETag": f'"{file.sha256 or file.oid}"', "X-Linked-Size": str(size)}

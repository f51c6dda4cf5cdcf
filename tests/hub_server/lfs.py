"""Upload of large files by LFS: the batch, the contents to the CDN's origin (whole or in parts), the check after it."""

import hashlib
from typing import Any

from tests.hub_server.errors import HubError
from tests.hub_server.site import REPO, Routes, Site, answer_json, body_json, quoted
from tests.hub_server.store import Repo
from tests.hub_server.wire import Answer, Request

routes = Routes()  # at the API's origin
stored = Routes()  # at the CDN's


@routes("POST", f"/{REPO}\\.git/info/lfs/objects/batch")
def batch(site: Site, request: Request, repo: str) -> Answer:
    """Where each content goes. One that was uploaded to this repository before needs no actions. Without a branch it is
    for a pull request.
    """
    body = body_json(request)
    found, _ = site.contributor(request, repo, pull="ref" not in body)
    if body.get("operation") != "upload":
        raise HubError(400, "only uploads go through this endpoint")
    multipart = "multipart" in body.get("transfers", [])
    objects = [_actions(site, found, one["oid"], one["size"], multipart) for one in body["objects"]]
    in_parts = any("chunk_size" in one.get("actions", {}).get("upload", {}).get("header", {}) for one in objects)
    return answer_json({"transfer": "multipart" if in_parts else "basic", "objects": objects})


def _actions(site: Site, repo: Repo, oid: str, size: int, multipart: bool) -> dict[str, Any]:
    told: dict[str, Any] = {"oid": oid, "size": size}
    if oid in repo.large and oid in site.blobs:
        return told
    base = f"{site.api}/{quoted(repo.name)}.git/info/lfs/objects"
    upload: dict[str, Any] = {"href": site.signed(f"/uploads/{oid}", size=str(size))}
    if multipart and size > site.part_size:
        parts = range(1, -(-size // site.part_size) + 1)
        header = {str(part): site.signed(f"/uploads/{oid}/{part}") for part in parts}
        upload = {"href": f"{base}/complete", "header": {"chunk_size": str(site.part_size), **header}}
    return {**told, "actions": {"upload": upload, "verify": {"href": f"{base}/verify"}}}


@routes("POST", f"/{REPO}\\.git/info/lfs/objects/verify")
def verify(site: Site, request: Request, repo: str) -> Answer:
    """Only now the content belongs to the repository."""
    found, _ = site.contributor(request, repo, pull=True)
    body = body_json(request)
    if body["oid"] not in site.blobs or site.blobs[body["oid"]].size != body["size"]:
        raise HubError(404, f"{body['oid']} was not uploaded with {body['size']} bytes")
    found.large.add(body["oid"])
    return answer_json({"message": "ok"})


@routes("POST", f"/{REPO}\\.git/info/lfs/objects/complete")
def complete(site: Site, request: Request, repo: str) -> Answer:
    """Put the parts together. The client sends no token here, as the address is thought to be signed."""
    site.store.find(repo)
    body = body_json(request)
    parts = [site.blobs.part(body["oid"], one["partNumber"]) for one in body["parts"]]
    for path, one in zip(parts, body["parts"], strict=True):
        if not path.exists() or _etag(path.read_bytes()) != one["etag"]:
            raise HubError(400, f"part {one['partNumber']} is not what was uploaded")
    if body["oid"] not in site.blobs:
        site.blobs.receive((path.read_bytes() for path in parts), body["oid"])
    return answer_json({"success": True})


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


@stored("PUT", "/uploads/(?P<oid>[0-9a-f]{64})")
def put(site: Site, request: Request, oid: str) -> Answer:
    site.check_signature(request)
    site.blobs.receive(request.pieces(), oid, int(request.query["size"]))
    return Answer(200, {"ETag": f'"{oid[:32]}"'})


@stored("PUT", "/uploads/(?P<oid>[0-9a-f]{64})/(?P<part>[0-9]+)")
def put_part(site: Site, request: Request, oid: str, part: str) -> Answer:
    site.check_signature(request)
    data = request.read()
    site.blobs.part(oid, int(part)).write_bytes(data)
    return Answer(200, {"ETag": _etag(data)})

"""The origin that large contents come from: signed addresses, ranges, and no tokens."""

from tests.hub_server import cas, lfs
from tests.hub_server.errors import HubError
from tests.hub_server.site import Routes, Site
from tests.hub_server.wire import Answer, Part, Request, ranged

routes = Routes()


def answer(site: Site, request: Request) -> Answer:
    """A token is for the Hub alone: a client that sends it here has given it away."""
    if "authorization" in request.headers:
        refusal = HubError(400, "Only one auth mechanism allowed").answer()
        return Answer(refusal.status, refusal.headers, refusal.body, "a token was sent to the CDN")
    return _ALL.answer(site, request)


@routes("GET", "/blobs/(?P<sha256>[0-9a-f]{64})")
def blob(site: Site, request: Request, sha256: str) -> Answer:
    site.check_signature(request)
    if sha256 not in site.blobs:
        raise HubError(404, "NoSuchKey")
    found = site.blobs[sha256]
    headers = {"Content-Type": "application/octet-stream", "ETag": f'"{sha256}"'}
    return ranged(request, (Part(found.path, 0, found.size),), headers)


_ALL = Routes(routes, lfs.stored, cas.stored)

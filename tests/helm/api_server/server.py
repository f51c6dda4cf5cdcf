"""The API of Kubernetes over HTTP on loopback, as far as helm and kubectl use it.

It differs from a real one in this: unknown fields are always refused (a real server only warns helm of them), nobody is
asked who they are, and what the chart's kinds do not need is not there.
"""

import contextlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.helm.api_server import protobuf
from tests.helm.api_server.admission import Admission, Refusal
from tests.helm.api_server.kinds import BY_PATH, KINDS, Kind
from tests.helm.api_server.schemas import NEWEST
from tests.helm.api_server.store import Object, Store

_VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


class ApiServer:
    """A server with a store. `requests` has every request that changed something or was refused: verb, path, code."""

    def __init__(self, version: str = NEWEST) -> None:
        self.store = Store()
        self.admission = Admission(self.store, version)
        self.version = version
        self.logs: dict[str, str] = {}
        self.requests: list[tuple[str, str, int]] = []
        for name in ("default", "kube-system"):
            self.admission.create(BY_PATH["api/v1", "namespaces"], "", _namespace(name))
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"server_of": self}))
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self.store.close()
        self._http.shutdown()
        self._http.server_close()


def _namespace(name: str) -> Object:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: ApiServer

    def _answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        url = urlsplit(self.path)
        self._query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        try:
            code, answer = self._routed(url.path.strip("/"), body)
        except Refusal as refusal:
            code, answer = refusal.code, refusal.status
        if self.command != "GET" or code not in (200, 404):
            self.server_of.requests.append((self.command, url.path, code))
        if answer is not None:
            self._send(code, answer)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

    def _send(self, code: int, answer: Object | str) -> None:
        text = answer if isinstance(answer, str) else json.dumps(answer)
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what matters stands in `requests`."""

    # ---- what is where ----

    def _routed(self, path: str, body: bytes) -> tuple[int, Object | str | None]:
        found = _told(path, self.server_of.version)
        if found is not None:
            return 200, found
        kind, namespace, name, part = _resource(path)
        if part == "log":
            return 200, self.server_of.logs.get(f"{namespace}/{name}", "")
        if self.command == "POST":
            made = self.server_of.admission.create(kind, namespace, self._body(body), self._dry)
            return 201, made
        if self.command == "GET" and not name:
            return self._listed(kind, namespace)
        thing = self.server_of.store.get(kind.name, namespace, name)
        if thing is None:
            group = f".{kind.group}" if kind.group else ""
            raise Refusal(404, "NotFound", f'{kind.plural}{group} "{name}" not found')
        return 200, self._done(kind, thing, body)

    def _done(self, kind: Kind, thing: Object, body: bytes) -> Object:
        admission = self.server_of.admission
        if self.command == "PATCH":
            return admission.patch(kind, thing, self._body(body), self.headers["Content-Type"], self._dry)
        if self.command == "PUT":
            return admission.replace(kind, thing, self._body(body), self._dry)
        if self.command == "DELETE" and not self._dry:
            options = self._body(body) if body else {}
            admission.delete(kind, thing, options.get("gracePeriodSeconds"))
            return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
        return thing

    @property
    def _dry(self) -> bool:
        return "dryRun" in self._query

    def _body(self, body: bytes) -> Any:
        return protobuf.decoded(body) if body.startswith(protobuf.MAGIC) else json.loads(body)

    def _listed(self, kind: Kind, namespace: str) -> tuple[int, Object | None]:
        if self._query.get("watch") in ("true", "1"):
            with contextlib.suppress(ConnectionError):  # whoever watched has seen enough
                self._watch(kind, namespace)
            return 200, None
        store = self.server_of.store
        version = str(store.version)
        items = [each for each in store.all(kind.name, namespace) if _selected(each, self._query)]
        answer = {"kind": f"{kind.name}List", "apiVersion": kind.api_version, "metadata": {"resourceVersion": version}}
        return 200, answer | {"items": items}

    def _watch(self, kind: Kind, namespace: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        after = int(self._query.get("resourceVersion") or 0)
        seconds = float(self._query.get("timeoutSeconds") or 300)
        for change in self.server_of.store.changes(kind.name, after, seconds):
            inside = namespace in ("", change.object["metadata"].get("namespace", ""))
            if inside and _selected(change.object, self._query):
                self.wfile.write(json.dumps({"type": change.type, "object": change.object}).encode() + b"\n")
                self.wfile.flush()


def _resource(path: str) -> tuple[Kind, str, str, str]:
    """Kind, namespace, name and the part below it that a path names."""
    found = re.fullmatch(
        r"(api/v1|apis/[^/]+/[^/]+)(?:/namespaces/([^/]+)(?=/))?/([^/]+)(?:/([^/]+))?(?:/(\w+))?", path
    )
    kind = BY_PATH.get((found[1], found[3])) if found else None
    if found is None or kind is None:
        raise Refusal(404, "NotFound", "the server could not find the requested resource")
    return kind, found[2] or "", found[4] or "", found[5] or ""


def _selected(thing: Object, query: Mapping[str, str]) -> bool:
    labels = thing["metadata"].get("labels") or {}
    fields = dict(each.split("=", 1) for each in query.get("fieldSelector", "").split(",") if "=" in each)
    if any(key == "metadata.name" and value != thing["metadata"]["name"] for key, value in fields.items()):
        return False
    return all(_matches(labels, each) for each in query.get("labelSelector", "").split(",") if each)


def _matches(labels: Mapping[str, str], term: str) -> bool:
    if "!=" in term:
        key, value = term.split("!=")
        return labels.get(key) != value
    if "=" in term:
        key, value = term.replace("==", "=").split("=")
        return labels.get(key) == value
    return (term[1:] not in labels) if term.startswith("!") else term in labels


def _told(path: str, version: str) -> Object | None:
    """What the server tells of itself."""
    versions = sorted({kind.api_version for kind in KINDS if kind.group})
    if path == "version":
        major, minor = version.split(".")
        return {"major": major, "minor": minor, "gitVersion": f"v{version}.0", "platform": "linux/amd64"}
    if path == "api":
        return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
    if path == "apis":
        groups = [_group(each) for each in versions]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    if path == "openapi/v3":
        paths = sorted({kind.path for kind in KINDS})
        return {"paths": {each: {"serverRelativeURL": f"/openapi/v3/{each}?hash=0"} for each in paths}}
    if path.startswith("openapi/v3/"):
        return _openapi(path.removeprefix("openapi/v3/"))
    if kinds := [kind for kind in KINDS if kind.path == path]:
        resources = [_described(kind) for kind in kinds]
        return {"kind": "APIResourceList", "groupVersion": kinds[0].api_version, "resources": resources}
    return None


def _group(api_version: str) -> Object:
    group, _, version = api_version.partition("/")
    one = {"groupVersion": api_version, "version": version}
    return {"name": group, "versions": [one], "preferredVersion": one}


def _described(kind: Kind) -> Object:
    names = {"name": kind.plural, "singularName": kind.name.lower(), "kind": kind.name}
    return names | {"namespaced": kind.namespaced, "verbs": _VERBS}


def _openapi(path: str) -> Object:
    """That the server checks fields itself, so that helm and kubectl leave it to the server."""
    parameter = {"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}
    paths = {}
    for kind in (each for each in KINDS if each.path == path):
        named = {"group": kind.group, "version": kind.version, "kind": kind.name}
        verb = {"x-kubernetes-group-version-kind": named, "x-kubernetes-action": "patch", "parameters": [parameter]}
        paths[f"/{path}/{kind.plural}/{{name}}"] = {"patch": verb | {"responses": {}}}
    return {"openapi": "3.0.0", "info": {"title": "loopback", "version": "1"}, "paths": paths}

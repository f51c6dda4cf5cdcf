"""Traces of requests reach an OpenTelemetry collector, by the variables that the chart sets."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.helm.cases import TRACED
from tests.helm.chart import find, render
from tests.service.processes import free_port, until


@pytest.fixture
def collector():
    """What OTLP over HTTP was sent to a server: requests for traces, and its address."""
    found: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v1/traces":
                found.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_words: object) -> None:
            """Nothing is told."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield found, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_requests_are_traced(collector, tmp_path: Path) -> None:
    """The API runs with what the chart gives it, but for the collector's address."""
    found, address = collector
    container = find(render(TRACED, scenario="minimal"), "Deployment", "-api")["spec"]["template"]["spec"][
        "containers"
    ][0]
    given = {each["name"]: each["value"] for each in container["env"] if each["name"].startswith(("OTEL", "FASTAPI"))}
    assert given.pop("OTEL_EXPORTER_OTLP_ENDPOINT") == "http://collector:4318"
    port = free_port()
    environment = {**os.environ, **given, "OTEL_EXPORTER_OTLP_ENDPOINT": address}
    environment |= {"MERGER_DATABASE_URL": f"sqlite:///{tmp_path / 'jobs.db'}"}
    process = subprocess.Popen([sys.executable, "-m", "api.web", "--port", str(port)], env=environment, cwd=tmp_path)
    try:
        until(lambda: _answers(f"http://127.0.0.1:{port}/livez"))
    finally:
        process.terminate()
        process.wait()
    spans = [
        (resource, span)
        for each in found
        for resource in each.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert any("/livez" in span.name for _, span in spans)
    names = {
        a.value.string_value for resource, _ in spans for a in resource.resource.attributes if a.key == "service.name"
    }
    assert names == {"demo-merger-api"}


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url, trust_env=False).is_success
    except httpx2.HTTPError:
        return False

"""The job service as its clients see it. Knows HTTP and the API's answers; knows nothing of recipes or terminals."""

import json
import os
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2

from merger.errors import RequestError, ServiceFailed

ENDED = frozenset({"succeeded", "failed", "canceled", "timed_out"})
_RETRY = 1.0  # seconds between two tries to take a stream up again


@dataclass(frozen=True)
class Told:
    """Something that a job's stream of events says; `id` is None for what only tells the progress."""

    id: int | None
    kind: str
    data: Mapping[str, Any]


def config_file() -> Path:
    """Where `server` and `api_key` may stand, in TOML."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "merger" / "config.toml"


class Client:
    """One service. Methods raise RequestError for what it refuses, ServiceFailed where it does not answer or fails."""

    def __init__(self, server: str | None = None, key: str | None = None) -> None:
        configured = _configured()
        self.server = server or os.environ.get("MERGER_SERVER") or configured.get("server", "http://127.0.0.1:8080")
        key = key or os.environ.get("MERGER_API_KEY") or configured.get("api_key", "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx2.Client(base_url=self.server, headers=headers, timeout=60.0)

    def submit(
        self,
        recipe: Mapping[str, Any],
        labels: Mapping[str, str],
        priority: int,
        key: str | None = None,
        secrets: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Queue a recipe, which may use `secrets` of the service by their names; returns the job."""
        body = {"recipe": recipe, "labels": labels, "priority": priority, "secrets": secrets or {}}
        return self._call("POST", "/v1/jobs", json=body, headers={"Idempotency-Key": key} if key else {})

    def jobs(self, states: tuple[str, ...], limit: int) -> list[dict[str, Any]]:
        """The newest jobs."""
        found: list[dict[str, Any]] = []
        query: dict[str, Any] = {"state": list(states)} if states else {}
        while len(found) < limit:
            page = self._call("GET", "/v1/jobs", params={**query, "limit": min(200, limit - len(found))})
            found += page["jobs"]
            if not page["next"]:
                break
            query["cursor"] = page["next"]
        return found

    def job(self, job: str) -> dict[str, Any]:
        """One job."""
        return self._call("GET", f"/v1/jobs/{job}")

    def cancel(self, job: str) -> dict[str, Any]:
        """Ask for a job to stop; returns it as it is now."""
        return self._call("POST", f"/v1/jobs/{job}:cancel")

    def retry(self, job: str) -> dict[str, Any]:
        """Queue an ended job again."""
        return self._call("POST", f"/v1/jobs/{job}:retry")

    def put_secret(self, name: str, value: str) -> bool:
        """Store a secret; False where it takes the place of an earlier value."""
        return self._send("PUT", _secret(name), json={"value": value}).status_code == httpx2.codes.CREATED

    def secrets(self) -> list[dict[str, Any]]:
        """The names of the secrets, with the times at which they were stored."""
        found: list[dict[str, Any]] = self._call("GET", "/v1/secrets")["secrets"]
        return found

    def remove_secret(self, name: str) -> None:
        """Remove a secret."""
        self._send("DELETE", _secret(name))

    def events(self, job: str, on_gap: Callable[[str], None]) -> Iterator[Told]:
        """Everything that happens to a job until it has ended, across restarts of the service.

        `on_gap` is told why a stream broke off.
        """
        last, ended = 0, False
        while not ended:
            try:
                for told in self._stream(job, last):
                    last = told.id or last
                    ended = ended or told.kind in ENDED
                    yield told
                ended = ended or self.job(job)["state"] in ENDED
            except (httpx2.HTTPError, ServiceFailed) as error:
                on_gap(error.message if isinstance(error, ServiceFailed) else str(error))
                time.sleep(_RETRY)

    def _stream(self, job: str, after: int) -> Iterator[Told]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        timeout = httpx2.Timeout(10.0, read=60.0)
        with self._http.stream("GET", f"/v1/jobs/{job}/events", headers=headers, timeout=timeout) as response:
            if response.is_error:
                response.read()
                _refuse(response)
            fields: dict[str, str] = {}
            for line in response.iter_lines():
                name, _, value = line.partition(": ")
                if name:
                    fields[name] = value
                elif "data" in fields:
                    identity = fields.get("id")
                    data = json.loads(fields["data"])
                    yield Told(int(identity) if identity else None, fields.get("event", ""), data.get("data", data))
                    fields = {}

    def logs(self, job: str, *, follow: bool) -> Iterator[str]:
        """The lines of a job's log."""
        timeout = httpx2.Timeout(10.0, read=None if follow else 60.0)
        query = {"follow": str(follow).lower()}
        try:
            with self._http.stream("GET", f"/v1/jobs/{job}/logs", params=query, timeout=timeout) as response:
                if response.is_error:
                    response.read()
                    _refuse(response)
                yield from response.iter_lines()
        except httpx2.HTTPError as error:
            raise ServiceFailed(f"does not answer: {error}", where=self.server) from error

    def _call(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        content: dict[str, Any] = self._send(method, path, **request).json()
        return content

    def _send(self, method: str, path: str, **request: Any) -> httpx2.Response:
        try:
            response = self._http.request(method, path, **request)
        except httpx2.HTTPError as error:
            raise ServiceFailed(f"does not answer: {error}", where=self.server) from error
        if response.is_error:
            _refuse(response)
        return response


def _secret(name: str) -> str:
    return f"/v1/secrets/{quote(name, safe='')}"


def _refuse(response: httpx2.Response) -> None:
    """Raise what a problem says."""
    try:
        problem = response.json()
        detail, remedy = str(problem["detail"]), str(problem.get("remedy", ""))
    except (ValueError, KeyError, TypeError):
        detail, remedy = f"answered {response.status_code}", ""
    if response.is_server_error:
        raise ServiceFailed(detail, where=str(response.url.host), remedy=remedy or "Its log says more.")
    if response.status_code == httpx2.codes.UNAUTHORIZED:
        remedy = "Set MERGER_API_KEY to the key that `merger serve` printed at its first start."
    raise RequestError(detail, remedy=remedy)


def _configured() -> dict[str, str]:
    try:
        content = tomllib.loads(config_file().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RequestError(f"is not readable TOML: {error}", where=str(config_file())) from error
    return {name: str(value) for name, value in content.items()}

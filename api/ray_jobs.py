"""Ray's Jobs REST API, and what its nodes offer. Knows HTTP calls; what they say about a job is only a hint."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx2

from api.jobs import Needs
from api.settings import Settings

STOPPED = frozenset({"STOPPED", "SUCCEEDED", "FAILED"})


class RayUnreachable(Exception):
    """The cluster does not answer, or answers with an error."""


@dataclass(frozen=True)
class Submission:
    """What starts a runner: its name in Ray, its command line, the processors it reserves, its environment."""

    id: str
    entrypoint: str
    cpus: float
    environment: Mapping[str, str]


class RayJobs:
    """One Ray cluster, by the address of its dashboard. Every call may raise RayUnreachable."""

    def __init__(self, url: str, token: str | None = None, transport: httpx2.BaseTransport | None = None) -> None:
        self.url = url
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx2.Client(base_url=url, headers=headers, timeout=10.0, transport=transport, trust_env=False)

    def submit(self, submission: Submission) -> None:
        """Start a runner. One that Ray knows already by this name is not started again."""
        body = {
            "submission_id": submission.id,
            "entrypoint": submission.entrypoint,
            "entrypoint_num_cpus": submission.cpus,  # above zero: the runner does not sit on the head
            "runtime_env": {"env_vars": dict(submission.environment)},
        }
        try:
            self._call("POST", "/api/jobs/", body)
        except RayUnreachable:
            if self.status(submission.id) is None:  # a name that is taken is a server error too
                raise

    def status(self, submission: str) -> str | None:
        """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED; None for one that Ray does not know."""
        answer = self._call("GET", f"/api/jobs/{submission}", missing=True)
        return None if answer is None else str(answer["status"])

    def stop(self, submission: str) -> None:
        """Ask Ray to end a runner with all that it has started; nothing where there is none."""
        self._call("POST", f"/api/jobs/{submission}/stop", missing=True)

    def logs(self, submission: str) -> str:
        """What a runner wrote, where Ray still knows it."""
        answer = self._call("GET", f"/api/jobs/{submission}/logs", missing=True)
        return "" if answer is None else str(answer.get("logs", ""))

    def nodes(self) -> list[Needs]:
        """What each living node offers in all."""
        answer = self._call("GET", "/api/v0/nodes?detail=1&limit=10000")
        found = answer["data"]["result"]["result"] if answer else []
        totals = [node["resources_total"] for node in found if node["state"] == "ALIVE"]
        return [Needs(n.get("CPU", 0.0), n.get("GPU", 0.0), int(n.get("memory", 0))) for n in totals]

    def _call(self, method: str, path: str, body: object = None, *, missing: bool = False) -> dict[str, Any] | None:
        try:
            response = self._http.request(method, path, json=body)
            if missing and response.status_code == httpx2.codes.NOT_FOUND:
                return None
            response.raise_for_status()
            content: dict[str, Any] = response.json()
        except (httpx2.HTTPError, ValueError) as error:
            raise RayUnreachable(str(error)) from error
        return content

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._http.close()


def connect(settings: Settings) -> RayJobs:
    """The cluster of the settings; nothing is asked of it yet."""
    return RayJobs(settings.ray_url, settings.ray_token.get_secret_value() if settings.ray_token else None)

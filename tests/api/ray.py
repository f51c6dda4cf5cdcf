"""Ray's REST API for tests, behind the real client: remembers submissions, ends them when a test says so."""

import json
import shlex
from collections.abc import Callable
from typing import Any

import httpx2

from api.ray_jobs import RayJobs
from workers.runner import arguments_of


class ScriptedRay:
    """What Ray would answer. `down` makes it unreachable; `statuses` are changed by the test."""

    def __init__(self) -> None:
        self.statuses: dict[str, str] = {}
        self.entrypoints: dict[str, str] = {}
        self.stopped: list[str] = []
        self.down = False
        self.submit_fails = 0
        self.nodes = [{"state": "ALIVE", "resources_total": {"CPU": 8.0, "memory": 64e9}}]

    def client(self) -> RayJobs:
        return RayJobs("http://ray.test", "token", httpx2.MockTransport(self._answer))

    def claim(self, submission: str) -> str:
        """The code with which the runner of a submission would claim its attempt."""
        words = shlex.split(self.entrypoints[submission])
        claim: str = arguments_of(words[words.index("workers.runner") + 1 :]).claim
        return claim

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        if self.down:
            raise httpx2.ConnectError("no route to Ray")
        assert request.headers["Authorization"] == "Bearer token"
        path = request.url.path
        if path == "/api/v0/nodes":
            return httpx2.Response(200, json={"data": {"result": {"result": self.nodes}}})
        if path == "/api/jobs/":
            return self._submit(json.loads(request.content))
        name, _, action = path.removeprefix("/api/jobs/").partition("/")
        if name not in self.statuses:
            return httpx2.Response(404, text=f"Job {name} does not exist")
        actions: dict[str, Callable[[str], Any]] = {"": self._show, "stop": self._stop, "logs": self._logs}
        return httpx2.Response(200, json=actions[action](name))

    def _submit(self, body: dict[str, Any]) -> httpx2.Response:
        name = body["submission_id"]
        if self.submit_fails or name in self.statuses:
            self.submit_fails = max(0, self.submit_fails - 1)
            return httpx2.Response(500, text="Traceback (most recent call last): ...")
        assert body["entrypoint_num_cpus"] > 0
        self.statuses[name], self.entrypoints[name] = "RUNNING", body["entrypoint"]
        return httpx2.Response(200, json={"submission_id": name})

    def _show(self, name: str) -> dict[str, str]:
        return {"status": self.statuses[name]}

    def _stop(self, name: str) -> dict[str, bool]:
        self.stopped.append(name)
        self.statuses[name] = "STOPPED"
        return {"stopped": True}

    def _logs(self, name: str) -> dict[str, str]:
        return {"logs": f"what {name} wrote\nand died of"}

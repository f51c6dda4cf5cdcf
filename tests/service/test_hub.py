"""Jobs that read private models from the Hub and push their results there, with a token of their own.

One real server with a real Ray, and a Hub-compatible server beside it. The service has a token of its own in its
environment, which opens everything and which no job may use.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import numpy as np
import psutil
import pytest
import yaml

from merger.staging import JOBS
from tests.checkpoints import write_model
from tests.hub_server.fixtures import hub as running_hub
from tests.hub_server.server import Mode
from tests.service.processes import KEY, Service, lives, until

pytestmark = pytest.mark.slow

TOKEN = "hf_SubmitterAbC0123456789"  # of `me`, who is in `team`
READER = "hf_ReaderAbC0123456789"  # of somebody in `team` who may write nothing
SERVICE = "hf_ServiceAbC0123456789"  # the service's own: it may read and write everything here
PARENTS = ["team/one", "team/two"]
SHARDS = 6
HELD = 90.0  # seconds that a request is held: longer than any test waits for what follows


class World:
    """A Hub with two private parents, and a service."""

    def __init__(self, folder: Path, hub: Any, mode: Mode) -> None:
        self.folder, self.hub = folder, hub
        hub.add_token(TOKEN, "me", orgs=("team",))
        hub.add_token(READER, "reader", orgs=("team",), role="read")
        hub.add_token(SERVICE, "operator", orgs=("team", "me"))
        for seed, name in enumerate(PARENTS):
            hub.add_model(name, _parent(folder / "parents" / name, seed), private=True)
        self.variables = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(folder / "hf_home"),
            "HF_TOKEN": SERVICE,
            "HF_HUB_DISABLE_XET": "1" if mode == "lfs" else "0",
        }
        self.confirmed: set[str] = set()  # what a test saw land before it killed something
        self._storage = _storage_port(hub)
        own = {"MERGER_TASK_CPUS": "0.6", "MERGER_TASK_MEMORY": str(64 << 20)}
        self.service = Service(folder, **own, **self.variables)

    def start(self) -> None:
        """Start the service, and give it two tokens to keep."""
        self.service.start()
        for name, value in {"mine": TOKEN, "reader": READER}.items():
            self.service.http.put(f"/v1/secrets/{name}", json={"value": value}).raise_for_status()

    def submit(self, name: str, shards: int = SHARDS, **output: Any) -> str:
        return self.service.submit(recipe(name, shards, **output), secrets={"hub_token": "mine"})

    def refused(self, content: dict[str, Any], secret: str | None = None) -> dict[str, Any]:
        body = {"recipe": content, "secrets": {"hub_token": secret} if secret else {}}
        answer = self.service.http.post("/v1/jobs", json=body)
        assert answer.status_code == 422, answer.text
        problem: dict[str, Any] = answer.json()
        return problem

    def run(self, name: str, shards: int = SHARDS) -> dict[str, bytes]:
        """The weights that `merger run` makes of a recipe on this machine."""
        content = recipe(name, shards, path=f"alone-{name}")
        del content["output"]["push"]
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
        command = [sys.executable, "-m", "merger", "run", f"{name}.yaml"]
        alone = {"HF_TOKEN": TOKEN, "HF_HOME": str(self.folder / "alone_hf_home")}
        subprocess.run(command, cwd=self.folder, env={**os.environ, **self.variables, **alone}, check=True)
        return weights(self.folder / f"alone-{name}")

    # What happened on the Hub.

    def pushed(self, name: str) -> dict[str, bytes]:
        """The weights in a repository."""
        names = [path for path in self.hub.files(f"me/{name}") if path.startswith("model")]
        return {path: self.hub.content(f"me/{name}", path) for path in names}

    def commits(self, name: str) -> int:
        """How many commits somebody made in a repository, beside the one that it began with."""
        repository = f"me/{name}"
        return len(self.hub.commits(repository)) - 1 if repository in self.hub.repos() else 0

    def puts(self) -> Counter[str]:
        """How often each content was sent and taken, apart from what was held back."""
        return Counter(entry.path for entry in self.hub.log("cdn", "PUT") if not entry.fault)

    def have_landed(self, count: int) -> bool:
        """Whether so many uploads were confirmed, and no other is half done but those that are held back."""
        sent = self.puts()
        if not count <= len(sent) == len(self.hub.log("api", "POST", "/objects/verify")):
            return False
        self.confirmed = set(sent)
        return True

    def uploading(self) -> list[psutil.Process]:
        """The processes of tasks that are connected to where uploads go."""
        return [one for one in self.service.processes("write_shard") if self._is_connected(one)]

    def _is_connected(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            return any(c.raddr and c.raddr.port == self._storage for c in process.net_connections("tcp"))
        return False


def _storage_port(hub: Any) -> int | None:
    """Where large files are sent to and come from."""
    url = f"{hub.endpoint}/team/one/resolve/main/model-00001-of-00003.safetensors"
    answer = httpx2.head(url, headers={"Authorization": f"Bearer {TOKEN}"})
    return urlsplit(answer.headers["location"]).port


def _parent(folder: Path, seed: int) -> Path:
    """A model in three files."""
    random = np.random.default_rng(seed)
    tensors = {
        f"model.layers.{i}.mlp.up_proj.weight": (
            "BF16",
            (512, 1024),
            random.integers(0x3C00, 0x3F80, (512, 1024), np.uint16).tobytes(),
        )
        for i in range(SHARDS)
    }
    card = "---\nlicense: apache-2.0\n---\nA parent.\n"
    return write_model(folder, tensors, shards=3, side_files={"README.md": card})


def recipe(name: str, shards: int = SHARDS, **output: Any) -> dict[str, Any]:
    """The average of the parents, to be pushed."""
    size = f"{SHARDS // shards}MiB"
    sources = [f"hf://{parent}" for parent in PARENTS]
    return {
        "method": "average",
        "checkpoints": sources,
        "output": {"push": f"hf://me/{name}", "shard_size": size, **output},
    }


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("model*")}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    yield from started(tmp_path_factory.mktemp("hub"), "lfs")


@pytest.fixture
def over_xet(tmp_path: Path) -> Iterator[World]:
    """A world of its own, whose Hub keeps large files in Xet storage."""
    yield from started(tmp_path, "xet")


def started(folder: Path, mode: Mode) -> Iterator[World]:
    with running_hub(folder, mode, process=True) as hub:
        world = World(folder, hub, mode)
        try:
            world.start()
            yield world
        finally:
            world.service.stop()


@pytest.fixture
def world(running: World) -> Iterator[World]:
    """The running world, its Hub without faults and with an empty list of requests."""
    running.hub.faults.clear()
    running.hub.clear_log()
    running.confirmed = set()
    yield running
    running.hub.faults.clear()
    assert running.hub.violations() == []


@pytest.fixture(scope="module")
def expected(running: World) -> dict[str, bytes]:
    """What the average of the parents is, in six files."""
    return running.run("expected")


def succeeded(world: World, job: str, name: str, expected: dict[str, bytes], attempts: int = 1) -> dict[str, Any]:
    """The job, which succeeds: one commit, the right bytes, nothing sent twice and nothing left."""
    found = world.service.ended(job)
    logs = world.service.http.get(f"/v1/jobs/{job}/logs").text
    assert found["state"] == "succeeded", (found["error"], logs)
    assert len(found["attempts"]) == attempts, logs
    assert world.commits(name) == 1
    assert world.pushed(name) == expected
    head = world.hub.commits(f"me/{name}")[0]["oid"]
    assert found["result"]["published"] == f"{world.hub.endpoint}/me/{name}/commit/{head}"
    assert [file["name"] for file in found["result"]["files"]] == sorted(n for n in expected if "index" not in n)
    again = {path for path, count in world.puts().items() if count > 1}
    assert not again & world.confirmed, "what had landed was sent again"
    assert not again or attempts > 1
    nothing_left(world)
    return found


def nothing_left(world: World) -> None:
    assert [path.name for path in world.folder.iterdir() if path.name.startswith((JOBS, ".pushed"))] == []


def held_uploads(world: World, after: int) -> list[psutil.Process]:
    """The processes whose uploads are held back, once so many have landed."""
    return until(lambda: world.have_landed(after) and world.uploading(), 180, 0.1)


# ---- what a job does ----------------------------------------------------------------------------------


def merger(world: World, *arguments: str, said: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command as somebody who has a key of the service and no token of the Hub."""
    environment = {**os.environ, "MERGER_SERVER": world.service.url, "MERGER_API_KEY": KEY}
    command = [sys.executable, "-m", "merger", *arguments]
    common = {"cwd": world.folder, "env": environment, "capture_output": True, "text": True, "timeout": 120}
    return subprocess.run(command, input=said, check=False, **common)


def test_a_job_reads_private_models_and_pushes_in_one_commit(world: World, expected: dict[str, bytes]) -> None:
    assert merger(world, "secret", "set", "given", said=f"{TOKEN}\n").returncode == 0
    (world.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe("result")))
    done = merger(world, "submit", "recipe.yaml", "--hub-token-secret", "given", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    [job] = [one["id"] for one in world.service.http.get("/v1/jobs").json()["jobs"] if "result" in str(one["recipe"])]
    found = succeeded(world, job, "result", expected)
    assert found["result"]["published"] in done.stdout, "the address is shown at the end"
    assert {"merger.json", "README.md", "report.html"} <= set(world.hub.files("me/result"))
    assert "team/one" in world.hub.content("me/result", "README.md").decode()


def test_a_job_pushes_and_keeps_a_folder_and_tasks_ask_for_no_address_again(
    world: World, expected: dict[str, bytes]
) -> None:
    job = world.submit("both", path="both")
    world.hub.clear_log()  # of the service's look at the headers
    succeeded(world, job, "both", expected)
    for path, digest in world.hub.files("me/both").items():
        assert path == ".gitattributes" or sha256(world.folder / "both" / path) == digest, path
    assert weights(world.folder / "both") == expected
    assert not (world.folder / "both" / ".merger").exists()
    heads = Counter(entry.path for entry in world.hub.log("api", "HEAD", r"/resolve/.*\.safetensors$"))
    assert sorted(heads.values()) == [1] * 6, "one for each file of the parents, from the runner"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- what is refused ----------------------------------------------------------------------------------


def test_without_a_secret_private_models_stay_private_though_the_service_could_read_them(world: World) -> None:
    problem = world.refused(recipe("refused"))
    assert problem["detail"].startswith("hf://team/one: is not on the Hub, or is private")
    assert "--hub-token-secret" in problem["remedy"]
    assert problem["errors"][0]["pointer"] == "/recipe/checkpoints/0"
    assert {entry.token for entry in world.hub.log()} == {None}
    assert "me/refused" not in world.hub.repos()


def test_a_target_that_the_token_may_not_write_to_is_refused_before_anything_moves(world: World) -> None:
    world.hub.write("team/empty", {"README.md": b"To be filled."})
    for target, secret in [("me/x", "reader"), ("reader/x", "reader"), ("team/empty", "reader"), ("nobody/x", "mine")]:
        content = recipe("x")
        content["output"]["push"] = f"hf://{target}"
        problem = world.refused(content, secret)
        assert problem["detail"].startswith(f"hf://{target}: "), problem
        assert "may" in problem["detail"]
        assert problem["errors"][0]["pointer"] == "/recipe/output/push"
    assert {entry.method for entry in world.hub.log()} <= {"GET", "HEAD"}
    assert not {"me/x", "reader/x", "nobody/x"} & {*world.hub.repos()}


def test_a_target_that_holds_something_else_is_refused(world: World) -> None:
    world.hub.write("me/taken", {"model.safetensors": b"somebody's"})
    assert "holds something else: model.safetensors" in world.refused(recipe("taken"), "mine")["detail"]


# ---- what dies ----------------------------------------------------------------------------------------


def test_the_runner_is_killed_while_shards_are_uploaded(world: World, expected: dict[str, bytes]) -> None:
    world.hub.faults.add(origin="cdn", method="PUT", nth=range(3, 99), delay=HELD)
    job = world.submit("runner-killed")
    held = held_uploads(world, after=2)
    assert held, "uploads come from the tasks"
    for process in world.service.processes("workers.runner"):
        process.kill()
    world.hub.faults.clear()
    succeeded(world, job, "runner-killed", expected, attempts=2)
    until(lambda: not any(map(lives, held)))


def test_a_task_is_killed_while_it_uploads(world: World, expected: dict[str, bytes]) -> None:
    world.hub.faults.add(origin="cdn", method="PUT", nth=2, delay=HELD)
    job = world.submit("task-killed")
    [held] = held_uploads(world, after=SHARDS - 1)  # of the others nobody is at work any more
    held.kill()
    succeeded(world, job, "task-killed", expected)


def test_runners_are_killed_before_they_can_tell_of_their_commits(world: World, expected: dict[str, bytes]) -> None:
    world.hub.faults.add(origin="api", method="POST", path="/commit/", rate=0.5)  # the answer takes minutes
    jobs = {"unsaid": world.submit("unsaid"), "unsaid-kept": world.submit("unsaid-kept", path="kept")}
    until(lambda: all(map(world.commits, jobs)), 180, 0.1)
    for process in world.service.processes("workers.runner"):
        process.kill()
    world.hub.faults.clear()
    for job in jobs.values():
        world.service.ended(job)
    for name, job in jobs.items():
        succeeded(world, job, name, expected, attempts=2)
        assert len(world.hub.log("api", "POST", f"me/{name}/commit/")) == 1
    assert weights(world.folder / "kept") == expected


def test_cancel_while_shards_are_uploaded_leaves_nothing(world: World) -> None:
    world.hub.faults.add(origin="cdn", method="PUT", nth=range(2, 99), delay=HELD)
    job = world.submit("canceled")
    held_uploads(world, after=1)
    assert world.service.http.post(f"/v1/jobs/{job}:cancel").status_code == 200
    assert world.service.ended(job)["state"] == "canceled"
    until(lambda: not world.service.processes("workers.runner") and not world.service.processes("write_shard"))
    assert world.commits("canceled") == 0
    nothing_left(world)


# ---- orphans ------------------------------------------------------------------------------------------


class Orphans:
    """The processes of an attempt, stopped together with what Ray would end them with."""

    def __init__(self, world: World) -> None:
        self.processes = [*world.service.processes("workers.runner"), *world.service.processes("write_shard")]
        self._supervisors = world.service.processes("JobSupervisor")
        assert self.processes
        assert self._supervisors
        for process in [*self.processes, *self._supervisors]:
            process.suspend()

    def go_on(self) -> None:
        """Let them find out by themselves that they no longer count."""
        assert all(map(lives, self.processes))
        for process in self.processes:
            process.resume()
        until(lambda: not any(map(lives, self.processes)))
        for process in self._supervisors:
            with contextlib.suppress(psutil.Error):
                process.resume()


def test_an_orphan_that_was_uploading_makes_no_second_commit(world: World) -> None:
    expected = world.run("orphan", shards=3)
    world.hub.faults.add(origin="cdn", method="PUT", nth=range(2, 99), delay=HELD)
    job = world.submit("orphan", shards=3)
    held_uploads(world, after=1)
    orphans = Orphans(world)
    world.hub.faults.clear()
    succeeded(world, job, "orphan", expected, attempts=2)
    orphans.go_on()
    assert world.commits("orphan") == 1
    nothing_left(world)


def test_a_commit_of_an_orphan_that_arrives_late_is_no_second_one(world: World, expected: dict[str, bytes]) -> None:
    world.hub.faults.add(origin="api", method="POST", path="/commit/", nth=1, delay=40)
    job = world.submit("late")
    until(lambda: "publishing" in [event["kind"] for event in world.service.events(job)], 180, 0.1)
    orphans = Orphans(world)
    succeeded(world, job, "late", expected, attempts=2)
    late = until(lambda: [entry for entry in world.hub.log("api", "POST", "/commit/") if entry.fault])
    assert [entry.status for entry in late] == [412]
    orphans.go_on()
    assert world.commits("late") == 1
    nothing_left(world)


# ---- the token ----------------------------------------------------------------------------------------


def test_nothing_that_a_job_leaves_behind_knows_its_token(world: World, expected: dict[str, bytes]) -> None:
    world.hub.faults.add(origin="cdn", method="PUT", nth=range(2, 99), delay=HELD)
    job = world.submit("secretive")
    held_uploads(world, after=1)
    running = [process for process in psutil.process_iter() if belongs(process, world)]
    told = [text for process in running for text in (*process.cmdline(), *process.environ().values())]
    world.hub.faults.clear()
    for process in world.service.processes("workers.runner"):
        process.kill()
    succeeded(world, job, "secretive", expected, attempts=2)
    assert [text for text in told if TOKEN in text] == [], "in a command line or an environment"
    search(world)
    used = {(entry.origin, entry.token) for entry in world.hub.log()}
    assert used == {("api", TOKEN), ("cdn", None)}, "at the API, and neither at the storage nor the service's own"


def test_over_xet_it_is_the_same(over_xet: World) -> None:
    job = over_xet.submit("result")
    succeeded(over_xet, job, "result", over_xet.run("expected"))
    search(over_xet)
    assert not over_xet.hub.log("cdn", "PUT")
    assert over_xet.hub.log("cas", "POST", "/xorbs/")
    assert over_xet.hub.violations() == []
    assert {entry.token for entry in over_xet.hub.log("api")} == {TOKEN}
    assert not {TOKEN, SERVICE} & {entry.token for origin in ("cdn", "cas") for entry in over_xet.hub.log(origin)}


def search(world: World) -> None:
    """The token is in nothing that the API tells, and in no file of the service, of Ray or of a cache."""
    jobs = world.service.http.get("/v1/jobs", params={"limit": 200}).json()["jobs"]
    paths = [f"/v1/jobs/{one['id']}{what}" for one in jobs for what in ("", "/events?limit=1000", "/logs")]
    told = [world.service.http.get(path).text for path in [*paths, "/v1/jobs", "/v1/secrets", "/metrics"]]
    assert [text for text in told if TOKEN in text] == []
    ray = Path(json.loads((world.folder / "data" / "ray.json").read_text())["folder"])
    left = [path for folder in (world.folder, ray) for path in folder.rglob("*") if path.is_file()]
    names = {path.name for path in left}
    runners = {f"job-driver-{one['id']}-1.log" for one in jobs}
    assert {"jobs.db", "serve.log", "ray.log", "raylet.out", "gcs_server.out", *runners} <= names
    assert [path for path in left if TOKEN.encode() in path.read_bytes()] == []


def belongs(process: psutil.Process, world: World) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.environ().get("HF_HOME") == world.variables["HF_HOME"]
    return False

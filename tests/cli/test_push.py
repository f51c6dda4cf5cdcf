"""`merger run` that pushes, as processes that are killed, raced and refused; by LFS and by Xet."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from merger.cli.terminal import Silent
from merger.recipe import make_document
from merger.run import Options, run
from tests.checkpoints import write_model
from tests.hub_server.fixtures import environment, hub
from tests.hub_server.process import HubProcess

OUTPUT = {"shard_size": 400_000, "push": "hf://me/x"}
RECIPE = {"method": "average", "checkpoints": ["org/a", "org/b"]}

# The command for a test that has no time: what fails is asked again at once.
HURRIED = """
import runpy, sys
from types import SimpleNamespace
from huggingface_hub.utils import _http
from merger.storage import patience
patience._LONGEST = 0.01
_http.time = SimpleNamespace(sleep=lambda seconds: None)
sys.argv = ["merger", *sys.argv[1:]]
runpy.run_module("merger", run_name="__main__")
"""


@dataclass
class Bench:
    """A server with two models, and the commands that are run against it."""

    server: HubProcess
    folder: Path
    variables: dict[str, str]
    local: Path  # the result's files

    def start(self, *arguments: str, recipe: str = "recipe.yaml", cache: str = "cache", **variables: str):
        command = [sys.executable, "-c", HURRIED, "run", recipe, *arguments]
        own = {**self.variables, "XDG_CACHE_HOME": str(self.folder / cache), **variables}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, env=own, stdout=pipe, stderr=pipe, text=True)

    def run(self, *arguments: str, **options: str) -> subprocess.CompletedProcess[str]:
        return ended(self.start(*arguments, **options))

    def recipe(self, name: str = "recipe.yaml", **more: object) -> None:
        output = {**OUTPUT, **{key: value for key, value in more.items() if key in ("branch", "accept_license")}}
        fields = {key: value for key, value in more.items() if key not in output}
        (self.folder / name).write_text(json.dumps({**RECIPE, **fields, "output": output}))

    def titles(self) -> list[str]:
        return [commit["title"].partition(" (")[0] for commit in self.server.commits("me/x")]

    def is_whole(self) -> bool:
        """Whether the repository holds the result, in one commit."""
        texts = ("README.md", "report.html", "merger.json")
        names = {path.name for path in self.local.iterdir()} - {"distances.png"}  # drawn of parents that are here
        assert self.server.files("me/x").keys() == {".gitattributes", *names}
        found = {name: self.server.content("me/x", name) for name in names.difference(texts)}
        assert found == {name: (self.local / name).read_bytes() for name in found}
        return self.titles() == ["Add average by merger", "initial commit"]

    def staged(self, cache: str = "cache") -> list[Path]:
        return list((self.folder / cache / "merger" / "staging").glob("*"))

    def wait_for(self, seen: Callable[[], bool], child: subprocess.Popen[str]) -> None:
        for _ in range(6000):
            if seen():
                return
            if child.poll() is not None:
                pytest.fail(f"it ended before: {child.communicate()}")
            time.sleep(0.01)
        pytest.fail("it did not come to that")


def ended(child: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    stdout, stderr = child.communicate(timeout=120)
    assert "Traceback" not in stderr, stderr
    return subprocess.CompletedProcess(child.args, child.returncode, stdout, stderr)


@pytest.fixture(scope="module")
def parents(tmp_path_factory) -> Path:
    """Two models of three shards, and their average of four in `local`."""
    folder = tmp_path_factory.mktemp("parents")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        tensors = {f"model.layers.{i}.weight": rng.standard_normal((100, 1000)).astype(np.float32) for i in range(4)}
        side_files = {"tokenizer.json": "{}", "README.md": "---\nlicense: mit\n---\n"}
        write_model(folder / name, tensors, {"model_type": "llama"}, shards=3, side_files=side_files)
    output = {"shard_size": OUTPUT["shard_size"], "path": str(folder / "local")}
    recipe = {**RECIPE, "checkpoints": [str(folder / "a"), str(folder / "b")], "output": output}
    run(make_document(recipe), Options(), Silent())
    (folder / "matplotlib").mkdir()
    return folder


@pytest.fixture
def bench(request, tmp_path, parents) -> Iterator[Bench]:
    mode = getattr(request, "param", "lfs")
    with hub(tmp_path, mode=mode, process=True) as server:
        for name in ("a", "b"):
            server.add_model(f"org/{name}", parents / name)
        hurry = {"HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms", "MPLCONFIGDIR": str(parents / "matplotlib")}
        one = Bench(server, tmp_path, environment(server, tmp_path, mode, **hurry), parents / "local")
        one.recipe()
        yield one


BOTH = pytest.mark.parametrize("bench", ["lfs", "xet"], indirect=True)
XET = pytest.mark.parametrize("bench", ["xet"], indirect=True)


# ---- the result ---------------------------------------------------------------------------------------


@XET
def test_by_xet_the_repository_holds_what_a_local_run_writes(bench):
    done = bench.run("--json")
    assert done.returncode == 0, done.stderr
    assert bench.is_whole()
    assert bench.staged() == []
    told = json.loads(done.stdout)
    assert (told["output"], told["published"].rpartition("/")[2]) == (None, bench.server.refs("me/x")["main"])
    assert not bench.server.violations()
    bench.server.clear_log()
    again = bench.run()
    assert f"published: {told['published']}" in again.stdout
    assert "holds this result already; nothing was written" in again.stdout
    assert {entry.method for entry in bench.server.log()} == {"GET", "HEAD"}


@pytest.mark.slow
@XET
@pytest.mark.parametrize("seed", range(3))
def test_by_xet_with_a_tenth_of_all_requests_going_wrong_there_is_one_whole_commit_or_none(bench, seed):
    kinds = ("500", "503", "429", "cut", "drop", "slow")
    for origin, more in (("api", ("after",)), ("cas", ()), ("cdn", ("403",))):
        bench.server.faults.random(rate=0.1, seed=seed, origin=origin, kinds=(*kinds, *more))
    done = bench.run()
    struck = [entry for entry in bench.server.log() if entry.fault]
    bench.server.faults.clear()
    assert struck
    if done.returncode:
        assert done.returncode == 1
        assert "failed" in done.stderr
        assert "me/x" not in bench.server.repos() or bench.titles() == ["initial commit"]
        assert bench.run().returncode == 0
    assert bench.is_whole()
    assert bench.staged() == []


# ---- killed -------------------------------------------------------------------------------------------


def answered(server: HubProcess, method: str, path: str) -> int:
    return len([entry for entry in server.log(method=method, path=path) if 200 <= entry.status < 300])


@dataclass(frozen=True)
class Moment:
    """Which request the server holds, and what it has answered by then; `{put}` and `{verify}` are the mode's own."""

    held: tuple[str, str, dict[str, object]]
    answered: tuple[tuple[str, str, int], ...]


LONG = {"delay": 600.0}
MOMENTS = {
    "two uploads have begun": Moment(("{m}", "{put}", LONG), (("POST", "preupload", 2), ("{g}", "{begin}", 2))),
    "one of two has landed": Moment(
        ("POST", "{verify}", {**LONG, "nth": 2}), (("{m}", "{put}", 2), ("POST", "{verify}", 1))
    ),
    "two have landed": Moment(("POST", "preupload", {**LONG, "nth": [3, 4]}), (("POST", "{verify}", 2),)),
    "the commit was sent": Moment(
        ("POST", "/commit/", {"delay": 2.0, "times": 1}), (("POST", "validate-yaml", 1), ("POST", "{verify}", 5))
    ),
    "the commit was made": Moment(("POST", "/commit/", {"rate": 1.0, "times": 1}), (("POST", "/commit/", 1),)),
}
WORDS = {
    "lfs": {"m": "PUT", "put": "/uploads/", "verify": "objects/verify", "g": "POST", "begin": "objects/batch"},
    "xet": {"m": "POST", "put": "/v1/xorbs/", "verify": "/v1/shards", "g": "GET", "begin": "xet-write-token"},
}


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_killed_while_it_uploads_goes_on(bench, request, moment):
    words = WORDS[request.node.callspec.params["bench"]]
    (method, path, fault), expected = MOMENTS[moment].held, MOMENTS[moment].answered
    bench.server.faults.add(method=method.format(**words), path=path.format(**words), **fault)
    child = bench.start()

    def seen() -> bool:
        return all(answered(bench.server, m.format(**words), p.format(**words)) >= count for m, p, count in expected)

    bench.wait_for(seen, child)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    landed = answered(bench.server, "POST", words["verify"])
    first = sent(bench.server, words)
    bench.server.faults.clear()
    bench.server.clear_log()
    done = bench.run()
    assert done.returncode == 0, done.stderr
    assert bench.is_whole()
    assert bench.staged() == []
    again = first & sent(bench.server, words)
    assert len(again) <= len(first) - landed, "what had landed was sent again"


def sent(server: HubProcess, words: dict[str, str]) -> set[str]:
    """The names of the contents whose upload was answered."""
    entries = server.log(method=words["m"], path=words["put"])
    return {entry.path.rpartition("/")[2] for entry in entries if entry.status == 200}


# ---- several at once ----------------------------------------------------------------------------------


def held_before_their_commits(
    bench: Bench, *starts: Callable[[], subprocess.Popen[str]]
) -> list[subprocess.Popen[str]]:
    """Start processes one after the other, each stopped when it has seen that the repository has room and is about to
    commit, and let all go on at once.
    """
    bench.server.faults.add(method="POST", path="validate-yaml", delay=5.0)
    children = []
    for start in starts:
        bench.server.clear_log()
        children.append(start())
        bench.wait_for(lambda: answered(bench.server, "GET", "models/me/x/tree") == 1, children[-1])
        children[-1].send_signal(signal.SIGSTOP)
    for child in children:
        child.send_signal(signal.SIGCONT)
    return children


@pytest.mark.slow
@BOTH
def test_of_two_recipes_at_once_one_wins_and_the_other_says_who_was_first(bench):
    bench.recipe("other.yaml", weights=[1, 3])
    bench.server.write("me/x", {"README.md": b"soon"})
    starts = [bench.start, lambda: bench.start(recipe="other.yaml")]
    done = [ended(child) for child in held_before_their_commits(bench, *starts)]
    assert sorted(one.returncode for one in done) == [0, 2], [one.stderr for one in done]
    assert bench.titles() == ["Add average by merger", "Write", "initial commit"]
    assert Counter(entry.status for entry in bench.server.log(path="/commit/main")) == {200: 1, 412: 1}
    loser = next(one for one in done if one.returncode)
    for words in (
        "hf://me/x: holds something else",
        "last commit by me at 20",
        "Add average by merger",
        "output.branch",
    ):
        assert words in loser.stderr


@pytest.mark.slow
def test_one_recipe_twice_at_once_on_two_machines_is_one_commit_and_both_succeed(bench):
    bench.server.write("me/x", {"README.md": b"soon"})
    starts = [lambda: bench.start(cache="one"), lambda: bench.start(cache="two")]
    done = [ended(child) for child in held_before_their_commits(bench, *starts)]
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    assert bench.titles() == ["Add average by merger", "Write", "initial commit"]
    assert len({line for one in done for line in one.stdout.splitlines() if line.startswith("published")}) == 1
    assert bench.staged("one") == bench.staged("two") == []


@pytest.mark.slow
def test_one_recipe_twice_at_once_on_one_machine_the_second_is_told_to_wait(bench):
    bench.server.faults.add(method="PUT", path="/uploads/", delay=10.0, times=1)
    first = bench.start()
    bench.wait_for(lambda: answered(bench.server, "POST", "objects/batch") >= 1, first)
    first.send_signal(signal.SIGSTOP)
    second = bench.run()
    first.send_signal(signal.SIGCONT)
    assert (second.returncode, "is being written by another run" in second.stderr) == (2, True)
    assert ended(first).returncode == 0
    assert bench.is_whole()
    assert bench.run().returncode == 0
    assert bench.titles() == ["Add average by merger", "initial commit"]


# ---- tokens -------------------------------------------------------------------------------------------

SECRET = "hf_SecretOfThisTest"


def left_behind(folder: Path) -> list[Path]:
    """The files with the token's text in their content or name, but for the one that a person has put it into."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "login")
    return [path for path in files if SECRET in path.name or SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("given", "ends", "bench"),
    [
        ("option", "done", "xet"),
        ("variable", "refused", "lfs"),
        ("login", "failed", "lfs"),
        ("login", "forbidden", "lfs"),
    ],
    indirect=["bench"],
)
def test_the_token_is_nowhere_after_a_run_and_only_the_hub_has_seen_it(bench, given, ends, bench_token):
    server, arguments, variables = bench.server, ["-o", "out"], {"HF_TOKEN": ""}
    if given == "option":
        arguments += ["--token", SECRET]
    elif given == "variable":
        variables["HF_TOKEN"] = SECRET
    else:
        (bench.folder / "login").write_text(SECRET)
        variables["HF_TOKEN_PATH"] = str(bench.folder / "login")
    if ends == "refused":
        server.write("me/x", {"notes.txt": b"mine"})
    elif ends == "failed":
        server.faults.add(method="POST", path="/commit/", status=503)
    elif ends == "forbidden":
        server.faults.add(method="POST", path="repos/create", status=403)
    server.clear_log()
    done = bench.run(*arguments, **variables)
    assert done.returncode == {"done": 0, "failed": 1}.get(ends, 2), done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert left_behind(bench.folder) == []
    assert not server.violations()
    seen = {entry.origin for entry in server.log() if entry.token == SECRET}
    assert seen == {"api"}
    assert {entry.token for entry in server.log("cdn")} <= {None}
    if ends == "done":
        assert (bench.folder / "out" / "merger.json").exists()


@pytest.fixture
def bench_token(bench) -> None:
    """The server knows the secret token, and no other of this user."""
    bench.server.add_token(SECRET, "me")


def test_a_token_that_may_only_read_is_refused_with_one_message(bench):
    bench.server.add_token(SECRET, "me", role="read")
    done = bench.run("--token", SECRET)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    for words in ("hf://me/x: the token of me may only read", "--token or HF_TOKEN"):
        assert words in done.stderr
    assert "me/x" not in bench.server.repos()
    assert bench.staged() == []

"""The hook that empties a node: what it says where there is none, or where Ray refuses. Real nodes: tests/service."""

import subprocess
import sys

import psutil
import pytest

from tests.service.processes import until
from workers import drain


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "workers.drain", *words], check=False, capture_output=True, text=True)


@pytest.fixture
def node() -> psutil.Popen:
    """A process with the options of a raylet, whose cluster is not there."""
    program = "import time; time.sleep(600)"
    process = psutil.Popen([sys.executable, "-c", program, "--node_id=" + "ab" * 28, "--gcs-address=127.0.0.1:9"])
    until(lambda: "--gcs-address=127.0.0.1:9" in process.cmdline())
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("found", [[], [1, 2]])
def test_none_or_several_nodes_are_not_drained(
    monkeypatch: pytest.MonkeyPatch, found: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drain, "raylets", lambda: [psutil.Process() for _ in found])
    monkeypatch.setattr(sys, "argv", ["drain"])
    with pytest.raises(SystemExit, match=f"{len(found)} nodes run here"):
        drain.main()


def test_what_is_no_node_is_not_drained() -> None:
    with pytest.raises(drain.DrainRefused, match="is no node"):
        drain.drain(psutil.Process(), 5, lambda _: None)


def test_what_ray_refuses_is_told(node: psutil.Popen, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **more: real([sys.executable, "-c", "exit('no')"], **more))
    with pytest.raises(drain.DrainRefused, match="no"):
        drain.drain(node, 5, said.append)
    assert said == [], "nothing was promised"
    assert node.is_running()


def test_ray_is_told_which_node_and_until_when(node: psutil.Popen, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    real = subprocess.run

    def told(command: list[str], **more: object) -> object:
        commands.append(command)
        node.kill()  # as Ray ends a raylet that is empty
        return real([sys.executable, "-c", ""], **more)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", told)
    said: list[str] = []
    drain.drain(node, 20, said.append)
    [command] = commands
    options = dict(zip(command[4::2], command[5::2], strict=True))
    assert options["--address"] == "127.0.0.1:9"
    assert options["--node-id"] == "ab" * 28
    assert options["--deadline-remaining-seconds"] == "30"
    assert said == ["the node takes no more tasks; 0 runners on it", "the node is empty"]

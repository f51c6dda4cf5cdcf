"""The Dockerfile: what it says, and its very steps in a root folder of our own.

No engine for images is needed; what only an engine does (layers, an image's metadata, a registry) is not seen here.
"""

import fnmatch
import json
import re
import subprocess
import tomllib
from collections.abc import Iterator

import pytest
import yaml

from tests.helm import dockerfile
from tests.helm.chart import CHART
from tests.helm.dockerfile import Root, Stage, copied_root, made_root, stages_of

PROJECT = CHART.parent
TEXT = (PROJECT / "Dockerfile").read_text()
WRITABLE = ("/tmp", "/home/merger")


def _stages(**arguments: str) -> list[Stage]:
    return stages_of(TEXT, arguments)


def _steps(stage: Stage, name: str) -> list[str]:
    return [step.text for step in stage.steps if step.name == name]


# ---- what it says -------------------------------------------------------------------------------------


def test_nothing_runs_as_root() -> None:
    last = _stages()[-1]
    assert _steps(last, "USER") == ["1000:1000"]
    assert [step.name for step in last.steps].index("USER") > max(
        i for i, step in enumerate(last.steps) if step.name == "RUN"
    )


def test_every_stage_has_the_base_that_was_asked_for() -> None:
    assert {stage.base for stage in _stages()} == {"debian:bookworm-slim"}
    assert {stage.base for stage in _stages(BASE="registry.example.org/debian:12")} == {
        "registry.example.org/debian:12"
    }


def test_versions_are_those_of_the_project() -> None:
    build, last = _stages()
    [installed] = [text for text in _steps(build, "RUN") if "'.[" in text]
    assert "--constraint constraints.txt" in installed
    extras = re.search(r"'\.\[(.*)\]'", installed)
    assert extras
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert set(extras[1].split(",")) <= project["optional-dependencies"].keys()
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert f"VERSION={version}" in _steps(last, "ARG")


def test_the_builder_gets_what_is_copied_and_no_more() -> None:
    lines = (PROJECT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"  # below the comment: nothing goes, but
    let_through = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = {word for text in _steps(_stages()[0], "COPY") for word in text.split()[:-1]}
    assert copied == let_through
    assert all((PROJECT / name).exists() for name in copied)
    assert not fnmatch.filter(let_through, "*.env*")


def test_an_instruction_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="HEALTHCHECK is not known"):
        stages_of("FROM debian\nHEALTHCHECK CMD true\n", {})
    with pytest.raises(ValueError, match="before FROM"):
        stages_of("RUN true\n", {})


def test_lines_that_go_on_and_comments() -> None:
    [stage] = stages_of("ARG A=x\n# no\nFROM ${A} AS y\nRUN one && \\\n  two\n", {"A": "z"})
    assert (stage.base, stage.name, [step.text.split() for step in stage.steps]) == ("z", "y", [["one", "&&", "two"]])


# ---- what comes out -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Root]:
    """The root of the last stage, made by the Dockerfile's own steps on a new Debian."""
    missing = dockerfile.can_build()
    if missing:
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("image")
    index = dockerfile.index()
    first, last = _stages()
    suite = first.base.partition(":")[2].removesuffix("-slim")
    try:
        base = made_root(folder / "base", suite, index.folders)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no packages of Debian can be fetched: {error.stderr.decode()[-300:]}")
    roots = {name: copied_root(base, folder / name) for name in (first.name, last.name)}
    index.give(roots[first.name])
    # This machine's own packages serve for the index of torch's processor builds.
    arguments = {"TORCH_INDEX": "file:///build"} if index.folders else {}
    roots[first.name].take(first, PROJECT, arguments, {})
    roots[last.name].take(last, PROJECT, arguments, roots)
    yield roots[last.name]
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def _said(image: Root, *command: str) -> str:
    """What a command prints as the image's user, where only an emptyDir can be written to."""
    done = image.run(command, read_only=True, writable=WRITABLE, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_steps_make_a_root_in_which_everything_starts(image: Root) -> None:
    assert "uid=1000" in _said(image, "id")
    assert "Usage" in _said(image, "merger", "--help")
    for module in ("api.web", "api.dispatching", "api.store.migrate", "api.smoke", "workers.runner", "workers.drain"):
        assert "usage" in _said(image, "python", "-m", module, "--help").lower(), module
    ray = re.search(r"(?m)^ray==(.*)$", (PROJECT / "constraints.txt").read_text())
    assert ray
    assert ray[1] in _said(image, "ray", "--version")
    # As KubeRay starts it, and as it does where it is told to take a login shell.
    assert ray[1] in _said(image, "/bin/bash", "-lc", "--", "ray --version")


@pytest.mark.slow
def test_versions_are_the_constraints(image: Root) -> None:
    listing = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found = {_plain(name): version for name, version in json.loads(_said(image, "python", "-c", listing)).items()}
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    wanted = dict(line.split("==") for line in lines if "==" in line)
    wanted = {_plain(name): version for name, version in wanted.items()}
    # setuptools comes with the interpreter's venv.
    assert len(found) > 60
    assert found.keys() - wanted.keys() <= {"merger", "setuptools"}
    assert {n: v.partition("+")[0] for n, v in found.items() if n in wanted} == {
        n: wanted[n] for n in found if n in wanted
    }


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.slow
def test_a_model_is_made_with_a_read_only_root(image: Root) -> None:
    """Kernels are compiled in the home folder; nothing else is written to."""
    script = "; ".join(
        [
            "from merger import kernels",
            "import os, torch, transformers, obstore, cma, mergekit",
            "kernels.load()",
            "print(os.path.isdir('/tmp/kernels'))",
        ]
    )
    assert _said(image, "env", "NUMBA_CACHE_DIR=/tmp/kernels", "python", "-c", script).split() == ["True"]
    refused = image.run(["touch", "/opt/merger/x"], read_only=True, writable=WRITABLE)
    assert "Read-only file system" in refused.stderr


@pytest.mark.slow
def test_there_is_nothing_to_build_with(image: Root) -> None:
    assert image.run(["which", "gcc", "cc", "pip", "pip3", "git", "apt-key"]).stdout == ""
    assert not list((image.path / "opt/merger").rglob("site-packages/numpy/tests"))

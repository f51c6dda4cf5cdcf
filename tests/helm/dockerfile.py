"""Reads a Dockerfile, and takes its steps in a root folder of its own, where no engine runs.

Knows the instructions that ours uses and refuses others; knows nothing of what they build.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_TAKEN = {"ARG", "COPY", "ENV", "FROM", "RUN", "USER", "WORKDIR"}
_TOLD = {"CMD", "EXPOSE", "LABEL"}  # what an image says of itself


@dataclass(frozen=True)
class Step:
    """One instruction, `text` behind its name."""

    name: str
    text: str


@dataclass(frozen=True)
class Stage:
    """What one FROM begins; the arguments before the first FROM belong to all of them."""

    name: str
    base: str
    steps: tuple[Step, ...]


def stages_of(text: str, arguments: Mapping[str, str]) -> list[Stage]:
    """The stages of a Dockerfile, with build arguments. Raises ValueError for an instruction that is not known."""
    given: dict[str, str] = {}
    stages: list[Stage] = []
    for step in _steps(text):
        if step.name == "ARG" and not stages:
            name, _, default = step.text.partition("=")
            given[name] = arguments.get(name, default)
        elif step.name == "FROM":
            base, _, name = step.text.partition(" AS ")
            stages.append(Stage(name or str(len(stages)), _filled(base, given), ()))
        elif not stages:
            raise ValueError(f"{step.name} before FROM")
        else:
            last = stages.pop()
            stages.append(Stage(last.name, last.base, (*last.steps, step)))
    return stages


def _steps(text: str) -> list[Step]:
    lines = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", text)).splitlines()
    steps = [Step(*line.split(maxsplit=1)) for line in lines if line.strip()]
    for step in steps:
        if step.name not in _TAKEN | _TOLD:
            raise ValueError(f"{step.name} is not known")
    return steps


def _filled(text: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], text)


@dataclass
class Root:
    """A folder that is the file system of a stage, and what its steps have set so far."""

    path: Path
    mounts: Mapping[Path, bool] = field(default_factory=dict)  # folders of this machine; whether they may be written to
    environment: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "0:0"

    def take(self, stage: Stage, context: Path, arguments: Mapping[str, str], others: Mapping[str, "Root"]) -> None:
        """Take the steps of a stage. Raises CalledProcessError."""
        given: dict[str, str] = {}
        for step in stage.steps:
            if step.name == "ARG":
                name, _, default = step.text.partition("=")
                given[name] = arguments.get(name, default.strip('"'))
            elif step.name == "ENV":
                self.environment |= dict(word.split("=", 1) for word in shlex.split(step.text))
            elif step.name == "WORKDIR":
                self.folder = step.text
                (self.path / step.text.lstrip("/")).mkdir(parents=True, exist_ok=True)
            elif step.name == "USER":
                self.user = step.text
            elif step.name == "COPY":
                self._copy(step.text.split(), context, others)
            elif step.name == "RUN":
                self.run(["/bin/sh", "-e", "-c", step.text], more=given).check_returncode()

    def _copy(self, words: Sequence[str], context: Path, others: Mapping[str, "Root"]) -> None:
        origin = context
        if words[0].startswith("--from="):
            origin, words = others[words[0].removeprefix("--from=")].path, words[1:]
        *sources, target = words
        place = self.path / (Path(self.folder) / target).as_posix().lstrip("/")
        for source in sources:
            whole = origin / source.lstrip("/")
            to = place / Path(source).name if target.endswith("/") else place
            if whole.is_dir():
                ignore = shutil.ignore_patterns("__pycache__") if origin is context else None
                shutil.copytree(whole, to, symlinks=True, dirs_exist_ok=True, ignore=ignore)
            else:
                shutil.copy2(whole, to)

    def run(
        self,
        command: Sequence[str],
        *,
        more: Mapping[str, str] | None = None,
        read_only: bool = False,
        writable: Sequence[str] = (),
        timeout: float = 1800,
    ) -> subprocess.CompletedProcess[str]:
        """A command in the root, as the stage's user. With `read_only` only the folders `writable` can be written to,
        each an empty one in memory.
        """
        environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", **self.environment}
        words = [f"{name}={value}" for name, value in {**environment, **(more or {})}.items()]
        inside = ["/bin/sh", "-c", 'cd "$0" && exec "$@"', self.folder, *command]
        entered = ["chroot", f"--userspec={self.user}", str(self.path), "/usr/bin/env", "-i", *words, *inside]
        script = "\n".join([*self._mounting(read_only, writable), shlex.join(["exec", *entered])])
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "bash", "-e", "-c", script],
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def _mounting(self, read_only: bool, writable: Sequence[str]) -> list[str]:
        """Mounts that only this command sees, and that end with it."""
        root = shlex.quote(str(self.path))
        lines = [f"mount --bind {root} {root}"]
        for place, may_write in self.mounts.items():
            inside = shlex.quote(f"{self.path}{place}")
            lines += [f"mount --bind {shlex.quote(str(place))} {inside}"]
            lines += [] if may_write else [f"mount -o remount,bind,ro {inside}"]
        if read_only:
            lines.append(f"mount -o remount,bind,ro {root}")
        lines += [f"mount --rbind /dev {root}/dev", f"mount -t proc proc {root}/proc"]
        lines += [f"mount -t tmpfs -o mode=1777 tmpfs {root}{place}" for place in writable]
        return lines


def made_root(path: Path, suite: str, mounts: Sequence[Path]) -> Root:
    """A new Debian in a folder, which sees `mounts` of this machine and resolves names as it does."""
    subprocess.run(["debootstrap", "--variant=minbase", suite, str(path)], check=True, capture_output=True)
    return _opened(path, mounts)


def copied_root(root: Root, path: Path) -> Root:
    """The same once more, before any step."""
    subprocess.run(["cp", "--archive", "--reflink=auto", str(root.path), str(path)], check=True)
    return _opened(path, list(root.mounts))


def _opened(path: Path, mounts: Sequence[Path]) -> Root:
    shutil.copyfile("/etc/resolv.conf", path / "etc/resolv.conf")
    for place in mounts:
        (path / str(place).lstrip("/")).mkdir(parents=True, exist_ok=True)
    return Root(path, dict.fromkeys(mounts, False))


@dataclass(frozen=True)
class Index:
    """How this machine's pip finds packages: variables, the folders that they name, the certificates that it trusts."""

    variables: Mapping[str, str]
    folders: tuple[Path, ...]
    certificates: Path | None

    def give(self, root: Root) -> None:
        """Let pip in a root find them in the same way."""
        root.environment |= self.variables
        if self.certificates:
            shutil.copyfile(self.certificates, root.path / "certificates.crt")
            root.environment["PIP_CERT"] = "/certificates.crt"


def index() -> Index:
    """What this machine's pip is configured to use."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True)
    variables, folders, certificates = {}, set[Path](), None
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        name, value = key.rpartition(".")[2], value.strip("'\"").replace("\\n", " ")
        if name == "cert":
            certificates = Path(value)
        elif name in {"index-url", "extra-index-url", "find-links"}:
            variables[f"PIP_{name.replace('-', '_').upper()}"] = value
            # An index has its files beside it, where its pages lead to.
            folders |= {Path(word.removeprefix("file://").removesuffix("/simple")) for word in value.split()}
    there = sorted(folder for folder in folders if folder.is_absolute() and folder.is_dir())
    return Index(variables, tuple(there), certificates)


def can_build() -> str:
    """What is missing for roots to be made here; empty where nothing is."""
    if os.geteuid() != 0:
        return "making a root takes the rights of root"
    missing = [name for name in ("debootstrap", "unshare", "chroot") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} is not installed"
    tried = subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True)
    return "mounts of its own are not allowed here" if tried.returncode else ""

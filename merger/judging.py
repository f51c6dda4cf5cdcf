"""Scores of candidates, measured on this machine and remembered: an interrupted choice goes on from what it has.

Knows the process that measures (`merger.scoring`) and the folder of what was measured before; knows nothing of torch.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from merger import errors
from merger.errors import JobError, MergerError, NotInstalled
from merger.evaluation import Harness, Measured, Score
from merger.methods.method import Judge, Member, Method, Sources
from merger.plan import make_plan
from merger.reach import OWN, Reach
from merger.storage.disk import write_atomically

Tell = Callable[[str], None]
_EVERY = 2.0  # seconds between two words of progress


class Remembered:
    """Scores in a folder, a file each, by a digest of all that they depend on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> Score | None:
        try:
            return Score.of(json.loads((self._folder / f"{key}.json").read_text()))
        except (OSError, ValueError, KeyError, TypeError):
            return None  # not there, or not whole: it is measured again

    def put(self, key: str, score: Score) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._folder / f"{key}.json", json.dumps(asdict(score)).encode())


def own_memory() -> Remembered:
    """What this user has measured on this machine."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Remembered(Path(cache).expanduser() / "merger" / "scores")


def key_of(candidate: str | Method, evaluation: Measured, sources: Sources, along: Sequence[str | Method] = ()) -> str:
    """A digest of the model as it is, the evaluation with its data, and the versions of what measures; of the models
    along which slopes are wanted, too.

    Raises RequestError where the candidate cannot be made.
    """
    return key_from("".join(key_of_model(model, sources) for model in (candidate, *along)), evaluation)


def key_of_model(model: str | Method, sources: Sources) -> str:
    """A digest of a model as it is: its files with sizes and times, or its recipe with those of its sources."""
    recipe = {"reference": model} if isinstance(model, str) else model.model_dump(mode="json")
    return make_plan(sources.open(Member(model, None)), recipe, 1 << 62).fingerprint


def key_from(fingerprint: str, evaluation: Measured) -> str:
    """The same for a plan's fingerprint."""
    content = [fingerprint, evaluation.key(), *(version(name) for name in ("merger", "torch", "transformers"))]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()


def check_installed(evaluations: Iterable[Measured] = ()) -> None:
    """Raises NotInstalled where models cannot be measured or trained here, or not by one of the evaluations."""
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise NotInstalled("measuring or training a model needs torch and transformers, which are not installed")
    if any(isinstance(evaluation, Harness) for evaluation in evaluations) and find_spec("lm_eval") is None:
        raise NotInstalled("lm-evaluation-harness is not installed", remedy="pip install 'merger[harness]'")


class LocalJudge(Judge):
    """Measures one candidate after the other in a process of its own, which starts with the first."""

    def __init__(self, sources: Sources, memory: Remembered, tell: Tell, reach: Reach = OWN) -> None:
        self._sources, self._memory, self._tell = sources, memory, tell
        self._reach = reach
        self._process: subprocess.Popen[str] | None = None
        self._complaints: IO[str] | None = None

    def score(
        self,
        candidate: str | Method,
        evaluation: Measured,
        key: str | None = None,
        along: Sequence[str | Method] = (),
    ) -> Score:
        key_given = key is not None
        key = key or key_of(candidate, evaluation, self._sources, along)
        known = self._memory.get(key)
        if known is None:
            known = self._measure(candidate, evaluation, "the result" if key_given else _label(candidate), along)
            self._memory.put(key, known)
        return known

    def _measure(
        self, candidate: str | Method, evaluation: Measured, label: str, along: Sequence[str | Method]
    ) -> Score:
        self._tell(f"measuring {label}")
        request = {
            "source": _as_data(candidate),
            "along": [_as_data(model) for model in along],
            "evaluation": evaluation.model_dump(mode="json"),
            "reach": self._reach.as_data(),
        }
        answer = self._ask(request, label)
        if "error" in answer:
            raise error_of(answer["error"])
        return Score.of(answer["score"])

    def _ask(self, request: dict[str, Any], label: str) -> dict[str, Any]:
        process = self._started()
        assert process.stdin
        assert process.stdout
        try:
            print(json.dumps(request), file=process.stdin, flush=True)
        except BrokenPipeError:
            raise self._died() from None
        due = time.monotonic() + _EVERY
        for line in process.stdout:
            answer: dict[str, Any] = json.loads(line)
            if "done" not in answer:
                return answer
            if time.monotonic() >= due:
                self._tell(f"measuring {label}: {answer['done']:,} of {answer['total']:,}")
                due = time.monotonic() + _EVERY
        raise self._died()

    def _started(self) -> "subprocess.Popen[str]":
        if self._process is None:
            check_installed()
            self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the process)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "merger.scoring"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                text=True,
            )
        return self._process

    def _died(self) -> JobError:
        code = self.close()
        return JobError(f"the process that measures models has died: {self._last_words or f'exit code {code}'}")

    def close(self) -> int | None:
        """End the process; returns how it ended."""
        if self._process is None or self._complaints is None:
            return None
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        code = self._process.wait()
        self._complaints.seek(0)
        self._last_words = (self._complaints.read().strip().splitlines() or [""])[-1]
        self._complaints.close()
        self._process = self._complaints = None
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if kind is not None and self._process is not None:
            self._process.kill()  # whatever it measures, nobody waits for it
        self.close()


def _as_data(model: str | Method) -> Any:
    return model if isinstance(model, str) else model.model_dump(mode="json", by_alias=True)


def _label(candidate: str | Method) -> str:
    return candidate if isinstance(candidate, str) else f"a candidate ({candidate.method})"


def error_of(told: dict[str, str]) -> MergerError:
    kind = getattr(errors, told["kind"], JobError)
    error: MergerError = kind(told["message"], where=told["where"], remedy=told["remedy"])
    return error

"""The smoke test tests: it passes on what `merger run` makes, and fails on anything else, to the last bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from api import smoke
from api.settings import SAMPLES, Settings
from api.validation import roots_of, validate
from merger.cli.terminal import Silent
from merger.errors import MergerError, SourceError
from merger.recipe import make_document
from merger.run import Options, run
from tests.checkpoints import write_safetensors


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `merger run` makes of the smoke test's recipe."""
    folder = tmp_path_factory.mktemp("smoke") / "out"
    run(make_document(smoke.recipe({"path": str(folder)})), Options(), Silent())
    return folder


@pytest.fixture(scope="module")
def files(made: Path) -> list[dict[str, Any]]:
    """The files as a job tells of them."""
    shards = json.loads((made / "merger.json").read_text())["shards"]
    return [{"name": shard["file"], "size": shard["size"], "xxh3": shard["xxh3"]} for shard in shards]


def test_the_samples_differ_and_their_average_needs_rounding() -> None:
    first, second = (load_file(path / "model.safetensors") for path in smoke.samples())
    assert first.keys() == second.keys() == smoke.average().keys()
    exact = [(first[name].astype(np.float64) + second[name].astype(np.float64)) / 2 for name in first]
    assert any((value != value.astype(np.float32)).any() for value in exact)
    for name, value in zip(first, exact, strict=True):
        assert np.array_equal(smoke.average()[name], value.astype(np.float32))


def test_what_the_engine_makes_is_right(made: Path, files: list[dict[str, Any]]) -> None:
    smoke.check_bytes((made / "model.safetensors").read_bytes())
    smoke.check_checksum(files)


def changed(change: Callable[[dict[str, np.ndarray]], object], folder: Path) -> bytes:
    tensors = {name: value.copy() for name, value in smoke.average().items()}
    change(tensors)
    path = folder / "model.safetensors"
    write_safetensors(path, tensors)
    return path.read_bytes()


def one_bit(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"].view(np.uint32)[3] ^= 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (one_bit, "model.norm.weight is"),
        (lambda tensors: tensors.pop("model.norm.weight"), "the result has the tensors"),
        (lambda tensors: tensors.update(more=np.zeros(3, np.float32)), "the result has the tensors"),
        (lambda tensors: tensors.update({n: v.astype(np.float16) for n, v in tensors.items()}), "F16"),
        (lambda tensors: tensors.update({n: v.ravel() for n, v in tensors.items()}), "model.embed_tokens.weight is"),
    ],
)
def test_what_is_another_result_is_wrong(change: Callable[..., object], told: str, tmp_path: Path) -> None:
    with pytest.raises(smoke.Wrong, match=told):
        smoke.check_bytes(changed(change, tmp_path))


def test_a_source_is_not_its_average() -> None:
    with pytest.raises(smoke.Wrong):
        smoke.check_bytes((smoke.samples()[0] / "model.safetensors").read_bytes())


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 100, b"\x02" + bytes(7) + b"[]"])
def test_what_is_no_file_is_wrong(content: bytes) -> None:
    with pytest.raises(smoke.Wrong, match="is no file"):
        smoke.check_bytes(content)


@pytest.mark.parametrize("change", [{"xxh3": "0" * 32}, {"size": 1}, {"name": "other.safetensors"}])
def test_another_checksum_is_wrong(files: list[dict[str, Any]], change: dict[str, object]) -> None:
    [file] = files
    with pytest.raises(smoke.Wrong, match=r"not model\.safetensors with the checksum"):
        smoke.check_checksum([{**file, **change}])
    with pytest.raises(smoke.Wrong):
        smoke.check_checksum([])


# ---- over HTTP ----------------------------------------------------------------------------------------


class Scripted:
    """An API that answers as a test says; everything that it was asked."""

    def __init__(self, states: list[dict[str, object]], artifact: httpx2.Response, refused: int = 0) -> None:
        self.states, self.artifact, self.refused = states, artifact, refused
        self.asked: list[tuple[str, str]] = []
        self.bodies: list[dict[str, Any]] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.path
        self.asked.append((request.method, path))
        if self.refused:
            self.refused -= 1
            return httpx2.Response(503, text="not yet")
        if request.headers["Authorization"] != "Bearer mk_x":
            return httpx2.Response(401, text="unknown key")
        if path == "/v1/jobs:validate":
            self.bodies.append(json.loads(request.content))
            return httpx2.Response(200, json={"fingerprint": "f", "shards": 1, "bytes_written": 9, **self.states[0]})
        if "artifacts" in path:
            return self.artifact
        if path.endswith("/logs"):
            return httpx2.Response(200, text="what the runner said")
        if request.method == "POST" and path == "/v1/jobs":
            self.bodies.append(json.loads(request.content))
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return httpx2.Response(200, json={"id": "7", "output": "there", "waiting_for": "", "error": None, **state})


@pytest.fixture(autouse=True)
def client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGER_URL", "http://api.test")
    monkeypatch.setenv("MERGER_API_KEY", "mk_x")
    monkeypatch.setattr(smoke, "_PAUSE", 0.0)


def go(monkeypatch: pytest.MonkeyPatch, api: Scripted, *words: str) -> Result:
    client = httpx2.Client

    def scripted(**options: Any) -> httpx2.Client:
        return client(**{**options, "transport": httpx2.MockTransport(api)})

    monkeypatch.setattr("api.smoke.httpx2.Client", scripted)
    return CliRunner().invoke(smoke.main, words)


def test_it_passes_and_prints_what_it_saw(
    monkeypatch: pytest.MonkeyPatch, made: Path, files: list[dict[str, Any]]
) -> None:
    states: list[dict[str, object]] = [
        {"state": "queued", "waiting_for": "a node"},
        {"state": "running"},
        {"state": "succeeded", "result": {"files": files}},
    ]
    artifact = httpx2.Response(200, content=(made / "model.safetensors").read_bytes())
    api = Scripted(states, artifact, refused=2)
    done = go(monkeypatch, api, "--output", "/models/out")
    assert done.exit_code == 0, done.output
    for text in ("queued: a node", "running", "succeeded", files[0]["xxh3"], "bytes of the file are right", "works"):
        assert text in done.stdout
    [body] = api.bodies
    assert body["recipe"]["output"]["path"].startswith("/models/out/merger-smoke-")


@pytest.mark.parametrize("status", [200, 404, 500])
def test_the_file_of_the_result_counts_where_the_api_has_it(
    monkeypatch: pytest.MonkeyPatch, files: list[dict[str, Any]], tmp_path: Path, status: int
) -> None:
    artifact = httpx2.Response(status, content=changed(one_bit, tmp_path))
    done = go(monkeypatch, Scripted([{"state": "succeeded", "result": {"files": files}}], artifact))
    assert done.exit_code == (0 if status == 404 else 1)
    assert ("its bytes were not read again" in done.stdout) == (status == 404)


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"state": "failed", "error": {"message": "no disk"}}, "no disk"),
        ({"state": "canceled"}, "what the runner said"),
        ({"state": "succeeded", "result": {"files": []}}, "not model.safetensors"),
    ],
)
def test_it_fails_where_the_job_does(monkeypatch: pytest.MonkeyPatch, state: dict[str, object], told: str) -> None:
    done = go(monkeypatch, Scripted([state], httpx2.Response(404)))
    assert done.exit_code == 1
    assert told in done.stderr


def test_it_fails_and_cancels_where_a_job_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    api = Scripted([{"state": "queued"}], httpx2.Response(404))
    done = go(monkeypatch, api, "--seconds", "0")
    assert done.exit_code == 1
    assert "still queued" in done.stderr
    assert ("POST", "/v1/jobs/7:cancel") in api.asked


def test_it_fails_where_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    done = go(monkeypatch, Scripted([], httpx2.Response(404), refused=1000), "--seconds", "0")
    assert done.exit_code == 1
    assert "no answer; at last: 503 not yet" in done.stderr


def test_it_fails_with_a_wrong_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGER_API_KEY", "mk_other")
    done = go(monkeypatch, Scripted([], httpx2.Response(404)))
    assert done.exit_code == 1
    assert "401 unknown key" in done.stderr


@pytest.mark.parametrize("off", [0, 1])
def test_a_plan_alone_is_checked_and_nothing_is_submitted(monkeypatch: pytest.MonkeyPatch, off: int) -> None:
    parameters = sum(value.size for value in smoke.average().values()) + off
    api = Scripted([{"parameters": parameters}], httpx2.Response(404))
    done = go(monkeypatch, api, "--plan-only")
    assert done.exit_code == off
    assert ("only the plan was checked" in done.stdout) == (off == 0)
    assert api.asked == [("POST", "/v1/jobs:validate")]


@pytest.mark.parametrize(
    ("settings", "words", "key", "start"),
    [
        ({"MERGER_OUTPUT_ROOTS": "/a:/b", "MERGER_OBJECT_ROOTS": "s3://c/"}, (), "path", "/a/merger-smoke-"),
        ({"MERGER_OBJECT_ROOTS": "s3://c/d/"}, (), "push", "s3://c/d/merger-smoke-"),
        ({"MERGER_OUTPUT_ROOTS": "/a"}, ("--output", "s3://c/"), "push", "s3://c/merger-smoke-"),
        ({}, (), "path", "merger-smoke-"),
        (
            {"MERGER_OUTPUT_ROOTS": "/a", "MERGER_OBJECT_ROOTS": "s3://c/", "MERGER_SHARED_FOLDERS": "false"},
            (),
            "push",
            "s3://c/merger-smoke-",
        ),
    ],
)
def test_the_result_goes_below_a_root(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], words: tuple[str, ...], key: str, start: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    api = Scripted([{"state": "canceled"}], httpx2.Response(404))
    go(monkeypatch, api, *words)
    assert api.bodies[0]["recipe"]["output"][key].startswith(start)


# ---- what the service lets it read --------------------------------------------------------------------


def test_the_samples_may_be_read_beside_the_roots_and_nothing_else(tmp_path: Path) -> None:
    settings = Settings(source_roots=(tmp_path / "models",), output_roots=(tmp_path,), working_folder=tmp_path)
    assert validate(smoke.recipe({"path": "out"}), settings).plan["parameters"] == sum(
        value.size for value in smoke.average().values()
    )
    for foreign in (SAMPLES.parent, SAMPLES.parent / "smoke.py", SAMPLES / ".." / "store"):
        with pytest.raises(SourceError):
            roots_of(settings).admit(foreign, "x")
    assert Settings().readable_roots == (), "without roots everything may be read, as before"


# ---- a service whose results go to the Hub alone ------------------------------------------------------


@pytest.mark.parametrize(("detail", "code"), [("is a folder, and the machines share none", 0), ("too small", 1)])
def test_without_a_place_for_results_the_plan_is_checked(
    monkeypatch: pytest.MonkeyPatch, detail: str, code: int
) -> None:
    monkeypatch.setenv("MERGER_SHARED_FOLDERS", "false")
    monkeypatch.setenv("MERGER_OUTPUT_ROOTS", "/scratch")
    refusal = {"detail": detail, "errors": [{"pointer": "/recipe/output/path", "detail": detail}]}

    class Refusing(Scripted):
        def __call__(self, request: httpx2.Request) -> httpx2.Response:
            self.asked.append((request.method, request.url.path))
            return httpx2.Response(422, json=refusal)

    api = Refusing([], httpx2.Response(404))
    done = go(monkeypatch, api)
    assert done.exit_code == code
    assert ("only the plan was checked" in done.stdout) == (code == 0)
    assert api.asked == [("POST", "/v1/jobs:validate")]


def test_a_service_without_shared_folders_refuses_one_last_of_all(tmp_path: Path) -> None:
    settings = Settings(shared_folders=False, output_roots=(tmp_path,), working_folder=tmp_path)
    with pytest.raises(MergerError, match="share none"):
        validate(smoke.recipe({"path": "out"}), settings)
    with pytest.raises(MergerError) as raised:
        validate({**smoke.recipe({"path": "out"}), "checkpoints": [str(tmp_path / "none")]}, settings)
    assert "share none" not in str(raised.value), "what is wrong with the recipe comes first"

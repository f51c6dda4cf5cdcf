"""The verbs of a job service, and the whole service behind them, as a person uses them: real processes, real Ray."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from api import serve
from merger.cli.terminal import Silent
from merger.errors import RequestError
from merger.recipe import make_document
from merger.run import Options, run
from tests.service.processes import KEY, Service, free_port, recipe, write_run


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    write_run(folder / "run", shards=3, megabytes=1, checkpoints=3)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(Path("run"), "out", 1)))
    service = Service(folder)
    try:
        yield service.start()
    finally:
        service.stop()


def merger(
    service: Service, *arguments: str, key: str = KEY, server: str = "", said: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command; `said` goes to its standard input."""
    environment = {**os.environ, "MERGER_SERVER": server or service.url, "MERGER_API_KEY": key}
    command = [sys.executable, "-m", "merger", *arguments]
    common = {"cwd": service.folder, "env": environment, "capture_output": True, "text": True, "timeout": 120}
    return subprocess.run(command, input=said, check=False, **common)


def test_a_job_gives_the_bytes_of_merger_run(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    done = merger(service, "submit", "recipe.yaml", "--wait", "--set", "output.dtype=float32", "-o", "same/job")
    assert done.returncode == 0, done.stderr
    assert "succeeded" in done.stdout
    for line in ("planned: 3 shards", "finished model-00003-of-00003.safetensors", "publishing (attempt 1)"):
        assert line in done.stderr
    monkeypatch.chdir(service.folder)
    content = recipe(Path("run"), "same/run", 1)
    content["output"]["dtype"] = "float32"
    run(make_document(content), Options(), Silent())
    job, alone = service.folder / "same" / "job", service.folder / "same" / "run"
    names = {path.name for path in alone.iterdir()}
    assert {path.name for path in job.iterdir()} == names
    for name in names - {"report.html", "merger.json", "README.md", "distances.png"}:
        assert (job / name).read_bytes() == (alone / name).read_bytes(), name
    assert merger(service, "verify", "same/job").returncode == 0


MERGES = {
    "dare": {
        "merge_method": "dare_ties",
        "base_model": "<0>",
        "models": [{"model": f"<{i}>", "parameters": {"weight": 0.5, "density": 0.4}} for i in (1, 2)],
        "dtype": "bfloat16",
    },
    "ties": {"method": "ties", "base": "<0>", "models": ["<1>", "<2>"], "trim": "model"},
}


@pytest.mark.parametrize("name", list(MERGES))
def test_merges_as_jobs_give_the_same_bytes(service: Service, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What is drawn and what is measured does not depend on who makes which shard."""
    steps = sorted(path.name for path in (service.folder / "run").iterdir())
    text = json.dumps(MERGES[name])
    for i, step in enumerate(steps[:3]):
        text = text.replace(f"<{i}>", f"run/{step}")
    content = {**json.loads(text), "output": {"shard_size": "1MB"}}
    (service.folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    done = merger(service, "submit", f"{name}.yaml", "--wait", "-o", f"{name}/job")
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.chdir(service.folder)
    run(
        make_document({**content, "output": {"shard_size": "1MB", "path": f"{name}/run"}}), Options(threads=1), Silent()
    )
    job, alone = service.folder / name / "job", service.folder / name / "run"
    shards = sorted(path.name for path in alone.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        assert (job / shard).read_bytes() == (alone / shard).read_bytes(), shard


def test_surgery_as_a_job_gives_the_same_bytes_and_its_proof(
    service: Service, monkeypatch: pytest.MonkeyPatch, llama_run: Callable[..., Path]
) -> None:
    source = service.folder / "dense"
    shutil.copytree(llama_run() / "step-300", source)
    content = {"method": "upcycle", "source": "dense", "experts": 4, "drop": 0.5}
    output = {"path": "surgery/job", "shard_size": "50kB"}
    (service.folder / "upcycle.yaml").write_text(yaml.safe_dump({**content, "output": output}))
    done = merger(service, "submit", "upcycle.yaml", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.chdir(service.folder)
    run(make_document({**content, "output": {**output, "path": "surgery/run"}}), Options(), Silent())
    job, alone = service.folder / "surgery" / "job", service.folder / "surgery" / "run"
    names = sorted(path.name for path in alone.glob("model*"))
    assert len(names) > 3
    for name in [*names, "config.json"]:
        assert (job / name).read_bytes() == (alone / name).read_bytes(), name
    assert "drawn anew in part (drop)" in (job / "report.html").read_text()


def test_the_life_of_a_job_at_a_shell(service: Service) -> None:
    done = merger(service, "submit", "recipe.yaml", "--label", "team=a", "--priority", "3", "-o", "life")
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    watched = merger(service, "watch", job, "--json")
    assert watched.returncode == 0, watched.stderr
    shown = json.loads(watched.stdout)
    assert (shown["state"], shown["labels"], shown["priority"]) == ("succeeded", {"team": "a"}, 3)
    assert f"job         {job}" in merger(service, "job", job).stdout
    assert job in merger(service, "jobs", "--state", "succeeded").stdout
    assert "finished model-00001-of-00003.safetensors" in merger(service, "logs", job).stdout
    late = merger(service, "cancel", job)
    assert (late.returncode, "the job is succeeded" in late.stderr) == (2, True)
    assert merger(service, "retry", job).returncode == 2
    assert merger(service, "submit", "recipe.yaml", "-o", "life").returncode == 0, "the same result is there already"


def test_a_key_sent_twice_is_one_job(service: Service) -> None:
    jobs = {merger(service, "submit", "recipe.yaml", "-o", "k", "--idempotency-key", "k").stdout for _ in range(2)}
    assert len(jobs) == 1
    service.ended(jobs.pop().strip())


def test_what_the_service_refuses_is_said_clearly(service: Service) -> None:
    wrong = merger(service, "submit", "recipe.yaml", "--set", "metod=1")
    assert wrong.returncode == 2
    assert "metod: is not a field" in wrong.stderr
    outside = merger(service, "submit", "recipe.yaml", "-o", "/etc/x")
    assert (outside.returncode, "outside of the folders" in outside.stderr) == (2, True)
    missing = merger(service, "job", "01a1fbb3-13d5-7881-8da3-47396c8ac7a2")
    assert (missing.returncode, "there is no job" in missing.stderr) == (2, True)


def test_a_wrong_key_and_an_absent_service_are_said_clearly(service: Service) -> None:
    wrong = merger(service, "jobs", key="mk_wrong")
    assert wrong.returncode == 2
    assert "MERGER_API_KEY" in wrong.stderr
    absent = merger(service, "jobs", server=f"http://127.0.0.1:{free_port()}")
    assert absent.returncode == 1
    assert "does not answer" in absent.stderr


def test_a_source_that_vanishes_fails_the_job_with_its_name(service: Service) -> None:
    write_run(service.folder / "brief", shards=3, megabytes=1)
    block = service.submit({**recipe(Path("run"), "blocker", 1)})
    job = service.submit(recipe(Path("brief"), "gone", 1))
    for path in (service.folder / "brief").glob("step-*/*"):
        path.unlink()
    done = merger(service, "watch", job)
    assert done.returncode == 1
    assert "brief/step-" in done.stdout
    assert service.ended(block)["state"] == "succeeded"
    assert not (service.folder / "gone").exists()
    assert merger(service, "retry", job).stdout.strip() == "queued"
    service.ended(job)


def test_a_job_uses_a_secret_by_its_name_and_leaves_no_trace_of_it(service: Service) -> None:
    token = "hf_AbC0123456789xyz"
    assert merger(service, "secret", "list").stdout == "no secrets\n"
    assert merger(service, "secret", "set", "team-hub", said=f"{token}\n").stdout == "stored\n"
    assert "earlier value" in merger(service, "secret", "set", "team-hub", said=token).stdout
    assert merger(service, "secret", "list").stdout.startswith("team-hub ")
    [listed] = json.loads(merger(service, "secret", "list", "--json").stdout)
    assert listed["name"] == "team-hub"
    done = merger(service, "submit", "recipe.yaml", "-o", "with-token", "--hub-token-secret", "team-hub", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    [job] = [found for found in service.http.get("/v1/jobs").json()["jobs"] if found["output"].endswith("with-token")]
    assert job["secrets"] == {"hub_token": "team-hub"}
    assert "hub token   team-hub" in merger(service, "job", job["id"]).stdout
    key = service.folder / "data" / "secret.key"
    assert key.stat().st_mode & 0o777 == 0o600
    ray = Path(json.loads((service.folder / "data" / "ray.json").read_text())["folder"])
    left = [path for folder in (service.folder, ray) for path in folder.rglob("*") if path.is_file()]
    assert {"jobs.db", "serve.log", f"job-driver-{job['id']}-1.log", "merger.json"} <= {path.name for path in left}
    assert [path for path in left if token.encode() in path.read_bytes()] == []
    assert merger(service, "secret", "rm", "team-hub").stdout == "removed\n"


def test_what_is_wrong_with_a_secret_is_said_clearly(service: Service) -> None:
    empty = merger(service, "secret", "set", "x", said="\n")
    assert (empty.returncode, "the value is empty" in empty.stderr) == (2, True)
    bad = merger(service, "secret", "set", "No Name", said="hf_x")
    assert (bad.returncode, "name: String should match" in bad.stderr, "hf_x" in bad.stderr) == (2, True, False)
    missing = merger(service, "secret", "rm", "nothing")
    assert (missing.returncode, "there is no secret nothing" in missing.stderr) == (2, True)
    unknown = merger(service, "submit", "recipe.yaml", "--hub-token-secret", "nothing")
    assert (unknown.returncode, "the secret 'nothing' is not there" in unknown.stderr) == (2, True)
    assert "merger secret set nothing" in unknown.stderr


def test_the_key_of_secrets_is_made_once_and_a_wrong_one_is_said_clearly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MERGER_DATABASE_URL", "MERGER_SECRET_KEYS"):
        monkeypatch.delenv(name, raising=False)
    [made] = serve._settings(tmp_path, "http://here").secret_keys
    assert serve._settings(tmp_path, "http://here").secret_keys == (made,)
    (tmp_path / "secret.key").write_text("not a key")
    with pytest.raises(RequestError, match=r"secret\.key: is no Fernet key"):
        serve._settings(tmp_path, "http://here")
    monkeypatch.setenv("MERGER_SECRET_KEYS", made.get_secret_value())
    assert serve._settings(tmp_path, "http://here").secret_keys == (made,), "the file is not looked at"
    monkeypatch.setenv("MERGER_SECRET_KEYS", "wrong-one")
    with pytest.raises(RequestError, match=r"MERGER_SECRET_KEYS: .*key 1 of 1 is no Fernet key") as raised:
        serve._settings(tmp_path, "http://here")
    assert "wrong-one" not in str(raised.value)
    monkeypatch.delenv("MERGER_SECRET_KEYS")
    monkeypatch.setenv("MERGER_DATABASE_URL", "sqlite:///elsewhere.db")
    assert serve._settings(tmp_path, "http://here").secret_keys == (), "one that others use too"


def test_a_second_server_on_the_same_data_is_refused(service: Service) -> None:
    second = merger(service, "serve", "--port", "0", "--data", "data")
    assert second.returncode == 2
    assert "is used by another `merger serve`" in second.stderr
    taken = merger(service, "serve", "--port", str(service.port), "--data", "other")
    assert (taken.returncode, "cannot listen" in taken.stderr) == (2, True)


def test_the_key_is_made_once_and_works(tmp_path: Path) -> None:
    service = Service(tmp_path)
    del service.environment["MERGER_API_KEY"]
    try:
        service.start()
        log = (tmp_path / "serve.log").read_text()
        key = log.split("MERGER_API_KEY=")[1].split()[0]
        assert merger(service, "jobs", key=key).stdout == "no jobs\n"
        assert merger(service, "jobs", key="").returncode == 2
        service.kill()
        service.start()
        assert "MERGER_API_KEY" not in (tmp_path / "serve.log").read_text()
        assert merger(service, "jobs", key=key).returncode == 0
    finally:
        service.stop()


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive the block, as one that watches what is gone would."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_a_watch_goes_on_over_a_restart_and_the_server_stops_cleanly(tmp_path: Path) -> None:
    write_run(tmp_path / "run", shards=3, megabytes=1)
    service = Service(tmp_path)
    try:
        service.start()
        job = service.submit(recipe(Path("run"), "out", 1))
        environment = {**os.environ, "MERGER_SERVER": service.url, "MERGER_API_KEY": KEY}
        command = [sys.executable, "-m", "merger", "watch", job]
        with ended(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)) as watching:
            assert watching.stderr
            assert watching.stderr.readline() == f"job {job}\n"
            assert watching.stderr.readline() == "queued: submitted\n"
            assert service.process
            service.process.terminate()
            assert service.process.wait(60) == 0
            log = (tmp_path / "serve.log").read_text().splitlines()
            assert len(log) == 1, log  # nothing but `ready ...`
            service.start()
            said = watching.stderr.read()
            watching.wait()
        assert watching.returncode == 0, said
        assert said.count("the service does not answer") == 1
        assert "finished model-00003-of-00003.safetensors" in said
    finally:
        service.stop()

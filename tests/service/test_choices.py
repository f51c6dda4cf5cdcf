"""Choices by score as a job: measured on the cluster, gated, and resumed when the runner is killed in the middle."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from merger.cli.terminal import Silent
from merger.recipe import make_document
from merger.run import Options, run
from merger.staging import JOBS
from tests import tiny
from tests.service.processes import Service, until


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server in a folder with four models, each further away from the first, and text."""
    folder = tmp_path_factory.mktemp("choices")
    for i, far in enumerate([0.0, 0.01, 0.02, 0.5]):
        model = tiny.model("llama", vocab_size=260)
        torch.manual_seed(i)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=far)
        model.save_pretrained(folder / f"m{i}")
        tiny.byte_tokenizer(folder / f"m{i}")
    (folder / "held-out.txt").write_text("It was the best of times, it was the worst of times. " * 4)
    service = Service(folder, MERGER_TASK_CPUS="1")
    try:
        yield service.start()
    finally:
        service.stop()


def recipe(output: str, **evaluate: Any) -> dict[str, Any]:
    data = {"task": "text", "data": "held-out.txt", "context": 32, "connect": 0}
    soup = {"method": "soup", "models": [f"m{i}" for i in range(4)], "selection": "greedy", "select_on": data}
    return {**soup, "evaluate": {**data, **evaluate}, "output": {"path": output}}


def scores_of(service: Service, job: str) -> dict[str, int]:
    """The scores that the attempts of a job have, with the times at which they were written."""
    folder = service.folder / JOBS / job / "scores"
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")} if folder.is_dir() else {}


@pytest.mark.slow
def test_a_choice_whose_runner_is_killed_goes_on_from_its_scores_and_comes_to_the_same(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = service.submit(recipe("job", require={"loss": "<= 100"}))
    until(lambda: len(scores_of(service, job)) >= 2, 120)
    [runner] = service.processes("workers.runner")
    runner.kill()
    kept = scores_of(service, job)
    until(lambda: len(service.job(job)["attempts"]) == 2 or len(scores_of(service, job)) > len(kept), 60)
    left = until(lambda: (found := scores_of(service, job)) and len(found) > len(kept) and found, 120)
    assert {name: left[name] for name in kept} == kept  # none of them was measured again
    ended = service.ended(job, 240)
    assert ended["state"] == "succeeded", ended["error"]
    [chosen, *_] = [event["data"] for event in service.events(job) if event["kind"] == "chosen"]
    monkeypatch.chdir(service.folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run(make_document(recipe("alone", require={"loss": "<= 100"})), Options(), Silent())
    told = [json.loads((service.folder / name / "merger.json").read_text()) for name in ("job", "alone")]
    assert told[0]["choices"] == told[1]["choices"]
    assert chosen["taken"] == [step["name"] for step in told[1]["choices"][0]["steps"] if step["taken"]]
    assert told[0]["evaluation"] == told[1]["evaluation"]
    files = [(service.folder / name / "model.safetensors").read_bytes() for name in ("job", "alone")]
    assert files[0] == files[1]
    assert "Evaluation: text" in (service.folder / "job" / "report.html").read_text()


@pytest.mark.slow
def test_a_job_that_is_not_good_enough_fails_at_once_and_publishes_nothing(service: Service) -> None:
    job = service.submit(recipe("bad", require={"loss": "<= 0.01"}))
    ended = service.ended(job, 240)
    assert ended["state"] == "failed"
    assert len(ended["attempts"]) == 1
    assert ended["error"]["kind"] == "NotGoodEnough"
    assert "<= 0.01" in ended["error"]["message"]
    assert not (service.folder / "bad").exists()
    assert not (service.folder / JOBS / job).exists()


def test_data_outside_of_the_roots_and_tasks_that_run_code_are_refused(service: Service) -> None:
    outside = recipe("out")
    outside["evaluate"]["data"] = "/etc/hostname"
    harness = {**recipe("out"), "evaluate": {"task": "harness", "tasks": ["mine"], "metric": "mine/acc"}}
    harness["evaluate"]["include_path"] = "m0"
    for content, complaint in [(outside, "outside of the folders"), (harness, "such tasks may run code")]:
        answer = service.http.post("/v1/jobs", json={"recipe": content})
        assert answer.status_code == 422
        assert complaint in answer.text


@pytest.mark.slow
def test_routers_from_prompts_and_orders_of_experts_are_found_on_the_cluster(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file of mergekit-moe, and the average of its result with itself, as jobs and alone."""
    experts = [
        {"source_model": "m1", "positive_prompts": ["the best of times"], "negative_prompts": ["it was"]},
        {"source_model": "m3", "positive_prompts": ["the worst of times"]},
    ]
    moe = {"base_model": "m0", "gate_mode": "hidden_avg", "experts": experts, "output": {"path": "moe"}}
    pair = {"method": "average", "checkpoints": ["moe", "moe"], "align_experts": True, "output": {"path": "pair"}}
    for content in (moe, pair):
        ended = service.ended(service.submit(content), 240)
        assert ended["state"] == "succeeded", ended["error"]
    monkeypatch.chdir(service.folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run(make_document({**moe, "output": {"path": "moe-alone"}}), Options(), Silent())
    files = [(service.folder / name / "model.safetensors").read_bytes() for name in ("moe", "moe-alone")]
    assert files[0] == files[1]
    averaged = json.loads((service.folder / "pair" / "merger.json").read_text())["recipe"]
    assert averaged["checkpoints"][1]["orders"] == [[0, 1]] * 4
    made, source = (tiny.stored(service.folder / name) for name in ("pair", "moe"))
    assert all(torch.equal(made[name], source[name]) for name in source)

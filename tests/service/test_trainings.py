"""Fine-tunings as a job: killed with -9 in the middle of a stage, resumed, and the same result in the end."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import yaml

from tests import tiny
from tests.packages import HELD_AFTER, held, path_with
from tests.service.processes import Service, until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server in a folder with a base model and data, on a machine where the task `held` is installed."""
    folder = tmp_path_factory.mktemp("trainings")
    tiny.save(folder / "base", "llama", vocab_size=260)
    tiny.byte_tokenizer(folder / "base")
    rows = [{"text": text * 3, "label": label} for text, label in [("up", "good"), ("down", "bad")] * 8]
    (folder / "mood.jsonl").write_text("\n".join(map(json.dumps, rows)))
    service = Service(folder, MERGER_TASK_CPUS="1", PYTHONPATH=path_with(held(folder / "site")))
    try:
        yield service.start()
    finally:
        service.stop()


def study(name: str, **fields: Any) -> dict[str, Any]:
    training = {"task": "held", "auxiliary": {"mood": "mood.jsonl"}, "target": "mood.jsonl", "runs": 2}
    training |= {"steps": 10, "probe_steps": 4, "extra_head_steps": 2, "batch_size": 4, "dropouts": [0.1]}
    training |= {"keep_seconds": 0, "folder": f"stages-{name}", **fields}
    return {"method": "ratatouille", "base": "base", "training": training, "output": {"path": name}}


@pytest.fixture(scope="module")
def alone(service: Service) -> bytes:
    """The result of `merger run` of the same recipe, undisturbed."""
    (service.folder / "alone.yaml").write_text(yaml.safe_dump(study("alone")))
    command = [sys.executable, "-m", "merger", "run", "alone.yaml"]
    subprocess.run(command, cwd=service.folder, env=service.environment, check=True, capture_output=True)
    return (service.folder / "alone" / "model.safetensors").read_bytes()


class Caught:
    """A process in the middle of a stage: where it is held, with the stages that were finished before."""

    def __init__(self, service: Service, name: str) -> None:
        self.folder = service.folder / f"stages-{name}"
        self.process = psutil.Process(int((service.folder / "held").read_text()))
        assert "merger.training" in self.process.cmdline()
        self.stage = self.process.cmdline()[-1]
        self.finished = self.times()
        assert self.finished
        assert self.stage not in self.finished
        assert (self.folder / f"{self.stage}.state.safetensors").exists()

    def times(self) -> dict[str, int]:
        found = self.folder.glob("[!.]*/stage.json")
        return {path.parent.name: path.stat().st_mtime_ns for path in found}

    @property
    def after(self) -> int:
        """The step whose state is kept; runs from an auxiliary model begin with two steps of the head alone."""
        return HELD_AFTER + (2 if self.stage.endswith("from-mood") else 0)


def catch(service: Service, name: str) -> tuple[str, Caught]:
    """Submit the study; the job, and its process in the middle of a stage."""
    (service.folder / "hold").touch()
    (service.folder / "held").unlink(missing_ok=True)
    job = service.submit(study(name))
    until((service.folder / "held").exists, 120)
    (service.folder / "hold").unlink()
    return job, Caught(service, name)


def check(service: Service, job: str, name: str, caught: Caught, attempts: int) -> bytes:
    """The result of the job, which went on where it was killed and trained nothing twice."""
    ended = service.ended(job, 240)
    assert ended["state"] == "succeeded", ended["error"]
    assert len(ended["attempts"]) == attempts
    left = caught.times()
    assert {stage: left[stage] for stage in caught.finished} == caught.finished
    log = service.http.get(f"/v1/jobs/{job}/logs").raise_for_status().text
    assert f"trained {caught.stage}, which went on after step {caught.after}" in log
    assert not [path for path in caught.folder.iterdir() if not path.is_dir() or path.name.startswith(".")]
    return (service.folder / name / "model.safetensors").read_bytes()


def test_a_stage_whose_process_is_killed_goes_on_and_comes_to_the_same_model(service: Service, alone: bytes) -> None:
    job, caught = catch(service, "process")
    caught.process.kill()
    assert check(service, job, "process", caught, attempts=1) == alone


def test_stages_whose_runner_is_killed_go_on_and_come_to_the_same_model(service: Service, alone: bytes) -> None:
    """The process that trained ends with its runner: it would be held for ever."""
    job, caught = catch(service, "runner")
    [runner] = service.processes("workers.runner")
    runner.kill()
    caught.process.wait(60)
    assert check(service, job, "runner", caught, attempts=2) == alone


def refused(service: Service, **fields: Any) -> dict[str, Any]:
    answer = service.http.post("/v1/jobs", json={"recipe": study("out", **fields)})
    assert answer.status_code == 422
    problem: dict[str, Any] = answer.json()
    return problem


def test_stages_are_not_written_outside_of_the_roots(service: Service) -> None:
    assert "outside of the folders" in refused(service, folder="/tmp/elsewhere")["detail"]


@pytest.mark.parametrize("task", ["hold", "merger_held:Held", "os.system", "../site/merger_held"])
def test_only_tasks_that_are_installed_can_be_named(service: Service, task: str) -> None:
    problem = refused(service, task=task)
    assert problem["errors"][0]["pointer"] == "/recipe/training/task"
    assert "is no task to train on" in problem["detail"]
    assert problem["remedy"].endswith("of installed packages held (of held 1.0).")


def test_reward_models_are_trained_and_averaged_as_a_job(service: Service) -> None:
    pairs = [{"prompt": "so ", "chosen": "up" * i, "rejected": "down" * i} for i in range(1, 9)]
    (service.folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    for step in (9, 10):
        tiny.save(service.folder / f"sft/step-{step}", "llama", seed=step, vocab_size=260)
        tiny.byte_tokenizer(service.folder / f"sft/step-{step}")
    training = {"checkpoints": "sft/step-*", "data": "pairs.jsonl", "runs": 2, "steps": 4, "probe_steps": 2}
    recipe = {"method": "warm", "training": {**training, "folder": "rewards", "batch_size": 4}}
    recipe["evaluate"] = {"task": "preferences", "data": "pairs.jsonl", "connect": 0}
    ended = service.ended(service.submit({**recipe, "output": {"path": "warm"}}), 240)
    assert ended["state"] == "succeeded", ended["error"]
    told = json.loads((service.folder / "warm" / "merger.json").read_text())
    names = [f"rewards/{name}" for name in ("reward-0-from-step-9", "reward-1-from-step-10")]
    assert told["recipe"]["models"] == names
    made = tiny.stored(service.folder / "warm")
    models = [tiny.stored(service.folder / name) for name in names]
    assert list(made["score.weight"].shape) == [1, tiny.SIZES["hidden_size"]]
    for name, value in made.items():
        wanted = (models[0][name].double() + models[1][name].double()) / 2
        assert (value.double() - wanted).abs().max() <= 1e-7 * wanted.abs().max(), name

"""`merger evaluate`, `connect` and `ratatouille`: what a person sees of scores, lines and fine-tunings."""

import json

import pytest
import yaml
from click.testing import CliRunner, Result

from merger.cli.main import merger_command
from tests import tiny


def merger(*arguments: object) -> Result:
    return CliRunner().invoke(merger_command, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        tiny.save(folder / f"m{seed}", "llama", seed=seed, vocab_size=260)
        tiny.byte_tokenizer(folder / f"m{seed}")
    (folder / "held-out.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 3)
    recipe = {"method": "soup", "models": [str(folder / "m0"), str(folder / "m1")]}
    (folder / "soup.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# ---- evaluate -----------------------------------------------------------------------------------------


def test_models_and_recipes_are_measured_and_compared_with_the_first(models):
    data = ["--data", models / "held-out.txt", "--context", "32"]
    shown = merger("evaluate", models / "m0", models / "m1", models / "soup.yaml", *data)
    assert shown.exit_code == 0, shown.output
    lines = [line for line in shown.stdout.splitlines() if line.startswith(str(models))]
    assert [line.split()[0] for line in lines] == [str(models / name) for name in ("m0", "m1", "soup.yaml")]
    assert "loss ±" in lines[0]
    assert all("±" in line and ("loss +" in line or "loss -" in line) for line in lines[1:])
    told = json.loads(merger("evaluate", models / "m0", models / "soup.yaml", *data, "--json").stdout)
    for model, line in zip(told, (lines[0], lines[2]), strict=True):
        assert f"{told[model]['metrics']['loss']:.4f}" in line
        assert told[model]["unit"] == "tokens"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--data: is missing"),
        (["--data", "missing.txt"], "missing.txt: cannot be read"),
        (["--data", "missing.txt", "--context", "1"], "--context: Input should be greater than or equal to 2"),
        (["--data", "missing.txt", "--metric", "accuracy"], "--metric: 'accuracy' is not measured"),
    ],
)
def test_what_cannot_be_measured_is_refused(models, arguments, complaint):
    result = merger("evaluate", models / "m0", *arguments)
    assert complaint in str(result.exception)


# ---- connect ------------------------------------------------------------------------------------------


def test_a_line_is_measured_from_end_to_end(models, tmp_path):
    data = ["--data", models / "held-out.txt", "--points", "3"]
    shown = merger("connect", models / "m0", models / "m1", *data, "--picture", tmp_path / "line.png")
    assert shown.exit_code == 0, shown.output
    places = [line.split() for line in shown.stdout.splitlines() if line.startswith("  ")]
    assert [place for place, _ in places] == ["0.000", "0.500", "1.000"]
    assert (tmp_path / "line.png").read_bytes().startswith(b"\x89PNG")
    [line] = json.loads(merger("connect", models / "m0", models / "m1", *data, "--json").stdout)
    ends = json.loads(merger("evaluate", models / "m0", models / "m1", *data[:2], "--json").stdout)
    assert [line["values"][0], line["values"][-1]] == [row["metrics"]["loss"] for row in ends.values()]
    a, between, b = line["values"]
    assert line["barrier"] == pytest.approx(max(0.0, between - (a + b) / 2))


def test_one_model_is_no_line(models):
    result = merger("connect", models / "m0", "--data", models / "held-out.txt")
    assert "a line needs two models" in result.output + str(result.exception)


# ---- ratatouille --------------------------------------------------------------------------------------


@pytest.fixture
def study(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("aux", "target"):
        rows = [{"text": text, "label": label} for text, label in [("up", "good"), ("down", "bad")] * 4]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    training = {"task": "classification", "auxiliary": {"mood": "aux.jsonl"}, "target": "target.jsonl", "runs": 2}
    training |= {"folder": "work", "steps": 3, "probe_steps": 2, "extra_head_steps": 1, "batch_size": 4}
    recipe = {"method": "ratatouille", "base": str(models / "m0"), "training": training}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def test_the_fine_tunings_are_listed_in_their_order(study, models):
    shown = merger("ratatouille", "plan", "study.yaml")
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert [line.split()[1] for line in lines[::3]] == [
        *(
            "work/auxiliary-mood-head",
            "work/auxiliary-mood",
            "work/target-head",
            "work/target-0-from-base",
            "work/target-1-from-mood",
        )
    ]
    assert lines[-2] == "     starts from work/auxiliary-mood, head of work/target-head"
    assert "4 steps on target.jsonl, 1 of them the head alone" in lines[-1]
    told = json.loads(merger("ratatouille", "plan", "study.yaml", "--json").stdout)
    assert [row["bodies"][0][0] for row in told][-2:] == [str(models / "m0"), "work/auxiliary-mood"]
    assert not any(row["finished"] for row in told)


def test_they_are_done_and_averaged_and_not_done_again(study):
    shown = merger("ratatouille", "run", "study.yaml", "-o", "out")
    assert shown.exit_code == 0, shown.output
    told = json.loads((study / "out" / "merger.json").read_text())
    assert told["recipe"]["targets"] == ["work/target-0-from-base", "work/target-1-from-mood"]
    assert told["recipe"]["auxiliary"] == ["work/auxiliary-mood"]
    assert told["asked"]["training"]["runs"] == 2
    times = {path: path.stat().st_mtime_ns for path in study.glob("work/*/model.safetensors")}
    assert len(times) == 5
    assert merger("run", "study.yaml", "-o", "again").exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in study.glob("work/*/model.safetensors")} == times
    assert "(finished)" in merger("ratatouille", "plan", "study.yaml").stdout
    files = [(study / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert files[0] == files[1]


def test_the_reward_models_of_warm_are_listed_too(study, models):
    (study / "pairs.jsonl").write_text('{"chosen": "up", "rejected": "down"}\n')
    training = {"checkpoints": str(models / "m*"), "data": "pairs.jsonl", "runs": 3, "folder": "rewards"}
    recipe = {"method": "soup", "models": [{"method": "warm", "training": training}]}
    (study / "nested.yaml").write_text(yaml.safe_dump(recipe))
    shown = merger("stages", "nested.yaml")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.splitlines()[:5] == [
        "  1. rewards/reward-head",
        f"     starts from {models / 'm1'}, a fresh head",
        "     100 steps on pairs.jsonl, 100 of them the head alone; learning rate 0.001, "
        "weight decay 0, dropout 0, seed 0",
        "  2. rewards/reward-0-from-m0",
        f"     starts from {models / 'm0'}, head of rewards/reward-head",
    ]
    told = json.loads(merger("stages", "nested.yaml", "--json").stdout)
    assert [row["bodies"][0][0] for row in told][1:] == [str(models / name) for name in ("m0", "m1", "m0")]
    assert "3 reward models will be trained first, from 2 checkpoints" in merger("plan", "nested.yaml").stdout


def test_a_recipe_without_training_has_nothing_to_list(models):
    for verb in (["ratatouille", "plan"], ["stages"]):
        assert "has no `training`" in str(merger(*verb, models / "soup.yaml").exception)

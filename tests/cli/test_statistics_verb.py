"""`merger statistics` by hand: made, checked, merged and refused."""

import json
import subprocess
import sys

import pytest
import yaml
from click.testing import CliRunner, Result

from merger.cli.main import merger_command
from tests import tiny
from tests.cli.test_hub_reading import use
from tests.hub_server.fixtures import hub


def merger(*arguments: object) -> Result:
    return CliRunner().invoke(merger_command, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        tiny.save(folder / f"m{seed}", "llama", seed=seed, vocab_size=260, num_hidden_layers=1)
        tiny.byte_tokenizer(folder / f"m{seed}")
    (folder / "text.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 3)
    (folder / "more.jsonl").write_text('{"text": "It is a way I have of driving off the spleen."}\n')
    return folder


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of processes that are started


def made(models, output, *options, model="m0", kind="fisher", data=("text.txt",)):
    files = [part for name in data for part in ("--data", models / name)]
    return merger("statistics", models / model, "--kind", kind, *files, "-o", output, "--context", 16, *options)


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_they_are_made_told_of_and_checked(models, tmp_path, kind):
    shown = made(models, tmp_path / "s", kind=kind, data=("text.txt", "more.jsonl"))
    assert shown.exit_code == 0, shown.output
    told = json.loads((tmp_path / "s" / "statistics.json").read_text())
    assert (
        f"{kind} of {models / 'm0'}: {told['data']['tokens']:,} tokens in {told['data']['windows']} windows"
        in shown.output
    )
    assert [file["name"] for file in told["data"]["files"]] == ["text.txt", "more.jsonl"]
    checked = merger("statistics", tmp_path / "s", "--check", "--json")
    assert json.loads(checked.output) == told
    listed = merger("inspect", tmp_path / "s", "--json")
    assert listed.exit_code == 0, listed.output


def test_the_whole_way_from_a_text_to_a_merge(models, tmp_path):
    """Statistics as a person makes them, in a shell."""
    command = ["statistics", models / "m0", "--kind", "fisher", "--data", models / "text.txt", "-o", tmp_path / "m0"]
    done = subprocess.run([sys.executable, "-m", "merger", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made(models, tmp_path / "m1", model="m1")
    entries = [{"source": str(models / name), "statistics": str(tmp_path / name)} for name in ("m0", "m1")]
    recipe = {"method": "fisher", "models": entries, "output": {"path": str(tmp_path / "out")}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = merger("run", tmp_path / "recipe.yaml")
    assert "passed  finite" in result.output, result.output
    tiny.load(tmp_path / "out")


def test_damage_is_found(models, tmp_path):
    made(models, tmp_path / "s")
    path = tmp_path / "s" / "statistics.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    result = merger("statistics", tmp_path / "s", "--check")
    assert "is not the file that statistics.json tells of" in str(result.exception)
    assert str(path) in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--kind: is missing"),
        (["--kind", "fisher"], "--data: is missing"),
        (["--kind", "gram", "--data", "none.txt"], "-o: is missing"),
        (["--kind", "gram", "--data", "none.txt", "-o", "s"], "none.txt: is not there"),
        (["--check"], "statistics.json: is not readable JSON"),
    ],
)
def test_what_cannot_be_made_or_checked_is_refused(models, tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    assert complaint in str(merger("statistics", models / "m0", *arguments).exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [["--kind", "hessian"], ["--context", "1"], ["--limit", "0"], ["--memory", "much"], ["--labels", "own"]],
)
def test_options_that_mean_nothing_are_refused(models, arguments):
    assert merger("statistics", models / "m0", *arguments).exit_code == 2


def test_a_model_that_is_not_there_or_computes_no_text_is_refused(models, tmp_path):
    result = made(models, tmp_path / "s", model="none")
    assert "none" in str(result.exception)
    tiny.save(tmp_path / "bare", "llama", num_hidden_layers=1)
    given = ("statistics", tmp_path / "bare", "--kind", "fisher", "--data", models / "text.txt", "-o", tmp_path / "s")
    assert "the model has no tokenizer" in str(merger(*given).exception)


# ---- elsewhere ----------------------------------------------------------------------------------------


@pytest.fixture
def hub_with_statistics(models, tmp_path, monkeypatch):
    """A Hub with both models and with the statistics of both, beside the same statistics here."""
    with hub(tmp_path, "lfs") as server:
        for name in ("m0", "m1"):
            server.add_model(f"org/{name}", models / name)
            for kind in ("fisher", "gram"):
                made(models, tmp_path / kind / name, model=name, kind=kind)
                server.add_model(f"org/{name}-{kind}", tmp_path / kind / name)
        use(monkeypatch, server, tmp_path, "lfs")
        yield server


@pytest.mark.parametrize(("method", "kind"), [("fisher", "fisher"), ("regmean", "gram")])
@pytest.mark.parametrize("both", [True, False])
def test_statistics_that_lie_on_the_hub_are_used_like_those_here(
    models, tmp_path, hub_with_statistics, method, kind, both
):
    here = [{"source": str(models / name), "statistics": str(tmp_path / kind / name)} for name in ("m0", "m1")]
    there = [
        {"source": f"hf://org/{name}" if both else str(models / name), "statistics": f"hf://org/{name}-{kind}"}
        for name in ("m0", "m1")
    ]
    for place, entries in (("here", here), ("there", there)):
        recipe = {"method": method, "models": entries, "output": {"path": str(tmp_path / place)}}
        (tmp_path / f"{place}.yaml").write_text(yaml.safe_dump(recipe))
        result = merger("run", tmp_path / f"{place}.yaml")
        assert result.exit_code == 0, result.exception
    a, b = ((tmp_path / place / "model.safetensors").read_bytes() for place in ("here", "there"))
    assert a == b
    planned = json.loads(merger("plan", tmp_path / "there.yaml", "-o", tmp_path / "more", "--json").output)
    assert planned["fetch_bytes"] > 0


def test_statistics_on_the_hub_of_another_model_are_refused(models, tmp_path, hub_with_statistics):
    entries = [{"source": "hf://org/m0", "statistics": "hf://org/m1-fisher"}]
    recipe = {"method": "fisher", "models": entries, "output": {"path": str(tmp_path / "out")}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    error = str(merger("run", tmp_path / "recipe.yaml").exception)
    assert "hf://org/m1-fisher: holds statistics of another model than hf://org/m0: the values differ" in error
    assert not (tmp_path / "out").exists()


def test_statistics_of_a_model_on_the_hub_say_which_commit_it_was(tmp_path, hub_with_statistics):
    (tmp_path / "t.txt").write_text("Call me Ishmael.")
    result = merger("statistics", "org/m0", "--kind", "gram", "--data", tmp_path / "t.txt", "-o", tmp_path / "s")
    assert result.exit_code == 0, result.exception
    told = json.loads((tmp_path / "s" / "statistics.json").read_text())["model"]
    own = json.loads((tmp_path / "gram" / "m0" / "statistics.json").read_text())["model"]
    assert told["repository"] == "org/m0"
    assert len(told["revision"]) == 40
    assert told["digest"] == own["digest"]
    assert "base_model: org/m0" in (tmp_path / "s" / "README.md").read_text()

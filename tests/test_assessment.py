"""From a recipe with data to a result with scores: choosing, requiring, reporting, resuming."""

import json

import pytest
import torch
import yaml
from click.testing import CliRunner

from merger.cli.main import merger_command
from merger.errors import NotGoodEnough, NotInstalled, RecipeError, SourceError
from merger.judging import LocalJudge
from merger.recipe import make_document
from merger.run import Options, plan_of, run
from tests import tiny
from tests.methods.making import Silent, make


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model and three that moved away from it: a little, a little elsewhere, far."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny.model("llama", vocab_size=260)
    base.save_pretrained(folder / "base")
    for seed, (name, far) in enumerate({"near": 0.01, "close": 0.012, "far": 0.6}.items(), 1):
        torch.manual_seed(seed)
        moved = tiny.model("llama", vocab_size=260)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=far)
        moved.save_pretrained(folder / name)
    for name in ("base", "near", "close", "far"):
        tiny.byte_tokenizer(folder / name)
    # Text that the base would write is text that it predicts well.
    with torch.no_grad():
        tokens = torch.tensor([[5]])
        torch.manual_seed(0)
        for _ in range(60):
            logits = base(input_ids=tokens).logits[0, -1, :256]
            tokens = torch.cat([tokens, torch.multinomial((3 * logits).softmax(0), 1)[None]], 1)
    rows = [json.dumps({"input_ids": tokens[0, at : at + 20].tolist()}) for at in range(0, 60, 20)]
    (folder / "held-out.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def text(models, **fields):
    return {"task": "text", "data": str(models / "held-out.jsonl"), **fields}


def soup(models, *names, **fields):
    return {"method": "soup", "models": [str(models / name) for name in names], **fields}


def greedy(models, *names):
    return soup(models, *names, selection="greedy", select_on=text(models))


def test_a_greedy_soup_is_the_mean_of_what_was_chosen_and_says_why(models, tmp_path):
    make(greedy(models, "near", "far", "close"), tmp_path / "greedy")
    told = json.loads((tmp_path / "greedy" / "merger.json").read_text())
    [choice] = told["choices"]
    taken = {step["name"].removeprefix("+ ") for step in choice["steps"] if step["taken"]}
    assert str(models / "far") not in taken
    assert told["recipe"]["models"] == [str(models / name) for name in ("near", "close") if str(models / name) in taken]
    assert told["asked"]["selection"] == "greedy"
    assert [row["name"] for row in choice["alone"]] == [str(models / name) for name in ("near", "far", "close")]
    page = (tmp_path / "greedy" / "report.html").read_text()
    assert "Greedy soup, by loss" in page
    assert "left out" in page
    assert "Chosen by loss (greedy soup, 3 candidates)" in (tmp_path / "greedy" / "README.md").read_text()
    # What the card says makes the same again.
    recipe = (tmp_path / "greedy" / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    make({**yaml.safe_load(recipe), "output": {}}, tmp_path / "again")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("greedy", "again")]
    assert files[0] == files[1]


def test_an_interrupted_choice_goes_on_from_the_scores_that_it_has(models, tmp_path, monkeypatch):
    asked = []
    measure = LocalJudge._measure

    def counting(self, candidate, *more):
        asked.append(candidate)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return measure(self, candidate, *more)

    monkeypatch.setattr(LocalJudge, "_measure", counting)
    with pytest.raises(KeyboardInterrupt):
        make(greedy(models, "near", "far", "close"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    make(greedy(models, "near", "far", "close"), tmp_path / "out")
    assert len(asked) == 4 + 2  # three alone and the fourth, which was cut off; then that one and the last


def test_a_result_that_is_good_enough_is_published_with_its_score(models, tmp_path):
    wanted = text(models, require={"loss": "<= 10"}, better_than=str(models / "far"))
    outcome = make({**soup(models, "near", "close"), "evaluate": wanted}, tmp_path / "out")
    assert [check.name for check in outcome.checks[-3:]] == ["evaluation", "required", "required"]
    told = json.loads((tmp_path / "out" / "merger.json").read_text())["evaluation"]
    assert all(row["passed"] for row in told["required"])
    assert told["score"]["count"] == 57
    assert len(told["lines"][0]["values"]) == 5
    assert (tmp_path / "out" / "between-the-sources.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Evaluation: text" in page
    assert "| this model |" in (tmp_path / "out" / "README.md").read_text()


def test_a_result_that_is_not_is_not_published_and_its_shards_are_kept(models, tmp_path):
    output = tmp_path / "out"
    recipe = soup(models, "near", "close")
    with pytest.raises(NotGoodEnough, match=r"loss \d\.\d+ <= 0\.1"):
        make({**recipe, "evaluate": text(models, require={"loss": "<= 0.1"})}, output)
    assert not (output / "config.json").exists()
    written = (output / "model.safetensors").stat()
    outcome = make({**recipe, "evaluate": text(models, require={"loss": "<= 10"})}, output)
    assert outcome.resumed == 1
    assert (output / "model.safetensors").stat().st_mtime_ns == written.st_mtime_ns
    assert (output / "config.json").exists()


def test_a_result_must_beat_all_its_sources_where_that_is_asked(models, tmp_path):
    with pytest.raises(NotGoodEnough, match=r"of .*base"):
        make({**soup(models, "base", "far"), "evaluate": text(models, better_than="sources")}, tmp_path / "out")


def test_the_same_result_is_judged_again_where_more_is_asked_of_it(models, tmp_path):
    make(soup(models, "near", "close"), tmp_path / "out")
    with pytest.raises(NotGoodEnough):
        make({**soup(models, "near", "close"), "evaluate": text(models, require={"loss": "< 0"})}, tmp_path / "out")


def test_a_search_makes_the_best_variant_that_it_measured(models, tmp_path):
    inner = {"method": "wise_ft", "base": str(models / "base"), "fine_tuned": str(models / "far"), "alpha": 0.9}
    search = {"method": "search", "recipe": inner, "parameters": {"alpha": [0.2, 1.0]}, "budget": 3}
    make({**search, "select_on": text(models)}, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "merger.json").read_text())
    rows = [*told["choices"][0]["alone"], *told["choices"][0]["steps"]]
    best = min(rows, key=lambda row: row["metrics"]["loss"])
    assert [row["name"] for row in rows] == ["alpha 0.9", "alpha 0.2", "alpha 1"]
    assert [row["name"] for row in rows if row["taken"]] == [best["name"]]
    assert told["recipe"]["alpha"] == float(best["name"].split()[1])
    assert told["recipe"]["method"] == "wise_ft"
    assert "Search, by loss" in (tmp_path / "out" / "report.html").read_text()


def test_the_plan_of_a_finished_choice_is_shown_again(models, tmp_path):
    make(greedy(models, "near", "close"), tmp_path / "out")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(greedy(models, "near", "close")))
    shown = CliRunner().invoke(merger_command, ["plan", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output


def test_a_plan_says_that_a_choice_is_open(models):
    plan, _ = plan_of(make_document(greedy(models, "near", "far")), Options())
    assert any("what enters is chosen by score" in note for note in plan.checkpoint.notes)


def test_the_harness_must_be_there_before_anything_is_written(models, tmp_path):
    evaluate = {"task": "harness", "tasks": ["arc_easy"], "metric": "arc_easy/acc"}
    with pytest.raises(NotInstalled, match="lm-evaluation-harness is not installed"):
        make({**soup(models, "near", "close"), "evaluate": evaluate}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "kind", "complaint"),
    [
        ({"data": "missing.txt"}, SourceError, r"missing\.txt: is not there"),
        ({"better_than": "missing"}, SourceError, "missing: is not there"),
        ({"requires": {"loss": "< 1"}}, RecipeError, r"evaluate\.requires: is not a field; did you mean 'require'"),
        ({"require": {"loss": "small"}}, RecipeError, r"evaluate\.require: loss: 'small' is not a condition"),
        ({"task": "txt"}, RecipeError, "evaluate: .*'text', 'classification'"),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_refused_in_the_plan(models, tmp_path, change, kind, complaint):
    recipe = {**soup(models, "near", "close"), "evaluate": text(models) | change}
    with pytest.raises(kind, match=complaint):
        make(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_result_on_disk_takes_part_in_a_run_that_needs_no_score(models, tmp_path):
    document = make_document({**soup(models, "near", "close"), "output": {"path": str(tmp_path / "out")}})
    outcome = run(document, Options(), Silent())
    assert not any(check.name == "evaluation" for check in outcome.checks)

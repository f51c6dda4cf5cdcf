"""Scores from the process that measures: remembered by what they depend on, and its errors as our own."""

import json
import os
import signal

import pytest

from merger.errors import JobError, SourceError
from merger.evaluation import Score, Text
from merger.judging import LocalJudge, Remembered, key_of
from merger.methods.soups import Soup
from merger.sources import LocalSources
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        tiny.save(folder / f"m{seed}", "llama", seed=seed, vocab_size=260)
        tiny.byte_tokenizer(folder / f"m{seed}")
    (folder / "held-out.txt").write_text("All happy families are alike.")
    return folder


@pytest.fixture
def said():
    return []


@pytest.fixture
def judge(tmp_path, said):
    with LocalJudge(LocalSources(), Remembered(tmp_path / "scores"), said.append) as judge:
        yield judge


def test_candidates_are_measured_once_and_remembered(folder, judge, said, tmp_path):
    evaluation = Text(data=[str(folder / "held-out.txt")])
    candidates = [str(folder / "m0"), Soup(models=[str(folder / "m0"), str(folder / "m1")])]
    first = judge.scores(candidates, evaluation)
    assert first[0] != first[1]
    assert first[0].count == len("All happy families are alike.") - 1
    assert said[0] == f"measuring {folder / 'm0'}"
    assert "measuring a candidate (soup)" in said
    told = len(said)
    with LocalJudge(LocalSources(), Remembered(tmp_path / "scores"), said.append) as another:
        assert another.scores(candidates, evaluation) == first
    assert len(said) == told  # nothing was measured again


def test_another_context_or_another_model_is_another_score(folder):
    def key(name, **settings):
        return key_of(str(folder / name), Text(data=[str(folder / "held-out.txt")], **settings), LocalSources())

    assert key("m0") == key("m0", batch_size=1)
    assert len({key("m0"), key("m1"), key("m0", context=8)}) == 3


def test_a_damaged_memory_is_no_memory(tmp_path):
    memory = Remembered(tmp_path)
    score = Score({"loss": 1.0}, "tokens", (1.0,), (1.0,))
    memory.put("a", score)
    assert memory.get("a") == score
    (tmp_path / "a.json").write_text(json.dumps({"metrics": {}}))
    assert memory.get("a") is None
    assert memory.get("b") is None


def test_what_is_wrong_with_the_data_is_told_as_it_is(folder, judge, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"txt": "a"}')
    with pytest.raises(SourceError, match="line 1: has no field 'text'") as found:
        judge.scores([str(folder / "m0")], Text(data=[str(tmp_path / "rows.jsonl")]))
    assert found.value.where.endswith("rows.jsonl, line 1")


def test_a_process_that_dies_is_told(folder, judge):
    judge.scores([str(folder / "m0")], Text(data=[str(folder / "held-out.txt")]))
    os.kill(judge._process.pid, signal.SIGKILL)
    with pytest.raises(JobError, match="the process that measures models has died"):
        judge.scores([str(folder / "m1")], Text(data=[str(folder / "held-out.txt")]))
    # The next question starts another one.
    assert judge.scores([str(folder / "m1")], Text(data=[str(folder / "held-out.txt")]))

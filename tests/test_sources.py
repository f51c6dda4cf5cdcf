"""References and patterns to folders."""

import numpy as np
import pytest

from merger.errors import SourceError
from merger.recipe import make_document, resolve
from merger.secret import Token
from merger.sources import LocalSources
from merger.storage.hub import Access
from tests.checkpoints import write_model
from tests.hub_server.fixtures import hub


def names(folder, pattern):
    return [str(member.origin).rpartition("/")[2] for member in LocalSources().members(f"{folder}/{pattern}")]


def test_a_pattern_is_taken_in_natural_order(tmp_path):
    for step in (10, 9, 100, 1):
        (tmp_path / f"step-{step}").mkdir()
    (tmp_path / "step-5.txt").touch()
    assert names(tmp_path, "step-*") == ["step-1", "step-9", "step-10", "step-100"]
    assert [member.step for member in LocalSources().members(f"{tmp_path}/step-*")] == [1, 9, 10, 100]


def test_files_of_weights_are_matched_too(tmp_path):
    for step in (2, 1):
        write_model(tmp_path / f"{step}", {"x": np.ones(1, np.float32)}, {})
        (tmp_path / f"{step}" / "model.safetensors").rename(tmp_path / f"run-{step}.safetensors")
    assert names(tmp_path, "run-*.safetensors") == ["run-1.safetensors", "run-2.safetensors"]
    checkpoint = resolve(make_document({"method": "average", "checkpoints": f"{tmp_path}/run-*.safetensors"}))
    assert [part.source.step for part in checkpoint.parts] == [1, 2]


def test_a_pattern_that_matches_nothing_says_what_is_there(tmp_path):
    (tmp_path / "runs" / "big").mkdir(parents=True)
    with pytest.raises(SourceError, match="matches no folder") as caught:
        LocalSources().members(f"{tmp_path}/runs/tiny/step-*")
    assert f"{tmp_path}/runs holds big" in caught.value.remedy


def test_home_may_be_written_short(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_model(tmp_path / "model", {"x": np.ones(1, np.float32)}, {})
    assert resolve(make_document({"method": "average", "checkpoints": "~/model"})).tensors.keys() == {"x"}
    assert names("~", "mod*") == ["model"]


def test_an_empty_list_is_refused():
    with pytest.raises(SourceError, match="names no checkpoint"):
        resolve(make_document({"method": "average", "checkpoints": []}))


def test_all_references_to_a_revision_mean_one_commit_though_the_branch_moves_meanwhile(tmp_path):
    model = write_model(tmp_path / "model", {"x": np.ones(4, np.float32)})
    files = {f"run/step-{i}/{path.name}": path.read_bytes() for i in (1, 2) for path in model.iterdir()}
    with hub(tmp_path) as server:
        server.add_model("org/run", model)
        server.write("org/run", files)
        sources = LocalSources(access=lambda: Access(server.endpoint, Token(server.token)))
        first, other = sources.members("hf://org/run/run/step-*")
        opened = sources.open(first)
        server.write("org/run", {"run/step-2/README.md": b"moved"})
        commits = {checkpoint.parts[0].source.revision for checkpoint in (opened, sources.open(other))}
    assert len(commits) == 1


def test_what_was_pinned_for_a_job_stays_pinned_in_its_next_attempt(tmp_path):
    model = write_model(tmp_path / "model", {"x": np.ones(4, np.float32)})
    pins = tmp_path / "job" / "pins.json"
    with hub(tmp_path) as server:
        first = server.add_model("org/run", model)
        found = []
        for _ in range(2):
            sources = LocalSources(access=lambda: Access(server.endpoint, Token(server.token)), pins=pins)
            [member] = sources.members("hf://org/run")
            found.append(sources.open(member).parts[0].source.revision)
            server.write("org/run", {"README.md": b"moved"})
    assert found == [first, first]

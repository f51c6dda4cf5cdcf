"""Checkpoints on a Hub: opened as those in folders are, found by patterns, and refused where they are not sound."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from merger.checkpoint import Checkpoint, open_checkpoint
from merger.errors import FormatError, MergerError, PickledWeights, SourceChanged, SourceError
from merger.remote_models import hub_matches, hub_step, open_on_hub
from merger.secret import Token
from merger.sources import LocalSources
from merger.storage import patience, ranges
from merger.storage.hub import Access, library
from merger.storage.reference import reference_of
from tests.checkpoints import bfloat16, entry, write_header, write_index, write_model, write_safetensors
from tests.hub_server.fixtures import hub

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
TENSORS = {
    **{f"model.layers.{i}.weight": np.full((20, 30), i, np.float32) for i in range(5)},
    "model.norm.weight": bfloat16(np.ones(30)),
}


@pytest.fixture(autouse=True)
def own(monkeypatch, tmp_path) -> None:
    """Short waits, a cache of its own, no Xet, and a process that knows no address yet."""
    monkeypatch.setattr(patience, "_FIRST", 0.002)
    monkeypatch.setattr(patience, "_LONGEST", 0.004)
    monkeypatch.setattr(ranges, "ADDRESSES", ranges.Addresses())
    constants = library().constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def server(tmp_path) -> Iterator:
    with hub(tmp_path) as one:
        yield one


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder to be filled and published."""
    return tmp_path / "model"


def access(server) -> Access:
    return Access(server.endpoint, Token(server.token))


def opened(server, text: str = "hf://org/a") -> Checkpoint:
    return open_on_hub(text, access(server))


def published(server, folder: Path, text: str = "hf://org/a") -> Checkpoint:
    server.add_model("org/a", folder)
    server.clear_log()
    return opened(server, text)


def refused(kind: type[MergerError], says: str, server, text: str = "hf://org/a") -> MergerError:
    with pytest.raises(kind, match=says) as caught:
        opened(server, text)
    assert type(caught.value) is kind
    assert caught.value.where.startswith(("hf://org/a", server.endpoint))
    assert server.token not in repr(caught.value)
    return caught.value


def shapes(checkpoint: Checkpoint) -> dict[str, tuple]:
    return {name: (tensor.dtype, tensor.shape, tensor.offset) for name, tensor in checkpoint.tensors.items()}


# ---- opened -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_is_what_it_is_in_its_folder(server, model, shards):
    write_model(model, TENSORS, LLAMA, shards, side_files={"tokenizer.json": "{}", "optimizer.pt": b"x"})
    there, here = published(server, model), open_checkpoint(model)
    assert shapes(there) == shapes(here)
    assert there.config == here.config
    assert {name: path.read_bytes() for name, path in there.side_files.items()} == {"tokenizer.json": b"{}"}
    commit = server.refs("org/a")["main"]
    (source,) = [part.source for part in there.parts]
    assert source.reference == "hf://org/a"
    assert [str(file.path) for file in source.files] == [f"hf://org/a@{commit}/{path.name}" for path in weights(model)]
    assert [file.header_sha256 for file in source.files] == [f.header_sha256 for f in here.parts[0].source.files]


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_only_headers_of_weights_are_read(server, model):
    write_model(model, {f"{i}": np.zeros(300_000, np.float32) for i in range(6)}, LLAMA, shards=3)
    published(server, model)
    assert len(server.log("cdn", "GET")) == 3
    assert sum(entry.sent for entry in server.log("cdn")) == 3 * (128 << 10)
    assert server.violations() == []


def test_a_model_in_a_folder_of_a_repository(server, model):
    write_model(model / "runs" / "step-20", TENSORS, LLAMA)
    checkpoint = published(server, model, "hf://org/a/runs/step-20")
    assert shapes(checkpoint) == shapes(open_checkpoint(model / "runs" / "step-20"))
    assert checkpoint.parts[0].source.step == 20


def test_one_file_of_a_repository(server, model):
    write_model(model / "sub", TENSORS, LLAMA)
    write_safetensors(model / "sub" / "other-7.safetensors", {"y": np.zeros(3, np.float32)})
    checkpoint = published(server, model, "hf://org/a/sub/other-7.safetensors")
    assert checkpoint.tensors.keys() == {"y"}
    assert (checkpoint.config, dict(checkpoint.side_files)) == (None, {})
    assert checkpoint.parts[0].source.step == 7
    assert opened(server, "hf://org/a/sub/model.safetensors").tensors.keys() == TENSORS.keys()


def test_a_revision(server, model):
    write_model(model, TENSORS, LLAMA)
    server.add_model("org/a", model)
    server.write("org/a", {"config.json": b'{"model_type": "other"}'}, revision="step-5")
    checkpoint = opened(server, "hf://org/a@step-5")
    assert checkpoint.config == {"model_type": "other"}
    assert checkpoint.parts[0].source.step == 5
    assert opened(server).config == LLAMA


def test_an_adapter(server, model):
    factors = {"base.lora_A.weight": np.zeros((2, 4), np.float32), "base.lora_B.weight": np.zeros((4, 2), np.float32)}
    model.mkdir()
    write_safetensors(model / "adapter_model.safetensors", factors)
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    checkpoint = published(server, model)
    assert checkpoint.is_adapter
    assert checkpoint.parts[0].source.is_adapter
    assert checkpoint.config["r"] == 2
    server.write("org/a", {"adapter_config.json": None})
    refused(SourceError, "no adapter_config.json", server)


def test_code_is_noted_and_not_fetched(server, model):
    config = {**LLAMA, "auto_map": {"AutoModel": "modeling_evil.Evil"}}
    write_model(model, TENSORS, config, side_files={"modeling_evil.py": "import os", "configuration_evil.py": ""})
    checkpoint = published(server, model)
    assert any("auto_map" in note for note in checkpoint.notes)
    assert not [name for name in checkpoint.side_files if name.endswith(".py")]
    assert server.log(path=r"\.py") == []


def test_a_model_that_is_named_twice_is_opened_once(server, model):
    write_model(model, TENSORS, LLAMA)
    server.add_model("org/a", model)
    sources = LocalSources(access=lambda: access(server))
    first, second = sources.members(["hf://org/a", "org/a"])
    assert sources.open(first) is sources.open(first)
    assert shapes(sources.open(second)) == shapes(sources.open(first))
    heads = server.log("api", "GET", "/api/models/org/a/revision/main")
    assert len(heads) == 1  # whichever way it is written


def test_a_folder_here_goes_before_a_name_there(server, model, monkeypatch):
    monkeypatch.chdir(model.parent)
    write_model(model.parent / "org" / "a", {"here": np.zeros(1, np.float32)}, LLAMA)
    server.write("org/a", {"config.json": b"{}"})
    sources = LocalSources(access=lambda: access(server))
    (member,) = sources.members("org/a")
    assert sources.open(member).tensors.keys() == {"here"}
    assert server.log() == []


# ---- steps and patterns -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("hf://org/model-7b", None),
        ("hf://org/a/step-10", 10),
        ("hf://org/a@v1/step-10", 10),
        ("hf://org/a@step-10", 10),
        ("hf://org/a@step-10/final", 10),
        ("hf://org/a/epoch-2-step-300", 300),
        ("hf://org/a@" + "1" * 40, None),
    ],
)
def test_steps_are_told_from_folders_and_revisions(text, step):
    assert hub_step(reference_of(text)) == step


def matched(server, pattern: str) -> list[str]:
    return [name.removeprefix("hf://org/a") for name in hub_matches(pattern, access(server))]


@pytest.fixture
def run(server):
    """A run as people publish them: steps as branches, as tags and as folders."""
    for step in (10, 9, 100, 1):
        server.write("org/a", {"config.json": b"%d" % step}, revision=f"step-{step}")
        server.write("org/a", {f"runs/step-{step}/config.json": b"{}", f"loose-{step}.safetensors": b"x"})
    server.write("org/a", {"runs/step-5.txt": b"no folder", "config.json": b"{}"})
    access(server).api().create_tag("org/a", tag="step-50", revision="main")
    return server


def test_revisions_are_taken_in_natural_order(run):
    assert matched(run, "hf://org/a@step-*") == ["@step-1", "@step-9", "@step-10", "@step-50", "@step-100"]
    assert matched(run, "org/a@step-?/sub") == ["@step-1/sub", "@step-9/sub"]


def test_folders_are_taken_in_natural_order(run):
    assert matched(run, "hf://org/a/runs/step-*") == [f"/runs/step-{step}" for step in (1, 9, 10, 100)]
    assert matched(run, "hf://org/a@main/ru*") == ["/runs"]
    assert matched(run, "hf://org/a@step-9/run*/") == ["@step-9/runs"]


def test_files_of_weights_are_matched_too(run):
    assert matched(run, "hf://org/a/loose-*") == [f"/loose-{step}.safetensors" for step in (1, 9, 10, 100)]


def test_branches_with_a_slash_are_found_again(run):
    run.write("org/a", {"config.json": b'{"a": 1}'}, revision="runs/step-7")
    (found,) = matched(run, "org/a@runs*")
    assert reference_of(f"hf://org/a{found}").revision == "runs/step-7"


def test_members_have_their_steps(run):
    sources = LocalSources(access=lambda: access(run))
    assert [member.step for member in sources.members("org/a@step-*")] == [1, 9, 10, 50, 100]
    assert [member.step for member in sources.members("hf://org/a/runs/step-*")] == [1, 9, 10, 100]


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("hf://org/a@none-*", "matches nothing"),
        ("hf://org/a/none-*", "matches nothing"),
        ("hf://org/a@step-*/runs-*", "two patterns"),
        ("hf://org/a/*/step-1", "before the last part"),
        ("hf://org/*", "is not a model on the Hub"),
        ("hf://org/none/step-*", "is not on the Hub"),
        ("hf://org/none@step-*", "is not on the Hub"),
        ("hf://org/a/none/step-*", "no such file or folder"),
    ],
)
def test_patterns_that_find_nothing_say_why(run, pattern, says):
    with pytest.raises(SourceError, match=says):
        hub_matches(pattern, access(run))


# ---- refusals -----------------------------------------------------------------------------------------


def test_a_repository_without_weights(server):
    server.write("org/a", {"config.json": b"{}"})
    refused(SourceError, "holds no safetensors weights", server)


def test_a_repository_with_pickles_only(server):
    server.write("org/a", {"config.json": b"{}", "pytorch_model.bin": b"\x80\x02."})
    error = refused(PickledWeights, "pytorch_model.bin", server)
    assert "save_pretrained" in error.remedy
    refused(PickledWeights, "is a pickle", server, "hf://org/a/pytorch_model.bin")
    assert server.log(path="/resolve/") == []


def test_a_file_or_folder_that_is_not_there(server, model):
    write_model(model, TENSORS, LLAMA)
    server.add_model("org/a", model)
    refused(SourceError, "is not in the repository", server, "hf://org/a/other.safetensors")
    refused(SourceError, "has no such file or folder", server, "hf://org/a/step-1")


@pytest.mark.parametrize(
    "name", ["../../../../api/whoami-v2", "../x.safetensors", "/x.safetensors", "sub/x.safetensors"]
)
def test_an_index_that_leads_elsewhere(server, model, name):
    write_model(model, TENSORS, LLAMA, shards=2)
    write_index(model, {**dict.fromkeys(TENSORS, weights(model)[0].name), "model.norm.weight": name})
    server.add_model("org/a", model)
    refused(FormatError, "not a safetensors file in the same folder", server)
    assert server.log("cdn", "GET", "safetensors") == []
    assert server.log("api", path="whoami") == []


def test_an_index_that_names_a_file_that_is_missing(server, model):
    write_model(model, TENSORS, LLAMA, shards=2)
    weights(model)[1].unlink()
    server.add_model("org/a", model)
    refused(FormatError, "names model-00002-of-00002.safetensors, which is not in the folder", server)


def test_an_index_that_disagrees_with_the_files(server, model):
    write_model(model, TENSORS, LLAMA, shards=2)
    write_index(model, dict.fromkeys(TENSORS, weights(model)[0].name))
    server.add_model("org/a", model)
    refused(FormatError, "is in model-0000", server)


@pytest.mark.parametrize(
    "content",
    [b"", b"short", struct.pack("<Q", 1 << 60) + b"{}", b"\xff" * 100_000, struct.pack("<Q", 4) + b"{[]}" + b"x" * 100],
)
def test_weights_that_are_none(server, content):
    server.write("org/a", {"config.json": b"{}", "model.safetensors": content})
    error = refused(FormatError, ".", server)
    assert error.where.endswith("/model.safetensors")


def test_a_file_that_is_cut_or_padded(server, model):
    write_model(model, TENSORS, LLAMA)
    whole = (model / "model.safetensors").read_bytes()
    for content, says in ((whole[:-1], "is truncated"), (whole + b"x", "has bytes after its last tensor")):
        server.write("org/a", {"config.json": b"{}", "model.safetensors": content})
        refused(FormatError, says, server)


def test_a_tree_that_lies_about_a_size(server, model):
    write_model(model, TENSORS, LLAMA)
    server.add_model("org/a", model)
    size = (model / "model.safetensors").stat().st_size
    server.lie_about_size("org/a", "model.safetensors", size - 100)
    refused(SourceChanged, f"has {size:,} bytes", server)
    server.lie_about_size("org/a", "model.safetensors", size + 100)
    refused(SourceChanged, f"has {size:,} bytes", server)


def test_a_link_is_the_text_that_it_is(server):
    server.write("org/a", {"config.json": b"{}"})
    server.add_link("org/a", "model.safetensors", "../../../../etc/passwd")
    refused(FormatError, "header", server)


def test_a_config_that_is_a_link(server, model):
    write_model(model, TENSORS)
    server.add_model("org/a", model)
    server.add_link("org/a", "config.json", "/etc/hostname")
    refused(FormatError, "is not readable JSON", server)


def test_a_tensor_that_two_files_hold(server, model):
    write_model(model, TENSORS, LLAMA, shards=2)
    write_safetensors(weights(model)[1], TENSORS)
    server.add_model("org/a", model)
    refused(FormatError, "is also in", server)


def test_what_the_headers_of_many_files_say_is_checked_as_for_folders(server, model):
    model.mkdir()
    write_header(model / "model.safetensors", {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, b"x" * 12)
    server.add_model("org/a", model)
    refused(FormatError, "overlaps", server)


def test_a_header_that_cannot_be_fetched_is_told_with_its_file(server, model):
    write_model(model, TENSORS, LLAMA, shards=3)
    server.add_model("org/a", model)
    server.faults.add(origin="api", method="HEAD", path="00002-of", status=403, headers={"X-Error-Message": "no"})
    with pytest.raises(MergerError, match="HTTP 403 no") as caught:
        opened(server)
    assert "model-00002-of-00003.safetensors" in caught.value.where

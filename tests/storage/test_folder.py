import json
import os

import numpy as np
import pytest

from merger.errors import FormatError, PickledWeights, SourceError
from merger.storage import folder as reader
from merger.storage.folder import open_folder, read_json
from merger.storage.safetensors import read_header
from tests.checkpoints import read_raw, write_index, write_model, write_safetensors

TENSORS = {f"layers.{i}.weight": np.full((2, 3), i, np.float32) for i in range(7)}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "model"


def names_of(model):
    return {file.path.name: set(file.header.tensors) for file in model.files}


def refused(path, kind=FormatError, *, where, says):
    with pytest.raises(kind, match=says) as caught:
        open_folder(path)
    assert type(caught.value) is kind
    assert caught.value.where == str(where)
    assert caught.value.remedy
    return caught.value


# ---- weights ------------------------------------------------------------------------------------------


def test_a_model_in_one_file(folder):
    model = open_folder(write_model(folder, TENSORS, {"model_type": "llama"}))
    assert model.label == str(folder)
    assert model.config == {"model_type": "llama"}
    assert names_of(model) == {"model.safetensors": set(TENSORS)}
    assert model.files[0].header == read_header(folder / "model.safetensors")
    assert model.files[0].mtime_ns == (folder / "model.safetensors").stat().st_mtime_ns


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_a_model_in_several_files(folder, shards):
    model = open_folder(write_model(folder, TENSORS, shards=shards))
    assert names_of(model) == {path.name: set(read_raw(path)) for path in folder.glob("*.safetensors")}
    assert [file.path.name for file in model.files] == sorted(path.name for path in folder.glob("*.safetensors"))


def test_a_model_that_transformers_has_sharded(llama_run, tmp_path):
    from transformers import LlamaForCausalLM  # seconds

    whole = llama_run("bfloat16") / "step-100"
    LlamaForCausalLM.from_pretrained(whole).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    files = open_folder(tmp_path / "sharded").files
    assert len(files) > 2
    found = {name: (it.dtype, it.shape) for file in files for name, it in file.header.tensors.items()}
    assert found == {name: (dtype, shape) for name, (dtype, shape, _) in read_raw(whole / "model.safetensors").items()}


def test_weights_by_another_name_where_there_is_one_file(folder):
    write_model(folder, TENSORS)
    (folder / "model.safetensors").rename(folder / "step-100.safetensors")
    assert names_of(open_folder(folder)) == {"step-100.safetensors": set(TENSORS)}


def test_one_file_without_its_folder(folder):
    write_model(folder, TENSORS, {"model_type": "llama"}, side_files={"tokenizer.json": "{}", "optimizer.pt": ""})
    model = open_folder(folder / "model.safetensors")
    assert names_of(model) == {"model.safetensors": set(TENSORS)}
    assert (model.config, model.side_files, model.training_state) == (None, {}, ())


def test_files_that_no_index_names_are_left_alone(folder):
    write_model(folder, TENSORS, shards=2)
    write_safetensors(folder / "consolidated.safetensors", TENSORS)
    assert set(names_of(open_folder(folder))) == {FIRST, SECOND}


def test_a_model_file_counts_before_others_without_an_index(folder):
    write_model(folder, TENSORS)
    write_safetensors(folder / "adapter.safetensors", {"a": np.zeros(2)})
    assert set(names_of(open_folder(folder))) == {"model.safetensors"}


def test_links_are_followed(folder, tmp_path):
    # The cache of the Hub is made of links.
    write_model(tmp_path / "blobs", TENSORS, {"model_type": "llama"}, side_files={"tokenizer.json": "{}"})
    folder.mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (folder / path.name).symlink_to(path)
    model = open_folder(folder)
    assert names_of(model) == {"model.safetensors": set(TENSORS)}
    assert model.side_files == {"tokenizer.json": folder / "tokenizer.json"}


# ---- refusals -----------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there(folder):
    refused(folder, SourceError, where=folder, says="is not there")


def test_an_empty_folder(folder):
    folder.mkdir()
    refused(folder, SourceError, where=folder, says="holds no safetensors weights")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth", "a.ckpt"]
)
def test_pickles_are_refused_with_the_way_out(folder, name):
    folder.mkdir()
    (folder / name).write_bytes(b"\x80\x02.")
    error = refused(folder, PickledWeights, where=folder, says=name)
    assert "save_pretrained" in error.remedy


def test_pickles_beside_safetensors_are_left_alone(folder):
    write_model(folder, TENSORS, side_files={"pytorch_model.bin": b"\x80\x02."})
    assert set(names_of(open_folder(folder))) == {"model.safetensors"}


def test_the_pickle_that_is_named_is_that_of_the_weights(folder):
    folder.mkdir()
    for name in ("optimizer.pt", "pytorch_model.bin", "training_args.bin"):
        (folder / name).write_bytes(b"\x80\x02.")
    refused(folder, PickledWeights, where=folder, says=r"\(pytorch_model.bin\)")


def test_training_state_alone_is_no_pickled_model(folder):
    folder.mkdir()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(b"\x80\x02.")
    refused(folder, SourceError, where=folder, says="holds no safetensors weights")


def test_several_files_without_an_index(folder):
    write_model(folder, TENSORS, shards=2)
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, SourceError, where=folder, says="2 safetensors files and no index")


def test_two_sets_of_weights(folder):
    write_model(folder, TENSORS, shards=2)
    write_model(folder, TENSORS)
    error = refused(folder, SourceError, where=folder, says="more than one set of weights")
    assert "model.safetensors.index.json, model.safetensors" in error.message


def test_two_indexes(folder):
    write_model(folder, TENSORS, shards=2)
    (folder / "model.fp16.safetensors.index.json").write_text("{}")
    refused(folder, SourceError, where=folder, says="more than one set of weights")


def test_an_index_that_names_a_missing_file(folder):
    write_model(folder, TENSORS, shards=2)
    (folder / SECOND).unlink()
    index = folder / "model.safetensors.index.json"
    error = refused(folder, where=index, says=f"names {SECOND}, which is not in the folder")
    assert "Download" in error.remedy


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "x\0.safetensors",
        ".safetensors",
        "",
        "..",
        "model.bin",
        "config.json",
    ],
)
def test_an_index_that_leads_out_of_the_folder(folder, name):
    write_model(folder, TENSORS, shards=2)
    for outside in (folder.parent / "x.safetensors", folder / "x.safetensors"):
        write_safetensors(outside, TENSORS)
    index = write_index(folder, {**dict.fromkeys(TENSORS, FIRST), "layers.0.weight": name})
    refused(folder, where=index, says="which is not a safetensors file in the same folder")


def test_an_index_with_the_absolute_path_of_its_own_file(folder):
    write_model(folder, TENSORS, shards=2)
    index = write_index(folder, dict.fromkeys(TENSORS, str(folder / FIRST)))
    refused(folder, where=index, says="which is not a safetensors file in the same folder")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: index.pop("layers.1.weight"), "'layers.1.weight' is in no file, it is in " + SECOND),
        (lambda index: index.update(extra=FIRST), f"'extra' is in {FIRST}, it is in no file"),
        (
            lambda index: index.update({"layers.0.weight": SECOND}),
            f"'layers.0.weight' is in {SECOND}, it is in {FIRST}",
        ),
    ],
    ids=["one missing", "one too many", "in the other file"],
)
def test_an_index_that_disagrees_with_the_files(folder, change, says):
    write_model(folder, TENSORS, shards=2)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    change(weight_map)
    refused(folder, where=write_index(folder, weight_map), says=says)


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": null}', '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}']
)
def test_an_index_without_a_map(folder, content):
    write_model(folder, TENSORS, shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(content)
    refused(folder, where=index, says="has no `weight_map`")


def test_a_tensor_that_two_files_hold(folder):
    write_model(folder, TENSORS, shards=2)
    write_safetensors(folder / SECOND, TENSORS)
    with pytest.raises(FormatError, match=r"layers\.\d\.weight"):
        open_folder(folder)


def test_a_damaged_file_among_good_ones(folder):
    write_model(folder, TENSORS, shards=2)
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1)
    refused(folder, where=folder / SECOND, says="is truncated")


# ---- config and json ----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "null", "\udcff", "[" * 100_000])
def test_a_config_that_is_no_object(folder, content):
    write_model(folder, TENSORS)
    (folder / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    refused(folder, where=folder / "config.json", says="JSON")


def test_json_that_cannot_be_read(tmp_path):
    with pytest.raises(FormatError, match="not readable") as caught:
        read_json(tmp_path / "nothing.json")
    assert caught.value.where == str(tmp_path / "nothing.json")


def test_a_model_without_config(folder):
    assert open_folder(write_model(folder, TENSORS)).config is None


# ---- what lies beside ---------------------------------------------------------------------------------

CARRIED = [
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "qwen.tiktoken",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
]
LEFT = [
    "LICENSE.py",
    "README.md",
    "configuration_llama.py",
    "events.out.tfevents.1",
    "merger.json",
    "modeling_llama.py",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "run.sh",
    "trainer_state.json",
]
STATE = [
    "global_step100",
    "optimizer.bin",
    "optimizer.pt",
    "rng_state_0.pth",
    "scaler.pt",
    "scheduler.pt",
    "training_args.bin",
]


def test_what_belongs_to_the_model_is_carried_and_nothing_else(folder):
    side_files = dict.fromkeys([*CARRIED, *LEFT, *STATE], "text")
    model = open_folder(write_model(folder, TENSORS, {"model_type": "llama"}, side_files=side_files))
    assert model.side_files == {name: folder / name for name in CARRIED}
    assert list(model.side_files) == CARRIED


def test_training_state_is_listed(folder):
    write_model(folder, TENSORS, side_files=dict.fromkeys(STATE, "state"))
    (folder / "optimizer").mkdir()
    assert open_folder(folder).training_state == tuple(sorted([*STATE, "optimizer"]))


def test_folders_and_huge_files_are_not_carried(folder, monkeypatch):
    monkeypatch.setattr(reader, "MAX_SIDE_FILE", 10)
    write_model(folder, TENSORS, side_files={"tokenizer.json": "x" * 10, "vocab.json": "x" * 11})
    (folder / "folder.json").mkdir()
    assert list(open_folder(folder).side_files) == ["tokenizer.json"]


def test_a_link_to_nothing_is_not_carried(folder):
    write_model(folder, TENSORS)
    (folder / "tokenizer.json").symlink_to(folder / "gone.json")
    assert open_folder(folder).side_files == {}

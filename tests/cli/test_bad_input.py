"""Wrong input through the real command: exit code 2, one clear message with a remedy, nothing written."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import write_header, write_index, write_model, write_safetensors

RECIPE = {"method": "average", "checkpoints": ["a", "b"], "output": {"path": "out"}}
ONES = np.ones((4, 8), np.float32)
TENSORS = {"model.embed_tokens.weight": ONES, "model.norm.weight": np.ones(8, np.float32)}
CONFIG = {"model_type": "llama", "tie_word_embeddings": False}


@pytest.fixture
def models(tmp_path) -> Path:
    """A folder with two good models, `a` and `b`."""
    for name in ("a", "b"):
        write_model(tmp_path / name, TENSORS, CONFIG)
    return tmp_path


def refused(folder: Path, *says: str, recipe: object = RECIPE, options: tuple[str, ...] = ()) -> str:
    """Run the recipe; see that it is refused with these words and that nothing was written. Returns the message."""
    text = recipe if isinstance(recipe, str) else json.dumps(recipe)
    (folder / "recipe.yaml").write_text(text)
    before = sorted(folder.rglob("*"))
    command = [sys.executable, "-m", "merger", "run", "recipe.yaml", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    assert sorted(folder.rglob("*")) == before
    for words in says:
        assert words in done.stderr
    message, _, remedy = done.stderr[done.stderr.index("error:") :].strip().partition("\n")
    assert message
    assert remedy
    return done.stderr


# ---- files --------------------------------------------------------------------------------------------


def test_a_truncated_shard(models):
    path = models / "b" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 5)
    refused(models, "b/model.safetensors", "is truncated", "Download")


def test_a_header_of_100_megabytes(models):
    with (models / "b" / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 100 << 20))
        file.truncate(200 << 20)
    refused(models, "b/model.safetensors", "header of 104,857,600 bytes")


def test_tensors_that_overlap(models):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    write_header(models / "b" / "model.safetensors", {"x": entry, "y": {**entry, "data_offsets": [4, 12]}}, bytes(12))
    refused(models, "b/model.safetensors: tensor 'y'", "overlaps")


def sharded(folder: Path) -> dict[str, str]:
    (folder / "model.safetensors").unlink()
    write_model(folder, TENSORS, CONFIG, shards=2)
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_an_index_that_names_a_missing_file(models):
    weight_map = sharded(models / "b")
    (models / "b" / sorted(weight_map.values())[1]).unlink()
    refused(
        models, "b/model.safetensors.index.json", "model-00002-of-00002.safetensors", "not in the folder", "Download"
    )


@pytest.mark.parametrize("name", ["../a/model.safetensors", "/etc/passwd", "x/model.safetensors", "model.bin"])
def test_an_index_that_leads_elsewhere(models, name):
    weight_map = sharded(models / "b")
    write_index(models / "b", {**weight_map, "model.norm.weight": name})
    refused(models, "b/model.safetensors.index.json", name, "same folder")


def test_pickled_weights(models):
    (models / "b" / "model.safetensors").rename(models / "b" / "pytorch_model.bin")
    refused(models, "b: has its weights in pickles (pytorch_model.bin)", "save_pretrained")


@pytest.mark.parametrize("reference", ["hf://org/name", "org/name"])
def test_a_hub_that_cannot_be_reached(models, reference):
    (models / "recipe.yaml").write_text(json.dumps({**RECIPE, "checkpoints": ["a", reference]}))
    command = [sys.executable, "-m", "merger", "run", "recipe.yaml"]
    done = subprocess.run(command, cwd=models, capture_output=True, text=True, check=False)
    assert done.returncode == (1 if reference.startswith("hf:") else 2)  # a path is more likely a mistake
    assert "the Hub cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (models / "out").exists()


def test_a_folder_that_is_not_there(models):
    refused(models, "nowhere: is not there", recipe={**RECIPE, "checkpoints": ["a", "./nowhere"]})


def test_a_pattern_that_matches_nothing(models):
    refused(models, "runs/step-*: matches no folder", "holds a, b", recipe={**RECIPE, "checkpoints": "runs/step-*"})


@pytest.mark.parametrize("method", ["ratatouille", "warm"])
def test_a_task_that_is_not_installed(models, method):
    (models / "rows.jsonl").write_text('{"chosen": [5], "rejected": [6]}')
    own = {"ratatouille": {"target": "rows.jsonl"}, "warm": {"data": "rows.jsonl", "checkpoints": ["a", "b"]}}
    recipe = {
        "method": method,
        "training": {"task": "prefs", "folder": "work", **own[method]},
        "output": {"path": "out"},
    }
    recipe |= {"base": "a"} if method == "ratatouille" else {}
    there = "There are text, classification, preferences; of installed packages none."
    refused(models, "training.task: 'prefs' is no task to train on", there, recipe=recipe)


# ---- models that do not fit together ------------------------------------------------------------------


def test_shapes_that_differ(models):
    write_model(models / "b", {**TENSORS, "model.norm.weight": np.ones(9, np.float32)}, CONFIG)
    refused(models, "tensor 'model.norm.weight'", "[8] in a and [9] in b", "Average checkpoints of one model")


def test_vocabularies_of_different_sizes(models):
    write_model(models / "b", {**TENSORS, "model.embed_tokens.weight": np.ones((5, 8), np.float32)}, CONFIG)
    refused(models, "tensor 'model.embed_tokens.weight'", "vocabularies have different sizes")


def test_vocabularies_with_other_tokens(models):
    for name, ids in (("a", {"x": 0, "y": 1}), ("b", {"x": 1, "y": 0})):
        (models / name / "vocab.json").write_text(json.dumps(ids))
    refused(models, "token 'x' has the id 0 in one and 1 in the other")


def test_a_tensor_that_one_of_them_lacks(models):
    write_model(models / "b", {**TENSORS, "more": ONES}, CONFIG)
    refused(models, "tensor 'more': is missing in a")


def test_integers_that_differ(models):
    for name, last in (("a", 3), ("b", 4)):
        write_model(models / name, {**TENSORS, "position_ids": np.array([0, 1, 2, last])}, CONFIG)
    refused(models, "tensor 'position_ids'", "a/model.safetensors and b/model.safetensors", "Integers are copied")


def test_models_of_other_families(models):
    write_model(models / "b", TENSORS, {"model_type": "qwen2"})
    refused(models, "model_type is llama in a and qwen2 in b")


def test_quantized_models(models):
    write_model(models / "b", TENSORS, {**CONFIG, "quantization_config": {"bits": 4}})
    refused(models, "b: is quantized", "Dequantize")


def test_nan_when_strict(models):
    write_model(models / "b", {**TENSORS, "model.norm.weight": np.full(8, np.nan, np.float32)}, CONFIG)
    refused(models, "b/model.safetensors: tensor 'model.norm.weight'", "NaN", "--strict", options=("--strict",))


def test_configs_that_differ_when_strict(models):
    write_model(models / "b", TENSORS, {**CONFIG, "rope_theta": 5e5})
    refused(models, "rope_theta is None in a and 500000.0 in b", options=("--strict",))


# ---- recipes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("metod: lawa\ncheckpoints: x\n", ["method: is missing", "'metod'", "did you mean 'method'"]),
        ("method: lwa\ncheckpoints: x\n", ["'lwa' is no method", "did you mean 'lawa'"]),
        ("method: lawa\nchekpoints: x\n", ["chekpoints: is not a field", "did you mean 'checkpoints'"]),
        ("method: lawa\ncheckpoints: a\nk: many\n", ["k: ", "integer"]),
        ("method: lawa\ncheckpoints: a\nk: 0\n", ["k: ", "greater than or equal to 1"]),
        ("method: lawa\ncheckpoints: a\nk: 1\nk: 2\n", ["the key 'k' stands twice"]),
        (
            "method: lawa\ncheckpoints: [a, {method: ema, checkpoints: a, dekay: 1}]\n",
            ["checkpoints[1].dekay", "'decay'"],
        ),
        ("method: lawa\ncheckpoints: a\noutput: {pth: out}\n", ["output.pth", "did you mean 'path'"]),
        ("method: lawa\ncheckpoints: a\noutput: {path: out, shard_size: big}\n", ["output.shard_size", "5GB"]),
        ("method: average\ncheckpoints: [a, b]\n", ["output.path: is missing", "-o"]),
        ("merge_methd: linear\nmodels: []\n", ["method: is missing", "'merge_methd'", "did you mean 'merge_method'"]),
        ("- a\n- b\n", ["recipe.yaml", "not a mapping"]),
        ("method: [\n", ["recipe.yaml", "is not YAML"]),
    ],
)
def test_recipes_that_are_not_well_formed(models, recipe, says):
    refused(models, *says, recipe=recipe)


AB = "models: [{model: a}, {model: b}]\nparameters: {weight: 1}\noutput: {path: out}\n"


@pytest.mark.parametrize(
    ("configuration", "says"),
    [
        (f"merge_method: lineer\n{AB}", ["merge_method: 'lineer' is no merge method", "did you mean 'linear'"]),
        (f"merge_method: linear\ndtypo: float16\n{AB}", ["dtypo: is not a field", "did you mean 'dtype'"]),
        (
            "merge_method: linear\nmodels: [{model: a}, {model: b, parameters: {wieght: 1}}]\n",
            ["models[1].parameters.wieght: is no parameter of linear", "did you mean 'weight'"],
        ),
        (
            "merge_method: passthrough\nmodels: [{model: a}, {model: b}]\n",
            ["models: passthrough merges exactly 1 models, not 2"],
        ),
        (
            "merge_method: linear\nmodels: [{model: a}, {model: b}]\noutput: {path: out}\n",
            ["models[0].parameters.weight: is missing for 'model.embed_tokens.weight'"],
        ),
        (f"name: one\nmerge_method: linear\n{AB}---\nmerge_method: linear\n{AB}", ["'one' is not used"]),
    ],
)
def test_mergekit_configurations_that_cannot_run(models, configuration, says):
    refused(models, *says, recipe=configuration)


def test_layers_that_are_not_there(tmp_path, llama_run):
    for name in "ab":
        shutil.copytree(llama_run() / "step-300", tmp_path / name)
    sources = [{"model": "a", "layer_range": [0, 1]}, {"model": "b", "layer_range": [2, 3]}]
    recipe = {
        "merge_method": "linear",
        "slices": [{"sources": sources}],
        "parameters": {"weight": 1},
        "output": {"path": "x"},
    }
    refused(tmp_path, "slices[0].sources[1].layer_range: [2, 3] exceeds the 2 layers of b", recipe=recipe)
    sources[1]["layer_range"] = [0, 2]
    refused(tmp_path, "slices[0].sources[1].layer_range: [0, 2] has 2 layers, and sources[0] has 1", recipe=recipe)


def test_a_recipe_that_is_not_there(tmp_path):
    command = [sys.executable, "-m", "merger", "run", "nowhere.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "nowhere.yaml: cannot be read: No such file" in done.stderr


# ---- output and resources -----------------------------------------------------------------------------


def test_an_output_folder_that_holds_something_else(models):
    (models / "out").mkdir()
    (models / "out" / "thesis.txt").write_text("precious")
    refused(models, "out: holds something else (thesis.txt)", "Choose another folder")
    assert (models / "out" / "thesis.txt").read_text() == "precious"


def test_an_output_that_is_a_file(models):
    (models / "out").write_text("precious")
    refused(models, "out: is a file")


def test_a_budget_that_cannot_work(models):
    message = refused(models, "--memory", "too few", "Allow at least", options=("--memory", "10KiB"))
    enough = message.rsplit("--memory ", 1)[1].strip().rstrip(".")
    command = [sys.executable, "-m", "merger", "run", "recipe.yaml", "--memory", enough]
    assert subprocess.run(command, cwd=models, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_will_be_too_small(models):
    disk = models / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this machine mounts no tmpfs")
    try:
        for name in ("a", "b"):
            write_model(models / name, {"x": np.ones(100_000, np.float32)}, CONFIG)
        refused(models, "disk/out: the result needs 4", "the disk has", "Free some space", options=("-o", "disk/out"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- surgery ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"method": "upcycle", "experts": 4, "experts_per_token": 5}, "5 is more than the 4 experts"),
        ({"method": "upcycle", "expansion": 2, "granularity": 5}, "5 does not divide d_ff 64"),
        ({"method": "upcycle", "experts": 4, "router": "zero"}, "a router of zeros ties all experts"),
        ({"method": "upcycle", "experts": 4, "target": "phimoe"}, "llama cannot become phimoe"),
        ({"method": "expand", "groups": 3}, "3 does not divide the 2 layers"),
        ({"method": "stack", "slices": [{"source": "dense", "layers": "0-2"}]}, "2 is no layer"),
    ],
)
def test_surgery_that_cannot_be_done(tmp_path, llama_run, recipe, says):
    shutil.copytree(llama_run() / "step-300", tmp_path / "dense")
    source = {} if "slices" in recipe else {"source": "dense"}
    refused(tmp_path, says, recipe={**recipe, **source, "output": {"path": "out"}})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantized"),
        ({"model_type": "gpt2"}, "its MLP is not gated"),
    ],
)
def test_models_that_cannot_be_upcycled(tmp_path, llama_run, change, says):
    shutil.copytree(llama_run() / "step-300", tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps({**config, **change}))
    refused(tmp_path, says, recipe={"method": "upcycle", "source": "dense", "experts": 4, "output": {"path": "out"}})


# ---- adapters -----------------------------------------------------------------------------------------


def write_adapter(folder: Path, name: str, **config: object) -> Path:
    """A LoRA adapter of rank 2 for one module, as PEFT lays it out."""
    (folder / name).mkdir()
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
    (folder / name / "adapter_config.json").write_text(json.dumps(said))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{module}.lora_A.weight": ONES[:2], f"{module}.lora_B.weight": ONES[:, :2]}
    write_safetensors(folder / name / "adapter_model.safetensors", tensors)
    return folder / name


LORA = {"method": "lora", "adapters": ["x", "y"], "output": {"path": "out"}}


def test_an_average_of_adapters(models):
    for name in "xy":
        write_adapter(models, name)
    refused(models, "x: is an adapter", "`method: lora` adds adapters", recipe={**RECIPE, "checkpoints": ["x", "y"]})


def test_an_adapter_that_is_not_linear(models):
    write_adapter(models, "x")
    write_adapter(models, "y", use_dora=True)
    refused(models, "y: is a DoRA", "docs/lora.md", recipe=LORA)


def test_an_adapter_for_another_model(models):
    for name in "xy":
        write_adapter(models, name)
    says = "tensor 'model.layers.0.self_attn.q_proj.weight': is changed by the adapters, and a has no such tensor"
    refused(models, says, "Name the adapters' own base", recipe={**LORA, "base": "a"})


def test_an_adapter_whose_rank_is_not_what_its_config_says(models):
    write_adapter(models, "x")
    write_adapter(models, "y", r=3)
    refused(models, "y: model.layers.0.self_attn.q_proj", "where the config says rank 3", recipe=LORA)


def test_an_adapter_that_is_a_pickle(models):
    write_adapter(models, "x")
    (write_adapter(models, "y") / "adapter_model.safetensors").rename(models / "y" / "adapter_model.bin")
    refused(models, "y/adapter_model.bin: is a pickle", "save_pretrained", recipe=LORA)


# ---- files of mergekit-moe ----------------------------------------------------------------------------


def test_a_file_of_mergekit_moe_without_prompts_or_with_an_unknown_key(models):
    expert = {"source_model": "a", "positive_prompts": ["x"]}
    recipe = {"base_model": "a", "experts": [expert, {"source_model": "b"}], "output": {"path": "out"}}
    refused(models, "experts[1].positive_prompts: is missing", "`random` needs none", recipe=recipe)
    refused(models, "gate_mod: is not a field; did you mean 'gate_mode'?", recipe={**recipe, "gate_mod": "random"})
    recipe = {**recipe, "experts": [expert, {**expert, "negative_prompt": ["y"]}]}
    says = "experts[1].negative_prompt: is not a field; did you mean 'negative_prompts'?"
    refused(models, says, recipe=recipe)
    refused(models, "base_model: field required", recipe={"experts": [expert, expert], "output": {"path": "out"}})

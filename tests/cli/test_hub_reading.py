"""`merger run` and `merger plan` with models on a Hub: the bytes of a local run, fetched once, whatever goes wrong."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from merger.cli.main import merger_command
from merger.errors import MergerError, OutputOccupied, ReadFailed
from merger.storage import patience, ranges, xet
from merger.storage.hub import library
from tests.checkpoints import bfloat16, write_model
from tests.hub_server.fixtures import environment, hub

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def llama(folder: Path, seed: int, shards: int, dtype: str = "BF16") -> Path:
    """A model of a dozen megabytes, its matrices in a dtype, its norms in float32."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> Any:
        values = rng.standard_normal((rows, columns), np.float32)
        return bfloat16(values) if dtype == "BF16" else values

    tensors: dict[str, Any] = {"model.embed_tokens.weight": matrix(2000, 256), "lm_head.weight": matrix(2000, 256)}
    for i in range(6):
        layer = f"model.layers.{i}"
        for name in "qkvo":
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = matrix(256, 256)
        tensors[f"{layer}.mlp.gate_proj.weight"] = matrix(688, 256)
        tensors[f"{layer}.mlp.up_proj.weight"] = matrix(688, 256)
        tensors[f"{layer}.mlp.down_proj.weight"] = matrix(256, 688)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{name}.weight"] = rng.standard_normal(256).astype(np.float32)
    tensors["model.norm.weight"] = rng.standard_normal(256).astype(np.float32)
    return write_model(folder, tensors, LLAMA, shards, side_files={"tokenizer.json": "{}"})


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two models that lie in their files differently, and one of them in float32."""
    folder = tmp_path_factory.mktemp("models")
    llama(folder / "a", 1, shards=3)
    llama(folder / "b", 2, shards=5)
    llama(folder / "wide", 2, shards=2, dtype="F32")
    return folder


def use(monkeypatch, server, tmp_path: Path, mode: str) -> None:
    """What the environment says, to a process that has read it already; short waits."""
    constants = library().constants
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", mode == "lfs")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "20ms")
    monkeypatch.setattr(xet, "_GROUPS", xet._Groups())
    monkeypatch.setattr(ranges, "ADDRESSES", ranges.Addresses())
    monkeypatch.setattr(patience, "_FIRST", 0.005)
    monkeypatch.setattr(patience, "_LONGEST", 0.01)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)


@pytest.fixture(params=["lfs", "xet"])
def server(request, tmp_path, models, monkeypatch) -> Iterator:
    with hub(tmp_path, request.param) as one:
        for folder in models.iterdir():
            one.add_model(f"org/{folder.name}", folder)
        use(monkeypatch, one, tmp_path, request.param)
        yield one


@pytest.fixture
def lfs(tmp_path, models, monkeypatch) -> Iterator:
    """A server where Xet plays no part."""
    with hub(tmp_path) as one:
        for folder in models.iterdir():
            one.add_model(f"org/{folder.name}", folder)
        use(monkeypatch, one, tmp_path, "lfs")
        yield one


def merger(verb: str, tmp_path: Path, recipe: dict[str, Any], *options: str) -> Result:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    return CliRunner().invoke(merger_command, [verb, str(path), *options])


def made(tmp_path: Path, recipe: dict[str, Any], name: str, *options: str) -> dict[str, bytes]:
    """The weights that a recipe makes."""
    document = {**recipe, "output": {"path": str(tmp_path / name), "shard_size": "4MB", **recipe.get("output", {})}}
    done = merger("run", tmp_path, document, *options)
    assert done.exit_code == 0, repr(done)
    return {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors*")}


@pytest.fixture(scope="module")
def local(models, tmp_path_factory) -> dict[str, bytes]:
    """The average of the two, made of folders here."""
    return made(tmp_path_factory.mktemp("local"), average(models / "a", models / "b"), "here")


def average(*parents: object, **more: Any) -> dict[str, Any]:
    return {"method": "average", "checkpoints": [str(parent) for parent in parents], "weights": [0.3, 0.7], **more}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def fetched(server) -> int:
    return sum(entry.sent for entry in server.log("cdn"))


# ---- the same bytes -----------------------------------------------------------------------------------


def test_the_result_is_that_of_local_models_and_each_byte_comes_once(server, models, local, tmp_path):
    there = made(tmp_path, average("org/a", "hf://org/b"), "there")
    assert there == local
    assert len(there) > 3
    headers = 8 * (128 << 10) + 2 * (1 << 20)  # and what is compared beforehand to see whether they are kin
    assert fetched(server) <= 1.05 * (size(models / "a") + size(models / "b")) + headers
    assert server.violations() == []
    assert {entry.token for entry in server.log("cdn")} == {None}


def test_parents_of_other_dtypes(server, models, tmp_path):
    recipe = {"output": {"dtype": "float32"}}
    there = made(tmp_path, average("org/a", "org/wide", **recipe), "there")
    assert there == made(tmp_path, average(models / "a", models / "wide", **recipe), "here")


def test_a_parent_here_and_one_there(lfs, models, local, tmp_path):
    there = made(tmp_path, average(models / "a", "hf://org/b"), "there")
    assert there == local


@pytest.mark.parametrize(
    "options", [["--memory", "16MiB"], ["--threads", "1"], ["--memory", "64MiB", "--threads", "8"]]
)
def test_memory_and_threads_do_not_matter(lfs, models, local, tmp_path, options):
    there = made(tmp_path, average("org/a", "org/b"), "there", *options)
    assert there == local


def test_a_resolve_for_each_file(lfs, tmp_path):
    made(tmp_path, average("org/a", "org/b"), "there")
    assert len(lfs.log("api", "HEAD", "safetensors$")) == 8


def test_a_token_for_each_repository(models, tmp_path, monkeypatch):
    with hub(tmp_path, "xet") as server:
        for name in ("a", "b"):
            server.add_model(f"org/{name}", models / name)
        use(monkeypatch, server, tmp_path, "xet")
        made(tmp_path, average("org/a", "org/b"), "there")
        assert len(server.log("api", path="xet-read-token")) == 2
        assert server.log("api", path="/resolve/.*safetensors$") == []


def test_addresses_that_expire_while_a_result_is_made(lfs, models, local, tmp_path):
    lfs.url_lifetime(0.2)
    there = made(tmp_path, average("org/a", "org/b"), "there", "--memory", "16MiB")
    assert there == local


# ---- what is not needed -------------------------------------------------------------------------------


def test_only_the_layers_that_are_used_are_fetched(server, models, tmp_path):
    slices = [{"source": "org/a", "layers": "0-1"}, {"source": "org/b", "layers": [5]}]
    local = [{**part, "source": str(models / part["source"][-1])} for part in slices]
    there = made(tmp_path, {"method": "stack", "slices": slices}, "there", "--parity", "off")
    assert there == made(tmp_path, {"method": "stack", "slices": local}, "here", "--parity", "off")
    used = sum(len(content) for name, content in there.items() if name.endswith(".safetensors"))
    assert fetched(server) <= 1.1 * used + 8 * (128 << 10) + 24 * (128 << 10)  # Xet rounds to its chunks


def test_a_plan_reads_headers_only(server, models, tmp_path):
    shown = merger("plan", tmp_path, {**average("org/a", "org/b"), "output": {"path": str(tmp_path / "o")}})
    assert shown.exit_code == 0, shown.output
    assert fetched(server) <= 8 * (128 << 10) + 2 * (1 << 20)
    assert not (tmp_path / "o").exists()


def test_a_result_that_is_complete_is_not_fetched_again(lfs, tmp_path):
    first = made(tmp_path, average("org/a", "org/b"), "there")
    lfs.clear_log()
    assert made(tmp_path, average("org/a", "org/b"), "there") == first
    assert fetched(lfs) < 3 << 20


def test_a_branch_that_has_moved_is_another_plan(lfs, models, tmp_path):
    made(tmp_path, average("org/a", "org/b"), "there")
    lfs.add_model("org/a", models / "b")
    recipe = {**average("org/a", "org/b"), "output": {"path": str(tmp_path / "there"), "shard_size": "4MB"}}
    assert isinstance(merger("run", tmp_path, recipe).exception, OutputOccupied)


# ---- what goes wrong ----------------------------------------------------------------------------------


FAILURES = ("500", "503", "429", "403", "cut", "drop")


@pytest.mark.parametrize("seed", range(3))
def test_a_run_through_random_failures_makes_the_right_bytes_or_says_what_failed(server, models, local, tmp_path, seed):
    recipe = average("org/a", "org/b", output={"path": str(tmp_path / "there"), "shard_size": "4MB"})
    server.faults.random(rate=0.1, seed=seed, kinds=FAILURES)
    done = merger("run", tmp_path, recipe)
    if done.exit_code:
        assert isinstance(done.exception, MergerError)
        assert done.exception.where
        assert server.token not in f"{done.output} {done.exception}"
    server.faults.clear()
    there = made(tmp_path, average("org/a", "org/b"), "there")
    assert there == local
    assert server.violations() == []


@pytest.mark.parametrize("seed", range(2))
def test_storage_that_fails_now_and_then_is_no_reason_to_fail(server, models, local, tmp_path, seed):
    for origin in ("cdn", "cas"):
        server.faults.random(rate=0.2, seed=seed, origin=origin, kinds=FAILURES)
    there = made(tmp_path, average("org/a", "org/b"), "there")
    assert there == local


def test_a_run_that_failed_goes_on_after_its_last_shard(lfs, models, tmp_path):
    lfs.faults.add(origin="cdn", nth=range(40, 10_000), status=500)
    recipe = average("org/a", "org/b", output={"path": str(tmp_path / "there"), "shard_size": "1MB"})
    done = merger("run", tmp_path, recipe, "--memory", "8MiB", "--threads", "1")
    assert isinstance(done.exception, ReadFailed)
    assert "failed 8 times" in done.exception.message
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "there").glob("*.safetensors")}
    assert finished
    lfs.faults.clear()
    small = {"shard_size": "1MB"}
    there = made(tmp_path, average("org/a", "org/b", output=small), "there")
    assert there == made(tmp_path, average(models / "a", models / "b", output=small), "here")
    assert {name: (tmp_path / "there" / name).stat().st_mtime_ns for name in finished} == finished


def test_the_command_itself(server, models, local, tmp_path):
    mode = "lfs" if library().constants.HF_HUB_DISABLE_XET else "xet"
    recipe = {**average("org/a", "org/b"), "output": {"path": "there", "shard_size": "4MB"}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    done = subprocess.run(
        [sys.executable, "-m", "merger", "run", "recipe.json"],
        cwd=tmp_path,
        env=environment(server, tmp_path, mode, PYTHONPATH=str(Path(__file__).parents[2])),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    there = {path.name: path.read_bytes() for path in (tmp_path / "there").glob("*.safetensors*")}
    assert there == local
    assert server.token not in done.stdout + done.stderr

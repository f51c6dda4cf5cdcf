"""What an adapter's files say, against PEFT's own reading of them."""

import json
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import save_file

from merger.adapters import adapter_of, summary
from merger.checkpoint import open_checkpoint
from merger.errors import FormatError, UnsupportedModel
from merger.verify import check_folder
from tests import adapters, tiny
from tests.methods.making import make

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return adapters.save(tmp_path_factory.mktemp("plain") / "adapter", r=4, target_modules=["q_proj", "up_proj"])


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {"rank_pattern": {r"layers\.1\..*": 5, "q_proj": 3}, "alpha_pattern": {r".*\.0\.self_attn\.q_proj": 1}},
        {"rank_pattern": {"^model.layers.1.self_attn.q_proj": 2, "v_proj": 7}, "use_rslora": True},
    ],
)
def test_ranks_and_scales_are_those_of_peft(tmp_path, config):
    base = tiny.save(tmp_path / "base", "llama", tie_word_embeddings=False)
    folder = adapters.save(tmp_path / "a", target_modules=["q_proj", "v_proj"], **config)
    found = adapter_of(open_checkpoint(folder)).changes
    wanted = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in adapters.load(base, folder).named_modules()
        if hasattr(module, "lora_A")
    }
    assert {module: (change.rank, change.scale) for module, change in found.items()} == wanted
    assert len({rank for rank, _ in wanted.values()}) > 1 or "r" in config


def test_patterns_that_peft_itself_reads_otherwise_than_it_wrote_them_are_refused(tmp_path):
    """PEFT takes the first pattern that matches, and sorts them when it saves."""
    base = tiny.save(tmp_path / "base", "llama", tie_word_embeddings=False)
    patterns = {"q_proj": 3, r"layers\.1\..*": 5}
    folder = adapters.save(tmp_path / "a", target_modules=["q_proj", "v_proj"], rank_pattern=patterns)
    with pytest.raises(RuntimeError, match="size mismatch"):
        adapters.load(base, folder)
    with pytest.raises(FormatError, match="where the config says rank 5"):
        adapter_of(open_checkpoint(folder))


def test_a_model_beside_which_an_adapter_lies_is_a_model(tmp_path, plain):
    base = tiny.save(tmp_path / "both", "llama")
    for path in plain.iterdir():
        shutil.copy(path, base)
    checkpoint = open_checkpoint(base)
    assert not checkpoint.is_adapter
    assert "adapter_config.json" not in checkpoint.side_files


def test_an_adapter_beside_which_a_config_lies_is_an_adapter(tmp_path, plain):
    folder = shutil.copytree(plain, tmp_path / "both")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert open_checkpoint(folder).is_adapter


def without_prefix(tensors):
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def without_a_half(tensors):
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("layers.0.mlp.up_proj.lora_B.weight")}


def with_more(tensors):
    return {**tensors, "base_model.model.model.layers.0.mlp.up_proj.lora_E": next(iter(tensors.values())).clone()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_prefix, "does not begin with base_model"),
        (without_a_half, "without its other half"),
        (with_more, "no part of a plain LoRA adapter"),
        (lambda tensors: {name: t[..., None, None].contiguous() for name, t in tensors.items()}, "convolution"),
        (lambda tensors: {name: t.to(int) for name, t in tensors.items()}, "in which merger does not calculate"),
        (lambda tensors: {"base_model.model.x.weight": next(iter(tensors.values()))}, "changes no module"),
    ],
)
def test_files_that_are_not_what_peft_writes(tmp_path, plain, change, says):
    folder = shutil.copytree(plain, tmp_path / "odd")
    save_file(change(adapters.stored(plain)), folder / "adapter_model.safetensors")
    with pytest.raises((FormatError, UnsupportedModel), match=says):
        adapter_of(open_checkpoint(folder))
    assert "refused" in summary(open_checkpoint(folder))


# ---- verify and inspect -------------------------------------------------------------------------------


def test_a_written_adapter_is_verified(tmp_path, plain):
    make({"method": "lora", "adapters": [str(plain), str(plain)], "scale": 0.5, "rank": 2}, tmp_path / "out")
    checks = {check.name: check for check in check_folder(tmp_path / "out", load=True)}
    assert all(check.passed for check in checks.values())
    assert checks["adapter"].detail == "LORA of rank 2: factors for 8 modules, in pairs"
    assert "not tried" in checks["loads"].detail
    assert "byte for byte" in checks["checksums"].detail
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()
    content = bytearray((tmp_path / "out" / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "out" / "adapter_model.safetensors").write_bytes(content)
    assert not all(check.passed for check in check_folder(tmp_path / "out"))


def inspected(folder, *options):
    command = [sys.executable, "-m", "merger", "inspect", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_inspect_tells_what_an_adapter_is(tmp_path, plain):
    told = inspected(plain)
    assert "LORA adapter for a base that it does not name, CAUSAL_LM" in told
    assert "8 modules (q_proj, up_proj), rank 4, scale 2" in told
    dora = adapters.configure(shutil.copytree(plain, tmp_path / "dora"), use_dora=True)
    assert "merging     refused: is a DoRA" in inspected(dora)
    assert json.loads(inspected(plain, "--json"))["adapter"]["ranks"] == [4]
    assert any("could not merge it: is a DoRA" in check.detail for check in check_folder(dora))

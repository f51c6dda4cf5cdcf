"""Tiny random models of any family that transformers knows, and what a merge of two of them does to their files.

`python -m tests.families [--peer] [KIND ...]` examines some, or all, each in a process of its own, and prints a row of
JSON for each; with `--peer` it has mergekit merge the same files too.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.methods.making import make

WEIGHTS = (0.25, 0.75)  # exact in binary: their sums in float64 are exact too
MOST = 30_000_000  # parameters of a model that is tiny

# Families beside the causal ones, with the class that has all of their weights.
OTHERS = {
    "llava": "LlavaForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "paligemma": "PaliGemmaForConditionalGeneration",
    "aya_vision": "AyaVisionForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "whisper": "WhisperForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
    "bert": "BertForMaskedLM",
    "clip": "CLIPModel",
    "vit": "ViTForImageClassification",
}
# Those that mergekit 0.1.5 loses weights of, renames, or fails on.
MUST_BE_RIGHT = (
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "llava",
    "llava_onevision",
    "paligemma",
    "aya_vision",
    "mixtral",
    "qwen3_moe",
    "cohere",
    "gpt_neox",
    "falcon",
    "qwen2_vl",
    "whisper",
    "t5",
    "bert",
    "clip",
    "vit",
)


def kinds() -> list[str]:
    """All families of the table."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *OTHERS})


# ---- configs ------------------------------------------------------------------------------------------


def _keys(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# What is small under the names that families have for it.
SMALL: dict[str, Any] = {
    **_keys(
        32,
        "hidden_size d_model n_embd dim embed_dim embedding_size d_embed n_embed model_dim projection_dim "
        "attention_hidden_size text_embed_dim lru_width output_hidden_size expert_hidden_size word_embed_proj_dim "
        "attention_dim hidden_dim dim_model residual_dim vision_output_dim out_hidden_size mamba_hidden_dim",
    ),
    **_keys(
        48,
        "intermediate_size ffn_dim d_ff d_inner n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dim_ff "
        "intermediate_size_mlp feed_forward_size block_ff_dim dense_intermediate_size mamba_intermediate_size",
    ),
    **_keys(
        24,
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size shared_experts_intermediate_size expert_intermediate_size expert_dim",
    ),
    **_keys(
        2,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
        "num_encoder_layers depth num_blocks num_hidden_groups num_query_layers",
    ),
    **_keys(
        4,
        "num_attention_heads index_n_heads n_head num_heads encoder_attention_heads decoder_attention_heads n_heads "
        "num_experts n_routed_experts num_local_experts moe_num_experts linear_num_value_heads mamba_n_heads "
        "mamba_num_heads num_lookup_experts",
    ),
    **_keys(
        2,
        "num_key_value_heads num_kv_heads multi_query_groups num_experts_per_tok moe_k experts_per_token top_k "
        "moe_topk num_experts_per_token linear_num_key_heads num_selected_experts moe_top_k num_global_key_value_heads",
    ),
    **_keys(1, "first_k_dense_replace n_group topk_group n_shared_experts num_shared_experts num_dense_layers"),
    **_keys(
        8,
        "head_dim kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim d_kv linear_key_head_dim index_head_dim "
        "linear_value_head_dim global_head_dim state_size mamba_d_state ssm_state_size attention_head_dim d_state "
        "sliding_window attention_window_size local_attention_window chunk_size mamba_chunk_size swa_head_dim "
        "hidden_size_per_layer_input",
    ),
    **_keys(16, "q_lora_rank kv_lora_rank o_lora_rank block_multiple_of index_topk adapter_rank"),
    **_keys(96, "vocab_size vocab_size_per_layer_input decoder_vocab_size text_vocab_size"),
    **_keys(64, "max_position_embeddings n_positions max_source_positions max_target_positions n_ctx max_seq_len"),
    **_keys(32, "image_size"),
    **_keys(8, "patch_size"),
    **_keys(10, "num_mel_bins"),
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

# What a family needs beside SMALL to be small and whole.
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 16,
}
NEEDS: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 32},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10_000.0}},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp": _INDEXER,
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "xlm": {"emb_dim": 32, "vocab_size": 96},
    "deepseek_v2": {"first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
}


def _small(default: Any, more: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config that make it small; of the configs within it too."""
    known = default.to_dict()
    fields: dict[str, Any] = {}
    layers = next((known[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if known.get(key)), None)
    for key, value in known.items():
        inner = getattr(default, key, None) if isinstance(value, dict) else None
        if hasattr(inner, "to_dict") and hasattr(inner, "model_type"):
            found = _small(inner, more.get(key, {}))
            fields[key] = {"model_type": inner.model_type, **found} if inner.model_type else found
        elif key in IDS and isinstance(value, int | list):
            fields[key] = IDS[key]
        elif key.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= SMALL["vocab_size"]:
            fields[key] = 3 + len(fields) % 60
        elif isinstance(value, int) and not isinstance(value, bool) and key in SMALL:
            fields[key] = SMALL[key] if key in ("head_dim",) else min(value, SMALL[key])
        elif isinstance(value, list) and layers and len(value) == layers > 2:
            fields[key] = [SMALL.get(key, end) for end in (value[0], value[-1])]
    queries, keys = "num_attention_heads", "num_key_value_heads"
    if {queries, keys} <= fields.keys() and known[queries] == known[keys]:
        fields[keys] = fields[queries]
    fields |= {key: value for key, value in more.items() if not isinstance(fields.get(key), dict)}
    return fields


def tiny_config(kind: str) -> Any:
    """The config of a tiny model."""
    of_kind = class_of(kind).config_class or CONFIG_MAPPING[kind]  # of the language model within another
    return of_kind(**_small(of_kind(), NEEDS.get(kind, {})))


# ---- models -------------------------------------------------------------------------------------------


def class_of(kind: str) -> Any:
    """The class that has all weights of a family's models."""
    return getattr(transformers, OTHERS.get(kind) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])


def save(folder: Path, kind: str, seed: int) -> Path:
    """A model whose every parameter is random, in float32, as transformers leaves it. Raises what making it raises."""
    config, of_kind = tiny_config(kind), class_of(kind)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in of_kind._from_config(tiny_config(kind)).parameters())
    if count > MOST:
        raise ValueError(f"{count:,} parameters are not tiny")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = of_kind._from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    made.save_pretrained(folder)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder under their names on disk."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    return found


def problems_of(folder: Path, kind: str) -> list[str]:
    """What transformers says is missing, left over or of another shape when it loads a folder."""
    _, info = class_of(kind).from_pretrained(folder, output_loading_info=True, local_files_only=True)
    kinds_of_problems = ("missing", "unexpected", "mismatched")
    return [f"{what} {key}" for what in kinds_of_problems for key in sorted(map(str, info[f"{what}_keys"]))]


# ---- a row of the table -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What became of a family: None where it did not come to that, and the reason why."""

    kind: str
    tensors: int | None = None
    keys_kept: bool | None = None
    values_right: bool | None = None
    reloads: bool | None = None
    reason: str = ""
    peer: str = ""  # what mergekit does with the same files

    @property
    def is_right(self) -> bool:
        return bool(self.keys_kept and self.values_right and self.reloads)


def examine(kind: str, folder: Path) -> Row:
    """Make two models, merge them, and look at the files."""
    try:
        a, b = (save(folder / name, kind, seed) for seed, name in enumerate("ab"))
    except Exception as error:
        return Row(kind, reason=f"not built: {_line(error)}")
    sources = stored(a), stored(b)
    recipe = {"method": "average", "checkpoints": [str(a), str(b)], "weights": list(WEIGHTS)}
    try:
        output = make(recipe, folder / "merged").output
    except Exception as error:
        return Row(kind, len(sources[0]), reason=f"not merged: {_line(error)}")
    merged = stored(output)
    kept = merged.keys() == sources[0].keys()
    wrong = [name for name in merged if not _is_right(merged[name], *(source.get(name) for source in sources))]
    reason = f"wrong: {', '.join(wrong[:3])}" if wrong else ""
    reloads, said = _reloads(a, output, kind)
    return Row(kind, len(merged), kept, not wrong, reloads, "; ".join(filter(None, [reason, said])))


def _is_right(found: torch.Tensor, a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None or found.dtype != a.dtype:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(found, a)
    wanted = WEIGHTS[0] * a.double().numpy() + WEIGHTS[1] * b.double().numpy()
    return bool(np.array_equal(found.numpy(), wanted.astype(found.numpy().dtype)))


def _reloads(source: Path, output: Path, kind: str) -> tuple[bool | None, str]:
    """Whether the result loads without a word, or with the words that its source is loaded with."""
    try:
        before = problems_of(source, kind)
    except Exception as error:
        return None, f"transformers does not load its own file: {_line(error)}"
    try:
        after = problems_of(output, kind)
    except Exception as error:
        return False, f"not loaded: {_line(error)}"
    if before and before == after:
        return True, f"as its source, transformers' own file: {before[0]}"
    return not after, ", ".join(after[:3])


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text[:140]}"


# ---- the same by mergekit -----------------------------------------------------------------------------


def peer(folder: Path, kind: str) -> str:
    """What mergekit makes of the two models of `examine`, in a few words."""
    models = [{"model": str(folder / name), "parameters": {"weight": w}} for name, w in zip("ab", WEIGHTS, strict=True)]
    recipe = {"merge_method": "linear", "models": models, "dtype": "float32"}
    (folder / "peer.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    command = [str(Path(sys.executable).with_name("mergekit-yaml")), "peer.yaml", "peer", "--no-copy-tokenizer"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()]
        return f"fails: {' '.join(last[-1].split()).replace(f'{folder}/', '')[:110]}" if last else "fails"
    words = _compared(stored(folder / "peer"), stored(folder / "a"), stored(folder / "b"))
    return words if words == "the same" else f"{words}; {_loaded(folder / 'peer', kind)}"


def _loaded(folder: Path, kind: str) -> str:
    """What transformers says to a result with other tensors."""
    try:
        problems = problems_of(folder, kind)
    except Exception as error:
        return f"transformers does not load it: {_line(error)}"
    missing = [problem.partition(" ")[2] for problem in problems if problem.startswith("missing")]
    if missing:
        return (
            f"transformers loads it with {len(missing)} tensors missing, `{missing[0]}` first, and new ones at random"
        )
    return f"transformers loads it with {len(problems)} left over" if problems else "transformers loads it whole"


def _compared(made: dict[str, torch.Tensor], a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> str:
    lost, new = [name for name in a if name not in made], [name for name in made if name not in a]
    right = all(
        torch.allclose(made[name].double(), WEIGHTS[0] * a[name].double() + WEIGHTS[1] * b[name].double(), atol=1e-6)
        for name in made
        if name in a
    )
    words = []
    if lost and not new:
        words.append(f"writes {len(made)} of {len(a)} tensors without a word, `{lost[0]}` is the first that is lost")
    elif lost:
        words.append(f"writes {len(made)} tensors for {len(a)}, {len(new)} of them under other names, `{new[0]}` first")
    elif new:
        words.append(f"adds {len(new)}, `{new[0]}` first")
    return "; ".join([*words, *([] if right else ["wrong values"])]) or "the same"


# ---- each in a process of its own ---------------------------------------------------------------------

SECONDS = 60  # for one family; the peer's time comes on top
_PEER_SECONDS = 120


def apart(kind: str, *, with_peer: bool = False) -> Row:
    """`examine` in a child of this process, which may not hang, and may die: some families' defaults explode."""
    folder = Path(tempfile.mkdtemp(prefix=f"{kind}-"))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _answer(kind, folder, writing, with_peer=with_peer)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    shutil.rmtree(folder, ignore_errors=True)
    if said:
        return Row(**json.loads(said))
    late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
    return Row(kind, reason=f"not done in {SECONDS} s" if late else "its process died")


def _answer(kind: str, folder: Path, writing: int, *, with_peer: bool) -> None:
    """In the child: examine, write the row, and end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    signal.alarm(SECONDS + _PEER_SECONDS * with_peer)
    row = examine(kind, folder)
    if with_peer and row.tensors:
        row = replace(row, peer=peer(folder, kind))
    os.write(writing, json.dumps(asdict(row)).encode())
    os._exit(0)


def main(words: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # threads that wait would not live in the children
    with tempfile.TemporaryDirectory() as folder:
        examine("llama", Path(folder))  # what this loads and compiles, the children have
    for kind in [word for word in words if word != "--peer"] or kinds():
        print(json.dumps(asdict(apart(kind, with_peer="--peer" in words))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

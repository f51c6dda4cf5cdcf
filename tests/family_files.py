"""Tiny random models of any family that transformers knows, as it saves them. Knows configs; knows no merger."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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


def problems_of(folder: Path, kind: str) -> list[str]:
    """What transformers says is missing, left over or of another shape when it loads a folder."""
    _, info = class_of(kind).from_pretrained(folder, output_loading_info=True, local_files_only=True)
    kinds_of_problems = ("missing", "unexpected", "mismatched")
    return [f"{what} {key}" for what in kinds_of_problems for key in sorted(map(str, info[f"{what}_keys"]))]

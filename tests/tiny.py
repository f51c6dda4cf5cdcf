"""Tiny random models of real architectures, and what they compute. Knows transformers; knows nothing of merger."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = ["sliding_attention", "full_attention"] * 2
MOE = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}

# What a family needs beside SIZES to be small and whole.
NEEDS: dict[str, dict[str, Any]] = {
    "cohere2": {"layer_types": MIXED, "head_dim": 8, "sliding_window": 8},
    "ernie4_5": {"head_dim": 8},
    "exaone4": {"sliding_window": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "layer_types": MIXED},
    "gemma4_text": {"hidden_size_per_layer_input": 0, "layer_types": MIXED, "head_dim": 8, "global_head_dim": 8},
    "glm4": {"head_dim": 8},
    "gpt2": {"n_layer": 4, "n_embd": 32, "n_head": 4},
    "gpt_oss": {**MOE, "head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 16},
    "mistral": {"sliding_window": 8},
    "mixtral": MOE,
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 16},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {**MOE, "head_dim": 8},
    "qwen3_5_text": {
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
}


def model(kind: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A model whose every parameter is random: norms and biases too, which would hide mistakes as ones and zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SIZES, **NEEDS.get(kind, {}), **config}))
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.15)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return made.eval()


def save(folder: Path, kind: str, dtype: str = "float32", seed: int = 0, **config: Any) -> Path:
    """The same on disk, as transformers leaves it."""
    model(kind, seed, **config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def byte_tokenizer(folder: Path, **special: str) -> None:
    """A tokenizer with one token a byte, 0 to 255 in the order of GPT-2's letters for them (`tokens_of`), and special
    ones from 256 on (`bos_token="<s>"`).
    """
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(_LETTERS)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


_LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}  # stand for themselves, the others from 256 on
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]


def tokens_of(text: str) -> list[int]:
    """What `byte_tokenizer` makes of a text."""
    return [_LETTERS.index(chr(byte if byte in _PRINTABLE else 256 + _OTHERS.index(byte))) for byte in text.encode()]


def load(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    """A model from disk. Fails where a key is missing or left over."""
    made, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager", output_loading_info=True
    )
    odd = {kind: info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched") if info[f"{kind}_keys"]}
    assert not odd, odd
    return made.eval()


def tokens() -> torch.Tensor:
    """Two sequences of 17 tokens."""
    return torch.randint(3, SIZES["vocab_size"], (2, 17), generator=torch.Generator().manual_seed(1))


def logits(folder: Path, dtype: str = "float32") -> torch.Tensor:
    """What a model on disk computes for the tokens."""
    with torch.no_grad():
        return load(folder, dtype)(tokens()).logits


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder under their names on disk."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    return found


def own_names(folder: Path, place: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes under which transformers itself would save a model of this folder's config."""
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(place)
    return {name: tuple(tensor.shape) for name, tensor in stored(place).items()}

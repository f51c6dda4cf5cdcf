"""Real adapters of tiny models, and what PEFT makes of them. Knows PEFT; knows nothing of merger."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.tiny import model, tokens


def save(folder: Path, kind: str = "llama", seed: int = 1, sizes: dict[str, Any] | None = None, **config: Any) -> Path:
    """An adapter with random factors for the tiny model of seed 0, as PEFT leaves it."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        given = {"task_type": "CAUSAL_LM", "init_lora_weights": False, **config}
        made = get_peft_model(model(kind, **{"tie_word_embeddings": False, **(sizes or {})}), LoraConfig(**given))
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.requires_grad and "lora_" not in name:  # biases and saved modules, as if trained
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        made.save_pretrained(folder)
    return folder


def configure(folder: Path, **changes: Any) -> Path:
    """Another value for fields of an adapter's config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def load(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    """The base with the adapter on it. Fails where PEFT finds a key missing or left over."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "(?i).*fan_in_fan_out|.*tie|.*weight tying", UserWarning)
        whole = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager")
        return PeftModel.from_pretrained(whole, adapter).eval()


def deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The change of each module's weight, as PEFT computes it."""
    found = load(base, adapter)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double()
        for name, module in found.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def logits(base: Path, adapter: Path) -> torch.Tensor:
    """What the base with the adapter computes."""
    with torch.no_grad():
        return load(base, adapter)(tokens()).logits


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter under their names on disk."""
    return load_file(folder / "adapter_model.safetensors")

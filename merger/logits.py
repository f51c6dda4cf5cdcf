"""Compares what two models on disk compute: `python -m merger.logits A B` prints JSON.

A process of its own, because torch and two models need memory that the caller should not keep. Knows transformers;
knows nothing of recipes or plans.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

from merger.architecture import is_depth_router

BATCH, LENGTH, SEED = 2, 32, 0


def compare(first: Path, second: Path) -> dict[str, Any]:
    """The largest difference of the logits of two models, both in float32, for the same random tokens."""
    a, a_keys = _logits(first)
    b, b_keys = _logits(second)
    return {
        "largest_difference": float((a - b).abs().max()),
        "largest_logit": float(a.abs().max()),
        "tokens": a.shape[0] * a.shape[1],
        "missing": [*a_keys["missing"], *b_keys["missing"]],
        "unexpected": [*a_keys["unexpected"], *b_keys["unexpected"]],
    }


def _logits(folder: Path) -> tuple[Any, dict[str, list[str]]]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name = json.loads((folder / "config.json").read_text()).get("architectures") or ["AutoModelForCausalLM"]
    kind = getattr(transformers, name[0], transformers.AutoModelForCausalLM)
    never_code = {"local_files_only": True, "trust_remote_code": False}
    loaded: Any = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **never_code
    )
    model, info = loaded
    config = model.config.get_text_config()
    length = min(LENGTH, getattr(config, "max_position_embeddings", LENGTH) or LENGTH)
    tokens = torch.randint(config.vocab_size, (BATCH, length), generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        output = model.eval()(input_ids=tokens)
    odd = {kind: sorted(info[f"{kind}_keys"]) for kind in ("missing", "unexpected")}
    keys = {kind: [name for name in names if not is_depth_router(name)] for kind, names in odd.items()}
    found = output.logits if "logits" in output else output.last_hidden_state
    del model
    gc.collect()
    return found, keys


if __name__ == "__main__":
    sys.stdout.write(json.dumps(compare(Path(sys.argv[1]), Path(sys.argv[2]))))

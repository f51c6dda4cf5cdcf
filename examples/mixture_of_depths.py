"""Run and train a model that `method: mod` made: some layers take only the tokens that their router picks.

    model = load("out/mod", capacity=1.0)      # the logits of the source
    set_capacity(model, 0.125)                 # 12.5 % of the tokens pass the routed layers

Mixture-of-Depths (arXiv 2404.02258), section 3: each routed layer scores the tokens of a sequence by a vector, takes
the top k = ceil(capacity * length) of them and adds its output, times the score, to their residual stream; the others
pass by. The score here is 2 sigmoid(w x), so that a router of zeros passes everything with weight 1. Picking the top k
looks at later tokens; to sample from the model, train a predictor of the choice (section 3.5) or use capacity 1. There
is no key-value cache.
"""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM


class RoutedLayer(nn.Module):
    """A decoder layer behind a router. In and out: hidden states [batch, length, d]."""

    def __init__(self, layer: nn.Module, weight: torch.Tensor, capacity: float) -> None:
        super().__init__()
        self.layer, self.capacity = layer, capacity
        self.mod_router = nn.Linear(weight.shape[1], 1, bias=False, dtype=weight.dtype)
        self.mod_router.weight = nn.Parameter(weight.clone())
        self.picked: torch.Tensor | None = None  # of the last call: indices [batch, k], ascending

    def __getattr__(self, name: str):  # the model asks its layers for what they are, such as `attention_type`
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        length = hidden_states.shape[1]
        scores = 2 * torch.sigmoid(self.mod_router(hidden_states)).squeeze(-1)
        k = math.ceil(self.capacity * length)
        self.picked = scores.topk(k, dim=1).indices.sort(dim=1).values
        if k == length:  # in their order, nothing to gather
            return _weighted(
                hidden_states, self._run(hidden_states, attention_mask, position_embeddings, kwargs), scores
            )
        tokens = _take(hidden_states, self.picked)
        mask = None if attention_mask is None else _take_both(attention_mask, self.picked)
        embeddings = tuple(_take(part.expand(len(tokens), -1, -1), self.picked) for part in position_embeddings)
        changed = _weighted(tokens, self._run(tokens, mask, embeddings, kwargs), scores.gather(1, self.picked))
        index = self.picked.unsqueeze(-1).expand_as(changed)
        return hidden_states.scatter(1, index, changed)

    def _run(self, tokens, mask, embeddings, kwargs):
        kwargs = {key: value for key, value in kwargs.items() if key not in ("past_key_values", "position_ids")}
        return self.layer(tokens, attention_mask=mask, position_embeddings=embeddings, **kwargs)


def _weighted(before: torch.Tensor, after: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """before + score * (after - before), written so that a score of 1 gives `after` to the bit."""
    return after + (scores.unsqueeze(-1) - 1) * (after - before)


def _take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _take_both(mask: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows and columns of a mask [batch, 1, length, length]."""
    rows = mask.expand(len(index), -1, -1, -1).gather(2, index[:, None, :, None].expand(-1, 1, -1, mask.shape[-1]))
    return rows.gather(3, index[:, None, None, :].expand(-1, 1, index.shape[1], -1))


def load(folder: str | Path, capacity: float | None = None, **options) -> nn.Module:
    """The model with its routed layers; `capacity` is that of the config without."""
    folder = Path(folder)
    mod = json.loads((folder / "config.json").read_text())["mod"]
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options)
    weights = _routers(folder)
    layers = model.model.layers
    for index in mod["layers"]:
        weight = weights[f"model.layers.{index}.mod_router.weight"].to(model.dtype)
        layers[index] = RoutedLayer(layers[index], weight, capacity or mod["capacity"])
    return model


def set_capacity(model: nn.Module, capacity: float) -> None:
    """Let all routed layers take this share of the tokens."""
    for layer in model.model.layers:
        if isinstance(layer, RoutedLayer):
            layer.capacity = capacity


def _routers(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.endswith(".mod_router.weight")]  # noqa: SIM118
            found |= {name: file.get_tensor(name) for name in names}
    return found

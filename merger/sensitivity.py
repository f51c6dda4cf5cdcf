"""How much a model's predictions depend on each of its numbers: the diagonal of the Fisher information matrix.

Knows torch and causal language models; knows nothing of files or of what it is for (arXiv 2111.09832, equation 3).

The gradient is taken of a window's log-likelihood as a whole. With labels that the model itself gives, one drawn for
each token, the expectation of its square is the sum over the tokens of the expected squares: products between two
tokens vanish, as each gradient is 0 in the mean. With the labels of the data (the "empirical Fisher") they do not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy

Labels = Literal["model", "data"]
Say = Callable[[int, int], None]
Window = tuple[int, ...]


def fisher(model: Any, windows: Sequence[Window], labels: Labels, seed: int, say: Say) -> dict[str, torch.Tensor]:
    """For every parameter, by its name in the model, the mean over the predicted tokens of its squared gradients of the
    log-likelihood, in float32 on the CPU. What no prediction depends on has zeros.
    """
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for place, window in enumerate(windows):
        _add(model, window, sums, None if labels == "data" else seed * 1_000_003 + place)
        say(place + 1, len(windows))
    model.zero_grad(set_to_none=True)
    tokens = sum(len(window) - 1 for window in windows)
    return {name: (total / tokens).cpu() for name, total in sums.items()}


def _add(model: Any, window: Window, sums: Mapping[str, torch.Tensor], seed: int | None) -> None:
    model.zero_grad(set_to_none=True)
    tokens = torch.tensor([window], device=model.device)
    logits = model(input_ids=tokens).logits[0, :-1].float()
    wanted = tokens[0, 1:] if seed is None else _drawn(logits.detach(), seed)
    cross_entropy(logits, wanted, reduction="sum").backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name].addcmul_(parameter.grad, parameter.grad)


def _drawn(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """For each row one token with the probability that the logits give it: on the CPU, so that the seed means the same
    everywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    probabilities = logits.double().cpu().softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)

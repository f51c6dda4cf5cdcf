"""What a model's linear layers are given: the Gram matrices of their inputs, for RegMean (arXiv 2212.09849).

Knows torch's linear layers; knows nothing of files or of what it is for. Layers that are given the very same tensor, as
query, key and value are, share a matrix, which is computed and kept once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any

import torch

Say = Callable[[int, int], None]
Window = tuple[int, ...]
Layers = Mapping[str, torch.nn.Linear]


def linear_layers(model: Any, names: Mapping[int, str]) -> dict[str, torch.nn.Linear]:
    """The linear layers whose weights have one of the `names`, by the `id` of the parameter, under that name. An output
    head that is the embedding is none: as an embedding it is given no vectors.
    """
    embedding = model.get_input_embeddings().weight
    return {
        names[id(module.weight)]: module
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and id(module.weight) in names and module.weight is not embedding
    }


def shared_inputs(model: Any, layers: Layers, window: Window) -> dict[str, str]:
    """For each layer the first that is given the same tensor, itself where it is that."""
    given: dict[str, torch.Tensor] = {}  # holds the tensors, so that no other takes an address

    def note(name: str, tensor: torch.Tensor) -> None:
        given[name] = tensor

    with _watched(layers, note):
        _run(model, [window])
    first: dict[int, str] = {}
    return {name: first.setdefault(id(given[name]), name) if name in given else name for name in layers}


def size_of(layer: torch.nn.Linear) -> int:
    """The bytes of a layer's matrix."""
    return 4 * layer.in_features**2


def grams(model: Any, layers: Layers, windows: Sequence[Window], at_once: int, say: Say) -> dict[str, torch.Tensor]:
    """For each layer X^T X / tokens [n, n] over all tokens of the windows, in float32 on the CPU: the mean of the outer
    products of its inputs. A layer that not all tokens come to has the smaller for it.
    """
    sums = {name: layer.weight.new_zeros(layer.in_features, layer.in_features) for name, layer in layers.items()}

    def add(name: str, tensor: torch.Tensor) -> None:
        flat = tensor.detach().reshape(-1, tensor.shape[-1]).float()
        sums[name].addmm_(flat.T, flat)

    done = 0
    with _watched(layers, add):
        for batch in _batches(windows, at_once):
            _run(model, batch)
            done += len(batch)
            say(done, len(windows))
    tokens = sum(map(len, windows))
    return {name: (total / tokens).cpu() for name, total in sums.items()}


def _batches(windows: Sequence[Window], at_once: int) -> Iterator[list[Window]]:
    """Windows of one length together, so that nothing is padded."""
    for _, group in groupby(sorted(windows, key=len, reverse=True), key=len):
        same = list(group)
        yield from (same[i : i + at_once] for i in range(0, len(same), at_once))


def _run(model: Any, windows: Sequence[Window]) -> None:
    with torch.no_grad():
        model(input_ids=torch.tensor(windows, device=model.device))


@contextmanager
def _watched(layers: Layers, on_input: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Tell the input of every layer, each time that it is called."""

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, inputs: on_input(name, inputs[0])

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(hook(name)).remove)
        yield

"""Rows of routers from prompts: where an expert's prompts lie in the space of a model. Knows transformers and torch.

A row is the sum (or mean) of what the positive prompts give minus that of the negative ones, of length 1; the formulas
are those of mergekit/moe/router.py. Prompts are run one by one, so that nothing is padded: mergekit pads to the
longest, and its mean over tokens (`hidden_avg`) counts the padding.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from merger.architecture import embedding_of
from merger.checkpoint import Checkpoint
from merger.errors import SourceError, UnsupportedModel
from merger.evaluation import Prompts
from merger.expression import cast, join
from merger.host import processors
from merger.layers import count_of
from merger.loading import Loaded, config_and_tokenizer
from merger.shaping import rows
from merger.values import side_by_side

Matrix = NDArray[np.float64]
Rows = NDArray[np.float32]

_SMALLEST = 1e-8  # of a norm by which is divided


def from_hidden_states(loaded: Loaded, evaluation: Prompts, say: Callable[[int, int], None]) -> Rows:
    """What comes into each layer at the last token of a prompt, or on average over its tokens; the mean over prompts.
    [layers, rows, d]
    """
    prompts = sorted({prompt for pair in evaluation.prompts for side in pair for prompt in side})
    tokens = [_tokens(loaded.tokenizer, prompt) for prompt in prompts]
    states: dict[str, Matrix] = {}
    with _one_thread_each(loaded) as pool:
        found = pool.map(lambda ids: _states(loaded, ids, evaluation.mode), tokens)
        for prompt, matrix in zip(prompts, found, strict=True):
            states[prompt] = matrix
            say(len(states), len(prompts))

    def mean(chosen: Sequence[str]) -> Matrix:
        middle: Matrix = np.mean([states[prompt] for prompt in chosen], axis=0)
        return middle

    return _rows(evaluation, mean)


@contextmanager
def _one_thread_each(loaded: Loaded) -> Iterator[ThreadPoolExecutor]:
    """Threads that each run a prompt alone: what several of torch's own add up depends on how many there are."""
    before = torch.get_num_threads()
    workers = processors() if loaded.device == "cpu" else 1
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _states(loaded: Loaded, tokens: Sequence[int], mode: str) -> Matrix:
    """[layers, d]"""
    with torch.inference_mode():
        ids = torch.tensor([tokens], device=loaded.device)
        entering = loaded.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[:-1]
        stacked = torch.stack([states[0].double().cpu() for states in entering])
    chosen = stacked.mean(1) if mode == "hidden_avg" else stacked[:, -1]
    found: Matrix = chosen.numpy()
    return found


def from_embeddings(checkpoint: Checkpoint, evaluation: Prompts) -> Rows:
    """The sum of the embeddings of all tokens of the prompts, of length 1, the same for every layer. Only the rows of
    these tokens are read. [layers, rows, d]
    """
    config, tokenizer = config_and_tokenizer(checkpoint)
    layers = count_of(config.get_text_config().to_dict(), checkpoint.label)
    tokens = {p: _tokens(tokenizer, p) for pair in evaluation.prompts for side in pair for p in side}
    embeddings = _embeddings(checkpoint, sorted({token for ids in tokens.values() for token in ids}))

    def direction(prompts: Sequence[str]) -> Matrix:
        total = np.sum([embeddings[token] for prompt in prompts for token in tokens[prompt]], axis=0)
        return np.tile(_normalized(total), (layers, 1))

    return _rows(evaluation, direction)


def _embeddings(checkpoint: Checkpoint, tokens: Sequence[int]) -> dict[int, Matrix]:
    """The embeddings [d] of some tokens."""
    name = embedding_of(checkpoint.tensors)
    if name is None:
        raise UnsupportedModel("has no embedding that merger knows", where=checkpoint.label)
    whole = checkpoint.tensors[name]
    if tokens[-1] >= whole.shape[0]:
        raise UnsupportedModel(
            f"has {whole.shape[0]} embeddings, and its tokenizer gives the token {tokens[-1]}", where=checkpoint.label
        )
    picked = join([rows(whole, token, token + 1) for token in tokens], (len(tokens), whole.shape[1]))
    [[content]] = side_by_side([cast(picked, "F64")], picked.size, whole=False)
    table = content.view(np.float64).reshape(picked.shape)
    return dict(zip(tokens, table, strict=True))


def _rows(evaluation: Prompts, of: Callable[[Sequence[str]], Matrix]) -> Rows:
    made = []
    for positive, negative in evaluation.prompts:
        difference = of(positive) - of(negative) if negative else of(positive)
        made.append(_normalized(difference))
    return np.stack(made, axis=1).astype(np.float32)


def _normalized(vectors: Matrix) -> Matrix:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    found: Matrix = vectors / np.maximum(lengths, _SMALLEST)
    return found


def _tokens(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a prompt, the one that begins texts before them where there is such a one. Raises SourceError."""
    if tokenizer is None:
        raise SourceError("has no tokenizer that transformers can read, which prompts need", where="base_model")
    ids = tokenizer((tokenizer.bos_token or "") + prompt, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise SourceError("comes to no token", where=f"prompt {prompt!r}")
    return list(ids)

"""Gram matrices of a tiny model, against inputs that a hook of the test's own has kept."""

import numpy as np
import pytest
import torch

from merger.grams import grams, linear_layers, shared_inputs, size_of
from tests import tiny

WINDOWS = [(5, 9, 3, 77, 12), (4, 4, 30), (8, 1, 2, 3, 50), (7, 7, 7)]


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama", num_hidden_layers=2)


def layers_of(model):
    return linear_layers(model, {id(p): name for name, p in model.named_parameters()})


def silent(_done, _total):
    pass


def kept_inputs(model, windows):
    """What every linear layer was given, window by window, in float64."""
    kept = {}
    hooks = [
        module.register_forward_hook(lambda _m, given, _out, name=name: kept.setdefault(name, []).append(given[0][0]))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        for window in windows:
            model(torch.tensor([window]))
    for hook in hooks:
        hook.remove()
    return {f"{name}.weight": torch.cat(found).double() for name, found in kept.items()}


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_they_are_the_mean_outer_products_of_the_inputs(model, at_once):
    layers = layers_of(model)
    found, kept = grams(model, layers, WINDOWS, at_once, silent), kept_inputs(model, WINDOWS)
    assert found.keys() == kept.keys() == layers.keys()
    assert len(found) == 2 * 7 + 1
    for name, gram in found.items():
        wanted = kept[name].T @ kept[name] / sum(map(len, WINDOWS))
        assert gram.dtype == torch.float32
        assert 4 * gram.numel() == size_of(layers[name])
        np.testing.assert_allclose(gram, wanted, rtol=1e-4, atol=1e-6 * float(wanted.max()))


def test_layers_that_are_given_one_tensor_share_a_matrix(model):
    shared = shared_inputs(model, layers_of(model), WINDOWS[0])
    kept = kept_inputs(model, WINDOWS)
    assert sum(name == first for name, first in shared.items()) == 2 * 4 + 1
    assert shared["model.layers.1.self_attn.v_proj.weight"] == "model.layers.1.self_attn.q_proj.weight"
    assert shared["model.layers.1.mlp.up_proj.weight"] == "model.layers.1.mlp.gate_proj.weight"
    assert all(torch.equal(kept[name], kept[first]) for name, first in shared.items())


def test_a_head_that_is_the_embedding_is_no_linear_layer():
    tied = tiny.model("llama", num_hidden_layers=1, tie_word_embeddings=True)
    assert len(layers_of(tied)) == 7
    assert not any("embed" in name for name in layers_of(tied))


def test_layers_that_are_not_called_have_zeros():
    model = tiny.model("llama", num_hidden_layers=1)
    model.spare = torch.nn.Linear(3, 2)
    layers = {**layers_of(model), "spare.weight": model.spare}
    assert shared_inputs(model, layers, WINDOWS[0])["spare.weight"] == "spare.weight"
    assert float(grams(model, layers, WINDOWS, 2, silent)["spare.weight"].abs().max()) == 0.0


def test_no_hook_is_left_where_the_model_fails(model):
    with pytest.raises(IndexError):
        grams(model, layers_of(model), [(1, 10**6)], 1, silent)
    assert not any(module._forward_pre_hooks for module in model.modules())

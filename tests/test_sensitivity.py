"""Fisher information of a tiny model, against torch.func's gradients of every token by itself, in float64."""

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad

from merger.sensitivity import _drawn, fisher
from tests import tiny

WINDOWS = [(5, 9, 3, 77, 12), (4, 4, 30), (8, 1, 2, 3, 50, 60)]


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def model():
    return tiny.model("llama", num_hidden_layers=2)


def silent(_done, _total):
    pass


def window_gradients(model, tokens, wanted):
    """For every predicted token of a window its gradient of the log-likelihood of what is `wanted` there."""
    double = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    ids = torch.tensor([tokens])

    def likelihood(parameters, place, label):
        logits = functional_call(model, parameters, (ids,), {"use_cache": False}).logits[0]
        return torch.log_softmax(logits, -1)[place, label]

    return [grad(likelihood)(double, place, label) for place, label in enumerate(wanted)]


def test_of_the_labels_of_the_data_it_is_the_squared_gradient_of_each_window(model):
    found = fisher(model, WINDOWS, "data", 0, silent)
    sums = {name: torch.zeros_like(parameter).double() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        model.double()
        for window in WINDOWS:
            each = window_gradients(model, window, window[1:])
            for name in sums:
                sums[name] += sum(gradient[name] for gradient in each) ** 2
        model.float()
    tokens = sum(len(window) - 1 for window in WINDOWS)
    assert found.keys() == sums.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert float(tensor.max()) > 0
        np.testing.assert_allclose(tensor, sums[name] / tokens, rtol=1e-3, atol=1e-5 * float(tensor.max()))


def test_of_labels_of_the_model_it_tends_to_the_expected_squares_of_each_token(model):
    """The expectation is a sum over the whole vocabulary, here of the head, whose gradients are (label - p) x state."""
    window = WINDOWS[0]
    draws = 400
    found = fisher(model, [window] * draws, "model", 1, silent)["lm_head.weight"].double()
    with torch.no_grad():
        output = model(torch.tensor([window]), output_hidden_states=True)
    states, p = output.hidden_states[-1][0, :-1].double(), output.logits[0, :-1].double().softmax(-1)
    wanted = ((p * (1 - p)).T @ states**2) / (len(window) - 1)
    assert float(found.sum() / wanted.sum()) == pytest.approx(1.0, abs=0.1)
    assert np.corrcoef(found.flatten(), wanted.flatten())[0, 1] > 0.95


def test_labels_are_drawn_with_the_probabilities_of_the_model():
    logits = torch.tensor([[0.0, 2.0, -50.0]]).repeat(20000, 1)
    drawn = torch.bincount(_drawn(logits, 3), minlength=3) / 20000
    wanted = logits[0].softmax(-1)
    assert torch.allclose(drawn, wanted, atol=4 * 0.5 / 20000**0.5)
    assert drawn[2] == 0


def test_the_seed_decides_and_the_same_seed_gives_the_same(model):
    first, again, other = (fisher(model, WINDOWS, "model", seed, silent) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_what_no_prediction_depends_on_has_zeros(model):
    found = fisher(model, [(5, 9, 3)], "data", 0, silent)["model.embed_tokens.weight"]
    seen = torch.zeros(len(found), dtype=torch.bool)
    seen[[5, 9]] = True  # the last token of the window predicts nothing
    assert bool((found[seen] > 0).any(1).all())
    assert float(found[~seen].abs().max()) == 0.0


def test_nothing_of_the_model_is_changed(model):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    told = []
    fisher(model, WINDOWS, "model", 0, lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())

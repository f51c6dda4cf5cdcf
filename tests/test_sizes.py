"""Parameters and active parameters against counts by hand."""

import pytest

from merger.checkpoint import Checkpoint
from merger.expression import Filled
from merger.sizes import active, parameters

DENSE = {"model.embed.weight": Filled("BF16", (10, 4)), "model.layers.0.mlp.gate.weight": Filled("F32", (8, 4))}


@pytest.mark.parametrize(
    ("names", "config"),
    [
        ([f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(8)], {"num_experts": 8}),
        ([f"model.layers.0.block_sparse_moe.experts.{e}.w1.weight" for e in range(8)], {"num_local_experts": 8}),
        ([f"model.layers.0.block_sparse_moe.{d}_linear.weight" for d in ("input", "output")], {"n_routed_experts": 8}),
        (["model.layers.0.experts.gate_up_proj"], {"moe_num_experts": 8}),
    ],
)
def test_a_token_meets_its_share_of_the_experts(names: list[str], config: dict) -> None:
    experts = {name: Filled("BF16", (64 // len(names), 100)) for name in names}
    shared = {"model.layers.0.mlp.shared_experts.up_proj.weight": Filled("BF16", (5,))}
    model = Checkpoint({**DENSE, **experts, **shared}, {**config, "num_experts_per_tok": 2}, {}, ())
    assert parameters(model) == 40 + 32 + 6400 + 5
    assert active(model) == 40 + 32 + 1600 + 5


def test_of_a_dense_model_all_is_active() -> None:
    for config in (None, {}, {"num_experts": 8}):
        model = Checkpoint(DENSE, config, {}, ())
        assert active(model) == parameters(model) == 72

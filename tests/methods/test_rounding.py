"""Results in bfloat16 are the nearest to float64 that there are, or mergekit's own bits."""

import pytest

from merger.methods.merging import RULES
from tests.methods.rounding import RANDOM, distances, models_in

MERGEKITS = {"arcee_fusion", "ram", "ramplus_tl"}  # rules whose arithmetic is mergekit's own


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return models_in(tmp_path_factory.mktemp("models"))


@pytest.mark.slow  # mergekit merges twice for each
@pytest.mark.parametrize("name", sorted(set(RULES) - RANDOM))
def test_a_result_is_mergekits_or_nearer_to_float64(tmp_path, models, name):
    found = distances(name, models, tmp_path)
    if name in MERGEKITS:
        assert found.between == 0
        return
    assert found.worse == 0, "over one unit from mergekit's, and farther from float64"
    assert found.ours <= 0.501, "half a unit is the rounding; the rest is float32 within"
    assert found.our_mean <= found.their_mean + 1e-6
    assert found.left_out < found.elements / 10

"""Memory divided among threads: never more than was allowed, and a refusal names a number that works."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger.budget import SMALLEST_PIECE, allot, read_cost
from merger.checkpoint import open_checkpoint
from merger.checksum import LEAF
from merger.errors import NotEnoughMemory
from merger.methods.combination import weighted_sum
from merger.plan import make_plan
from merger.recipe import size_in_bytes
from tests.checkpoints import write_model


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Plans of sums over 1 to 40 sources."""
    folder = tmp_path_factory.mktemp("models")
    models = [
        open_checkpoint(write_model(folder / f"{i}", {"x": np.zeros((64, 64), np.float32)}, {})) for i in range(40)
    ]
    return {n: make_plan(weighted_sum(models[:n], [2 / n] * n), {"method": "average"}, 10**9) for n in (1, 2, 3, 40)}


@given(n=st.sampled_from([1, 2, 3, 40]), memory=st.integers(1, 1 << 32), threads=st.integers(1, 64))
def test_no_more_than_was_allowed_is_taken_and_a_refusal_names_enough(plans, n, memory, threads):
    plan = plans[n]
    try:
        allotment = allot(plan, memory, threads)
    except NotEnoughMemory as error:
        enough = size_in_bytes(re.search(r"--memory (\S+)\.", error.remedy)[1])
        assert memory < enough
        allotment = allot(plan, enough, threads)
        memory = enough
    assert allotment.memory <= memory
    assert 1 <= allotment.threads <= threads
    assert allotment.block % LEAF == 0
    widest = max(plan.checkpoint.tensors.values(), key=lambda tensor: read_cost(tensor, 1))
    assert allotment.buffer >= read_cost(widest, SMALLEST_PIECE)


def test_memory_that_is_there_goes_to_all_threads(plans):
    assert allot(plans[3], 1 << 30, 4).threads == 4

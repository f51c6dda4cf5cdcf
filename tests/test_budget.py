"""Memory divided among threads: never more than was allowed, and a refusal names a number that works."""

import re
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger.budget import SMALLEST_PIECE, allot
from merger.checkpoint import Checkpoint
from merger.checksum import LEAF
from merger.errors import NotEnoughMemory
from merger.expression import File, Stored, combine
from merger.plan import Plan, make_plan
from merger.recipe import size_in_bytes


@cache
def plan_over(sources: int) -> Plan:
    """A sum over files that are never opened."""
    stored = [Stored("F32", (64, 64), File(Path(f"{i}"), 1 << 20, 0, ""), 0) for i in range(sources)]
    tensor = combine([(2 / sources, leaf) for leaf in stored], "F32")
    return make_plan(Checkpoint({"x": tensor}, {}, {}, ()), {"method": "average"}, 10**9)


@given(sources=st.sampled_from([1, 2, 3, 40]), memory=st.integers(1, 1 << 32), threads=st.integers(1, 64))
def test_no_more_than_was_allowed_is_taken_and_a_refusal_names_enough(sources, memory, threads):
    plan = plan_over(sources)
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
    assert allotment.buffer >= plan.checkpoint.tensors["x"].memory(SMALLEST_PIECE)


@pytest.mark.parametrize("sources", [1, 3, 40])
def test_memory_that_is_there_goes_to_all_threads(sources):
    assert allot(plan_over(sources), 1 << 30, 4).threads == 4

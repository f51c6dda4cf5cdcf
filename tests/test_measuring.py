"""The first pass: every measure once, the same for any number of threads, errors with the file."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from merger.budget import allot
from merger.checkpoint import Checkpoint, open_checkpoint
from merger.drawn import redrawn
from merger.errors import SourceChanged
from merger.measuring import measured
from merger.noise import choose, key_of
from merger.plan import make_plan
from merger.reader import OpenFiles
from tests.checkpoints import write_model

ROWS, WIDTH = 900, 700  # more elements than one block of a measure


@pytest.fixture
def model(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype("f4") + 3
    return write_model(tmp_path / "model", {"w": values}, {})


def shards_of(model: Path):
    stored = open_checkpoint(model).tensors["w"]
    mask = choose(key_of(0, "w"), 0.3, ROWS)
    once = redrawn(stored, mask, 0, key_of(0, "a"))
    tensors = {"a": once, "b": once, "c": stored}
    plan = make_plan(Checkpoint(tensors, {}, {}, ()), {"method": "x"}, 10**9)
    return plan.shards, mask


@pytest.mark.parametrize("threads", [1, 4])
def test_numbers_are_those_of_float64(model: Path, threads: int) -> None:
    shards, mask = shards_of(model)
    [shard] = measured(shards, OpenFiles(), threads, 1 << 30)
    a, b, c = (entry.expression for entry in shard.entries)
    values = np.frombuffer((model / "model.safetensors").read_bytes()[-ROWS * WIDTH * 4 :], "f4").reshape(ROWS, WIDTH)
    chosen = values[mask].astype("f8")
    assert a.found == pytest.approx((chosen.mean(), chosen.std()), rel=1e-11)
    assert (b.found, c) == (a.found, shards[0].entries[2].expression)
    assert [entry.offset for entry in shard.entries] == [entry.offset for entry in shards[0].entries]


def test_threads_are_as_many_as_the_memory_allows(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tensors to measure, in memory for one or for two of them: so many wait for each other, and no more come."""
    stored = open_checkpoint(model).tensors["w"]
    mask = choose(key_of(0, "w"), 0.3, ROWS)
    tensors = {name: redrawn(stored, mask, 0, key_of(0, name)) for name in "abcd"}
    plan = make_plan(Checkpoint(tensors, {}, {}, ()), {"method": "x"}, 10**9)
    assert plan.measuring > stored.memory(1 << 18)
    pools: list[int] = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, threads: int) -> None:
            pools.append(threads)
            super().__init__(threads)

    monkeypatch.setattr("merger.measuring.ThreadPoolExecutor", Pool)
    found = []
    for memory in (1, 2 * plan.measuring, 1 << 30):
        [shard] = measured(plan.shards, OpenFiles(), 4, memory)
        found.append([entry.expression.found for entry in shard.entries])
    assert pools == [1, 2, 4]
    assert found[0] == found[1] == found[2]
    budgets = [allot(plan, memory, 4) for memory in (plan.measuring // 2, 3 * plan.measuring, 1 << 30)]
    assert [budget.measuring // plan.measuring for budget in budgets] == [1, 3, 4]


def test_where_nothing_is_measured_the_shards_stay(model: Path) -> None:
    plan = make_plan(open_checkpoint(model), {"method": "x"}, 10**9)
    assert measured(plan.shards, OpenFiles(), 2, 1 << 30) is plan.shards


def test_a_source_that_is_gone_is_told(model: Path) -> None:
    shards, _ = shards_of(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(SourceChanged, match="cannot be opened any more"):
        measured(shards, OpenFiles(), 2, 1 << 30)

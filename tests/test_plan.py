"""The layout of a result, and what its fingerprint depends on."""

import os
from dataclasses import replace

import numpy as np
import pytest

from merger.checkpoint import open_checkpoint
from merger.plan import index_of, make_plan
from tests.checkpoints import bfloat16, write_model

RECIPE = {"method": "average", "output": {"path": "out"}}


@pytest.fixture
def folder(tmp_path):
    tensors = {f"layer.{i}": np.ones(100, np.float32) for i in range(5)} | {"big": np.ones(1000, np.float32)}
    return write_model(tmp_path / "model", tensors | {"narrow": bfloat16(np.ones(3)), "byte": np.ones(1, np.uint8)}, {})


def test_shards_are_filled_in_order_and_no_fuller_than_was_asked(folder):
    plan = make_plan(open_checkpoint(folder), RECIPE, 1000)
    sizes = {shard.name: (shard.data_size, [entry.name for entry in shard.entries]) for shard in plan.shards}
    assert all(size <= 1000 or names == ["big"] for size, names in sizes.values())
    assert list(sizes) == [f"model-{i:05d}-of-{len(sizes):05d}.safetensors" for i in range(1, len(sizes) + 1)]
    assert sorted(name for _, names in sizes.values() for name in names) == sorted(plan.checkpoint.tensors)


def test_wide_elements_come_first_so_that_all_are_aligned(folder):
    shard = make_plan(open_checkpoint(folder), RECIPE, 10**6).shards[0]
    assert shard.name == "model.safetensors"
    assert all(entry.offset % entry.expression.itemsize == 0 for entry in shard.entries)
    assert [entry.name for entry in shard.entries][-2:] == ["narrow", "byte"]
    assert len(shard.header) % 4096 == 0


def test_the_index_tells_where_every_tensor_is(folder):
    plan = make_plan(open_checkpoint(folder), RECIPE, 1000)
    index = index_of(plan)
    assert index["weight_map"].keys() == plan.checkpoint.tensors.keys()
    assert index["metadata"] == {"total_parameters": 1504, "total_size": 6007}


def test_the_fingerprint_is_that_of_what_the_bytes_follow_from(folder):
    checkpoint = open_checkpoint(folder)
    fingerprint = make_plan(checkpoint, RECIPE, 1000).fingerprint
    assert make_plan(checkpoint, {**RECIPE, "output": {"path": "elsewhere"}}, 1000).fingerprint == fingerprint
    accepted = {**RECIPE, "output": {"path": "out", "accept_license": True}}
    assert make_plan(checkpoint, accepted, 1000).fingerprint == fingerprint
    part = checkpoint.parts[0]
    others = [
        make_plan(checkpoint, {**RECIPE, "normalize": False}, 1000),
        make_plan(checkpoint, {**RECIPE, "output": {"dtype": "float32"}}, 1000),
        make_plan(checkpoint, RECIPE, 2000),
        make_plan(replace(checkpoint, parts=(replace(part, weight=0.5),)), RECIPE, 1000),
    ]
    os.utime(folder / "model.safetensors", ns=(0, 1))
    others.append(make_plan(open_checkpoint(folder), RECIPE, 1000))
    assert len({fingerprint, *(plan.fingerprint for plan in others)}) == 6

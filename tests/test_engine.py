"""The engine on small files: values, the same bytes however the work is cut, every dtype, resuming, changed sources."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from merger.budget import Allotment
from merger.checkpoint import open_checkpoint
from merger.checksum import LEAF
from merger.dtypes import DTYPES
from merger.engine import write_shards
from merger.errors import NonFiniteInput, SourceChanged
from merger.methods.combination import weighted_sum
from merger.plan import Plan, make_plan
from merger.receipt import read_receipt
from merger.storage.disk import InputFile
from tests.checkpoints import as_float64, bfloat16, read_raw, write_header, write_model


def plan_of(folders: Sequence[Path], weights: Sequence[float], shard_size: int = 10**9) -> Plan:
    checkpoints = [open_checkpoint(folder) for folder in folders]
    return make_plan(weighted_sum(checkpoints, weights), {"method": "average"}, shard_size)


def make(plan: Plan, output: Path, allotment: Allotment | None = None, **options) -> Path:
    (output / ".merger").mkdir(parents=True)
    write_shards(plan.shards, output, allotment or Allotment(2, 4 * LEAF, 1 << 20), plan.fingerprint, **options)
    return output


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """Three models whose tensors cross blocks in every way: long, tiny, empty, scalar, of two widths."""
    folder = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(3)
    paths = []
    for i in range(3):
        tensors = {"wide": rng.standard_normal((301, 257)).astype(np.float32), "scalar": np.array(i + 1.0, np.float32)}
        tensors |= {f"tiny.{j}": rng.standard_normal(j % 5).astype(np.float32) for j in range(200)}
        tensors |= {"narrow": bfloat16(rng.standard_normal((1000, 333))), "last": bfloat16(rng.standard_normal(7))}
        tensors["empty"] = np.zeros((0, 4), np.float32)
        paths.append(write_model(folder / f"model-{i}", tensors, {}, shards=1 + i))
    return paths


WEIGHTS = [0.5, 0.3, 0.2]


def stored(folder: Path) -> dict[str, tuple]:
    return {name: raw for path in sorted(folder.glob("*.safetensors")) for name, raw in read_raw(path).items()}


def test_every_value_is_the_weighted_sum(models, tmp_path):
    made = stored(make(plan_of(models, WEIGHTS), tmp_path / "out"))
    sources = [stored(folder) for folder in models]
    assert made.keys() == sources[0].keys()
    for name, (dtype, shape, content) in made.items():
        assert (dtype, shape) == sources[0][name][:2]
        terms = [w * as_float64(source[name][2], dtype) for w, source in zip(WEIGHTS, sources, strict=True)]
        exact = sum(terms)
        step = 2.0 ** -(24 if dtype == "F32" else 8)
        assert np.all(abs(as_float64(content, dtype) - exact) <= step * abs(exact) + 2.0**-140)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("block", [LEAF, 3 * LEAF, 16 * LEAF])
@pytest.mark.parametrize("room", [0, 10_000, 1 << 22])
def test_the_bytes_do_not_depend_on_how_the_work_is_cut(models, tmp_path, threads, block, room):
    plan = plan_of(models, WEIGHTS, shard_size=400_000)
    least = max(tensor.memory(1) for tensor in plan.checkpoint.tensors.values())
    made = make(plan, tmp_path / "out", Allotment(threads, block, least + room))
    assert contents(made) == contents(make(plan, tmp_path / "whole"))
    receipts = [read_receipt(tmp_path / name, plan.shards[0].name, plan.fingerprint) for name in ("out", "whole")]
    assert receipts[0] == receipts[1] is not None


def test_forty_sources(tmp_path):
    rng = np.random.default_rng(4)
    values = rng.standard_normal((40, 3000)).astype(np.float32)
    folders = [write_model(tmp_path / f"{i}", {"x": value}, {}) for i, value in enumerate(values)]
    made = stored(make(plan_of(folders, [1 / 40] * 40), tmp_path / "out"))["x"][2]
    np.testing.assert_allclose(as_float64(made, "F32"), values.astype(np.float64).mean(0), rtol=2.0**-24, atol=1e-9)


def test_every_dtype_passes_through_bit_for_bit(tmp_path):
    rng = np.random.default_rng(5)
    header, data = {}, b""
    for name, dtype in sorted(DTYPES.items(), key=lambda row: -row[1].alignment):
        content = rng.bytes(math.prod((24, 40)) * dtype.bits // 8)
        header[name] = {"dtype": name, "shape": [24, 40], "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    write_header(tmp_path / "model.safetensors", header, data)
    made = make(plan_of([tmp_path], [1.0]), tmp_path / "out")
    again = open_checkpoint(made).tensors
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in again.items()} == {
        name: (name, (24, 40)) for name in DTYPES
    }
    written = (made / "model.safetensors").read_bytes()
    for name, tensor in again.items():
        begin, end = header[name]["data_offsets"]
        assert written[tensor.offset : tensor.offset + tensor.nbytes] == data[begin:end]


def test_only_what_has_no_receipt_is_made(models, tmp_path):
    plan = plan_of(models, WEIGHTS, shard_size=200_000)
    assert len(plan.shards) > 3
    make(plan, tmp_path / "out")
    whole = contents(tmp_path / "out")
    for shard in plan.shards[2:]:
        (tmp_path / "out" / shard.name).unlink()
        (tmp_path / "out" / ".merger" / f"{shard.name}.json").unlink()
    left = [shard for shard in plan.shards if read_receipt(tmp_path / "out", shard.name, plan.fingerprint) is None]
    assert [shard.name for shard in left] == [shard.name for shard in plan.shards[2:]]
    write_shards(left, tmp_path / "out", Allotment(1, LEAF, 1 << 20), plan.fingerprint)
    assert contents(tmp_path / "out") == whole


def test_progress_adds_up_to_the_data(models, tmp_path):
    plan = plan_of(models, WEIGHTS, shard_size=200_000)
    counts, finished = [], []
    make(plan, tmp_path / "out", on_bytes=counts.append, on_shard=lambda receipt: finished.append(receipt.file))
    assert sum(counts) == sum(shard.data_size for shard in plan.shards)
    assert sorted(finished) == [shard.name for shard in plan.shards]


def broken(folder: Path, values: Sequence[float]) -> Path:
    tensors = {"good": np.ones(10, np.float32), "bad": np.array(values, np.float32)}
    return write_model(folder, tensors, {})


def test_values_that_a_source_lacks_are_counted_and_told_from_overflow(tmp_path):
    folders = [broken(tmp_path / "a", [1, np.nan, np.inf, 3e38]), broken(tmp_path / "b", [1, 1, -np.inf, 3e38])]
    checkpoint = weighted_sum([open_checkpoint(folder) for folder in folders], [1.0, 1.0])
    plan = make_plan(checkpoint, {"method": "average"}, 10**9)
    make(plan, tmp_path / "out", Allotment(1, LEAF, 12 * 1024))
    receipt = read_receipt(tmp_path / "out", "model.safetensors", plan.fingerprint)
    assert receipt.non_finite.keys() | receipt.overflowed.keys() == {"bad"}
    assert sum(receipt.non_finite.values()) + sum(receipt.overflowed.values()) == 3


def test_overflow_alone_is_no_fault_of_the_sources(tmp_path):
    folders = [broken(tmp_path / name, [3e38]) for name in ("a", "b")]
    plan = plan_of(folders, [1.0, 1.0])
    make(plan, tmp_path / "out")
    receipt = read_receipt(tmp_path / "out", "model.safetensors", plan.fingerprint)
    assert (receipt.non_finite, receipt.overflowed) == ({}, {"bad": 1})


def test_strict_names_the_file_and_the_tensor(tmp_path):
    folders = [broken(tmp_path / "a", [1]), broken(tmp_path / "b", [np.nan])]
    with pytest.raises(NonFiniteInput) as caught:
        make(plan_of(folders, [0.5, 0.5]), tmp_path / "out", strict=True)
    assert caught.value.where == f"{tmp_path / 'b' / 'model.safetensors'}: tensor 'bad'"


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 12345))


def grow(path: Path) -> None:
    times = path.stat()
    with path.open("ab") as file:
        file.write(b"x")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("change", [touch, grow, Path.unlink])
def test_a_source_that_changed_since_it_was_planned_is_refused(tmp_path, change):
    folders = [broken(tmp_path / name, [1]) for name in ("a", "b")]
    plan = plan_of(folders, [0.5, 0.5])
    change(tmp_path / "b" / "model.safetensors")
    with pytest.raises(SourceChanged, match=r"b/model[.]safetensors"):
        make(plan, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert not list((tmp_path / "out" / ".merger").glob("*.safetensors"))


def test_a_tensor_that_is_copied_often_is_read_through_the_page_cache(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model", {"w": np.arange(200_000, dtype=np.float32)}, {})
    once = open_checkpoint(folder)
    copies = replace(once, tensors={f"copy.{i}": once.tensors["w"] for i in range(4)})
    opened = []
    monkeypatch.setattr("merger.reader.InputFile", lambda *a, **k: opened.append(k) or InputFile(*a, **k))
    for checkpoint, again in ((copies, True), (once, False)):
        made = make(make_plan(checkpoint, {"method": "x"}, 10**9), tmp_path / f"again-{again}")
        assert opened.pop() == {"again": again}
        assert {raw[2] for raw in stored(made).values()} == {np.arange(200_000, dtype=np.float32).tobytes()}

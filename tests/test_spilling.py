"""Tensors that are made as a whole: the same bytes however the work is done, memory, scratch files, failures, nesting."""

import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from merger import spilling
from merger.budget import Allotment, allot
from merger.checkpoint import Checkpoint, open_checkpoint
from merger.checksum import LEAF
from merger.drawn import redrawn
from merger.engine import write_shards
from merger.errors import JobError, NonFiniteInput, NotEnoughDisk, NotEnoughMemory, VerificationFailed
from merger.expression import combine
from merger.noise import choose, key_of
from merger.plan import make_plan, read_again
from merger.preflight import check_disk
from merger.reader import OpenFiles
from merger.spilling import Scratch, Workshop, device_of, ready
from merger.values import values
from merger.whole import Function, Making, Whole, loading, wholes_in
from tests.checkpoints import as_float64, bfloat16, read_raw, write_model

SHAPE = (300, 500)


@dataclass(frozen=True, slots=True)
class Inverse(Function):
    """U V^T of the sum of what it is given, times a factor."""

    factor: float = 1.0

    def memory(self, inputs):
        return sum(loading(tensor) for tensor in inputs) + 8 * 6 * SHAPE[0] * SHAPE[1]

    def __call__(self, tensors):
        u, _, v = torch.linalg.svd(sum(tensors.all()), full_matrices=False)
        return (u @ v) * self.factor


@dataclass(frozen=True, slots=True)
class Passed(Function):
    """The tensor itself, whatever its values."""

    finite = False

    def memory(self, inputs):
        return loading(inputs[0])

    def __call__(self, tensors):
        return tensors.load(0)


@dataclass(frozen=True, slots=True)
class Failing(Function):
    def memory(self, inputs):
        return 0

    def __call__(self, tensors):
        raise ZeroDivisionError("of its own making")


@pytest.fixture
def model(tmp_path) -> Path:
    random = np.random.default_rng(0)
    tensors = {f"w{i}": random.normal(size=SHAPE).astype("f4") for i in range(4)}
    return write_model(tmp_path / "model", {**tensors, "b": bfloat16(random.normal(size=SHAPE))}, {})


def whole(name, *inputs, function=Inverse(), dtype="F32"):
    given = tuple(combine([(1.0, tensor)], "F64") for tensor in inputs)
    return Whole(dtype, inputs[0].shape, given, function, name)


def plan_of(tensors, shard_size=10**9):
    return make_plan(Checkpoint(tensors, {}, {}, ()), {"method": "x"}, shard_size)


def write(plan, output: Path, allotment: Allotment | None = None, **options) -> dict[str, bytes]:
    (output / ".merger").mkdir(parents=True, exist_ok=True)
    write_shards(plan.shards, output, allotment or allot(plan), plan.fingerprint, **options)
    assert not list((output / ".merger").glob("*.scratch*"))
    return {name: raw for path in output.glob("*.safetensors") for name, raw in read_raw(path).items()}


def polar(matrix):
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    return u @ v


def array(raw):
    return as_float64(raw[2], raw[0]).reshape(raw[1])


# ---- values -------------------------------------------------------------------------------------------


def test_what_is_made_is_rounded_once_and_goes_on_as_a_term(model, tmp_path):
    stored = open_checkpoint(model).tensors
    one = whole("one", stored["w0"], stored["b"])
    tensors = {"plain": stored["w1"], "one": one, "sum": combine([(0.5, one), (2.0, stored["w1"])], "BF16")}
    found = write(plan_of(tensors), tmp_path / "out")
    expected = polar(sum(array(read_raw(model / "model.safetensors")[name]) for name in ("w0", "b")))
    assert np.abs(array(found["one"]) - expected).max() <= 2.0**-25
    exact = 0.5 * array(found["one"]) + 2.0 * array(found["plain"])
    assert np.abs(array(found["sum"]) - exact).max() <= 2.0**-8 * np.abs(exact).max()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("memory", [1 << 20, 1 << 28])
def test_the_bytes_do_not_depend_on_threads_or_memory(model, tmp_path, threads, memory):
    stored = open_checkpoint(model).tensors
    tensors = {f"x{i}": whole(f"x{i}", stored[f"w{i}"]) for i in range(4)}
    before = torch.get_num_threads()
    plan = plan_of(tensors)
    found = write(plan, tmp_path / "out", allot(plan, memory, threads))
    other = write(plan_of(tensors, 1000), tmp_path / "other", Allotment(2, LEAF, 1 << 20))
    assert found == other
    assert torch.get_num_threads() == before


def test_what_is_made_of_what_is_made(model, tmp_path):
    """Rounds: a whole of wholes, a number of a whole (for what is drawn anew), and a whole of that."""
    stored = open_checkpoint(model).tensors
    inner = whole("inner", stored["w0"])
    mask = choose(key_of(0, "x"), 0.5, SHAPE[0])
    drawn = redrawn(inner, mask, 0, key_of(0, "y"))
    outer = whole("outer", inner, drawn, function=Inverse(2.0))
    found = write(plan_of({"inner": inner, "drawn": drawn, "outer": outer}), tmp_path / "out")
    parts = {name: array(raw) for name, raw in found.items()}
    chosen = parts["inner"][mask]
    assert np.array_equal(parts["drawn"][~mask], parts["inner"][~mask])
    assert abs(parts["drawn"][mask].std() - chosen.std()) < 0.01 * chosen.std()
    assert np.abs(parts["outer"] - 2.0 * polar(parts["inner"] + parts["drawn"])).max() < 1e-6


def test_values_of_a_checkpoint_in_memory(model, tmp_path):
    stored = open_checkpoint(model).tensors
    tensors = {"x": whole("x", stored["w0"]), "y": stored["w1"]}
    made = {name: bytes(content) for name, _, content in values(Checkpoint(tensors, {}, {}, ()))}
    assert made == {name: raw[2] for name, raw in write(plan_of(tensors), tmp_path / "out").items()}


def test_one_that_is_needed_twice_is_made_once(model, tmp_path, monkeypatch):
    stored = open_checkpoint(model).tensors
    calls = []
    monkeypatch.setattr(spilling, "_called", lambda w, t: (calls.append(w.name), w.function(t))[1])
    one = whole("x", stored["w0"])
    found = write(plan_of({"x": one, "y": one, "z": combine([(2.0, one)], "F32")}), tmp_path / "out")
    assert calls == ["x"]
    assert found["x"] == found["y"]
    assert np.array_equal(array(found["z"]), 2 * array(found["x"]))


# ---- what it costs ------------------------------------------------------------------------------------


def test_inputs_count_as_read_once(model):
    plan = plan_of({"x": whole("x", open_checkpoint(model).tensors["w0"])})
    assert plan.read_size == 4 * SHAPE[0] * SHAPE[1]
    assert not read_again(plan.shards)


def test_within_the_memory_several_run_at_once_and_beyond_it_one(model, tmp_path, monkeypatch):
    stored = open_checkpoint(model).tensors
    tensors = {f"x{i}": whole(f"x{i}", stored[f"w{i}"]) for i in range(4)}
    plan = plan_of(tensors)
    cost = plan.wholes[0].cost
    running, most, lock = [0], [], threading.Lock()
    meeting = threading.Barrier(2)

    def called(tensor, loaded):
        with lock:
            running[0] += 1
            most.append(running[0])
        if wide:
            meeting.wait(timeout=20)  # two are here at once, or the test fails
        made = tensor.function(loaded)
        with lock:
            running[0] -= 1
        return made

    monkeypatch.setattr(spilling, "_called", called)
    monkeypatch.setattr(spilling, "processors", lambda: 2)
    wide = True
    write(plan, tmp_path / "wide", Allotment(2, LEAF, 1 << 20, whole=2 * cost))
    assert max(most) == 2
    wide, most[:] = False, []
    write(plan, tmp_path / "narrow", Allotment(2, LEAF, 1 << 16, whole=cost + 1))
    assert (max(most), len(most)) == (1, 4)


def test_what_the_machine_cannot_hold_any_more_is_refused(model, tmp_path, monkeypatch):
    plan = plan_of({"x": whole("the tensor", open_checkpoint(model).tensors["w0"])})
    allotment = allot(plan, 1 << 18)
    assert allotment.memory == plan.wholes[0].cost > 1 << 18
    monkeypatch.setattr(spilling, "free_memory", lambda: 1000)
    with pytest.raises(NotEnoughMemory, match="'the tensor': is made as a whole and takes") as caught:
        write(plan, tmp_path / "out", Allotment(1, LEAF, 1 << 10))
    assert "1,000 free" in str(caught.value)
    assert not list((tmp_path / "out" / ".merger").iterdir())


def test_the_disk_must_hold_what_lies_beside_one_shard(model, monkeypatch):
    stored = open_checkpoint(model).tensors
    size = 4 * SHAPE[0] * SHAPE[1]
    inner = whole("x0", stored["w0"])
    tensors = {"x0": whole("outer", inner), "x1": whole("x1", stored["w1"]), "p": stored["w2"]}
    plan = plan_of(tensors, shard_size=size)
    assert [shard.scratch_size for shard in plan.shards] == [2 * size, size, 0]
    assert (plan.scratch_size(), plan.scratch_size(2)) == (2 * size, 3 * size)
    monkeypatch.setattr("merger.preflight.free_space", lambda _output: plan.size + 2 * size)
    check_disk(plan, Path("unused"), 0)
    with pytest.raises(NotEnoughDisk, match=f"{3 * size:,} of them for a while"):
        check_disk(plan, Path("unused"), 0, at_once=2)
    check_disk(plan, Path("unused"), plan.size, at_once=2)  # nothing is left to do


# ---- failures -----------------------------------------------------------------------------------------


def test_shards_are_finished_one_by_one(model, tmp_path):
    """A failure in the second leaves the first finished, and nothing beside it."""
    stored = open_checkpoint(model).tensors
    tensors = {
        "plain": stored["w2"],
        "x0": whole("x0", stored["w0"]),
        "bad": whole("bad", stored["w1"], function=Failing()),
    }
    plan = plan_of(tensors, shard_size=SHAPE[0] * SHAPE[1] * 4)
    finished = []
    with pytest.raises(JobError, match="tensor 'bad': could not be made: ZeroDivisionError: of its own making"):
        write(plan, tmp_path / "out", on_shard=lambda receipt: finished.append(receipt.file))
    assert finished == [plan.shards[0].name, plan.shards[1].name]
    assert not list((tmp_path / "out" / ".merger").glob("*.scratch*"))


def test_what_is_not_finite(model, tmp_path):
    odd = np.ones(SHAPE, "f4")
    odd[3, 4] = np.inf
    write_model(tmp_path / "odd", {"w": odd}, {})
    stored = open_checkpoint(tmp_path / "odd").tensors["w"]
    with pytest.raises(NonFiniteInput, match=r"odd/model.safetensors: tensor 'x': holds NaN"):
        write(plan_of({"x": whole("x", stored)}), tmp_path / "a")
    passed = plan_of({"x": whole("x", stored, function=Passed())})
    assert np.array_equal(array(write(passed, tmp_path / "b")["x"]), odd)
    with pytest.raises(NonFiniteInput):
        write(passed, tmp_path / "c", strict=True)
    large = combine([(1e6, open_checkpoint(model).tensors["w0"])], "F64")
    with pytest.raises(VerificationFailed, match="of its values came out as NaN or infinite"):
        write(plan_of({"x": whole("x", large, function=Passed(), dtype="F16")}), tmp_path / "d")


def test_a_result_of_another_size_is_an_error(model, tmp_path):
    stored = open_checkpoint(model).tensors["w0"]
    wrong = replace(whole("x", stored), shape=(SHAPE[0], SHAPE[1] - 1))
    with pytest.raises(JobError, match="came out with"):
        write(plan_of({"x": wrong}), tmp_path / "out")


def test_a_full_disk_is_told(model, tmp_path):
    plan = plan_of({"x": whole("x", open_checkpoint(model).tensors["w0"])})
    with Scratch(Path("/proc/nowhere")) as scratch, pytest.raises(JobError, match="cannot be made"):
        ready(plan.shards, OpenFiles(), Workshop(1 << 30, 1), scratch)


# ---- devices ------------------------------------------------------------------------------------------


def test_a_gpu_is_taken_where_torch_sees_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (device_of("auto"), device_of("cpu")) == ("cpu", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (device_of("auto"), device_of("cpu"), device_of("cuda")) == ("cuda", "cpu", "cuda")


def test_what_a_gpu_cannot_hold_goes_to_the_processor_where_nobody_insists(model, tmp_path, monkeypatch):
    plan = plan_of({"x": whole("x", open_checkpoint(model).tensors["w0"])})
    expected = write(plan, tmp_path / "cpu", replace(allot(plan), device="cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10, 20))
    assert write(plan, tmp_path / "auto", replace(allot(plan), device="auto")) == expected
    with pytest.raises(NotEnoughMemory, match="the GPU has 10 free"):
        write(plan, tmp_path / "cuda", replace(allot(plan), device="cuda"))


# ---- expressions --------------------------------------------------------------------------------------


def test_a_whole_knows_what_must_come_first(model):
    stored = open_checkpoint(model).tensors
    inner = whole("inner", stored["w0"])
    outer = whole("outer", inner, stored["w1"])
    assert [w.name for w in wholes_in([outer, inner])] == ["inner", "outer"]
    assert not Making(outer).is_ready
    assert Making(inner).is_ready
    known = outer.measured({Making(inner): stored["w2"]})
    assert Making(known).is_ready
    assert list(known.leaves()) == [stored["w2"], stored["w1"]]
    with pytest.raises(ValueError, match="was not made yet"):
        outer.values(0, 1, lambda part: None)
    with pytest.raises(TypeError, match="not measured"):
        Making(inner).compute(lambda start, stop: [])

"""Scaled tensors, against torch's eight-bit floats in float64."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from merger.expression import File, Stored, cast
from merger.scaled import Blocks, Scaled
from merger.shaping import columns, rows
from tests.checkpoints import as_float64
from tests.test_expression import evaluate

TORCH = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
SHAPES = [
    ((256, 256), (128, 128)),
    ((130, 260), (128, 128)),  # ragged to the right and below
    ((127, 129), (128, 128)),
    ((5, 7), (1, 7)),  # a scale a row
    ((5, 7), (5, 7)),  # one scale
    ((3, 6, 10), (4, 4)),  # ragged matrices one above the other
    ((9,), (1, 9)),
]


def made(folder, shape, block, dtype="F8_E4M3", out="BF16", seed=0):
    """A scaled tensor in two files, and its exact values."""
    rng = np.random.default_rng(seed)
    height, width = (1, *shape)[-2:]
    grid = (*shape[:-2], -(-height // block[0]), -(-width // block[1]))
    codes = torch.from_numpy(rng.normal(size=shape)).to(TORCH[dtype])
    scales = rng.uniform(1e-3, 0.1, grid).astype(np.float32)
    spread = np.kron(scales, np.ones(block, np.float32))[..., :height, :width].reshape(shape)
    stored = []
    for name, content, kind, dims in (
        ("codes", codes.view(torch.uint8).numpy(), dtype, shape),
        ("scales", scales, "F32", grid),
    ):
        path = folder / name
        path.write_bytes(b"odd" + content.tobytes())
        stored.append(Stored(kind, dims, File(path, path.stat().st_size, 0, ""), 3))
    blocks = Blocks(height, width, *block)
    return Scaled(out, shape, *stored, blocks), codes.double().numpy() * spread.astype(np.float64)


def check(found, wanted):
    """Half a unit of BF16 at most, but for the rounding of the product to float32."""
    error = np.abs(as_float64(found, "BF16").reshape(wanted.shape) - wanted)
    assert (error <= np.abs(wanted) * (2.0**-8 + 2.0**-23) + 1e-45).all()


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_values_are_those_of_torch(tmp_path, dtype, shape, block):
    tensor, wanted = made(tmp_path, shape, block, dtype)
    content, bad = evaluate(tensor)
    assert bad == 0
    check(content, wanted)
    product = torch.from_numpy(wanted).float().bfloat16()  # exact products rounded to float32, then to BF16
    assert content == product.view(torch.uint16).numpy().tobytes()


@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_ranges_are_parts_of_the_whole(tmp_path, shape, block):
    tensor, _ = made(tmp_path, shape, block)
    whole, _ = evaluate(tensor)
    rng = np.random.default_rng(3)
    cuts = sorted({0, tensor.size, *rng.integers(0, tensor.size + 1, 12).tolist()})
    parts = [evaluate(tensor, a, b)[0] for a, b in pairwise(cuts)]
    assert b"".join(parts) == whole
    assert evaluate(tensor, 3, 3) == (b"", 0)


@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_no_more_is_read_than_stated(tmp_path, shape, block):
    tensor, _ = made(tmp_path, shape, block)
    for start, stop in [(0, tensor.size), (0, 1), (tensor.size // 2, tensor.size // 2 + 3)]:
        read = sum(part.stop - part.start for part in tensor.reads(start, stop))
        assert read + (stop - start) * (4 + 2) <= tensor.memory(stop - start)
    steps = [tensor.memory(n + 1) - tensor.memory(n) for n in range(4)]
    assert len(set(steps)) == 1  # a + b * elements


def test_only_the_scales_of_the_range_are_read(tmp_path):
    tensor, _ = made(tmp_path, (512, 256), (128, 128))
    _, scales = tensor.reads(300 * 256, 301 * 256)
    assert (scales.start - 3, scales.stop - 3) == (2 * 2 * 4, 3 * 2 * 4)  # the third of four rows of two


@pytest.mark.parametrize("out", ["F32", "F16", "F64"])
def test_other_types_hold_the_product_of_float32(tmp_path, out):
    tensor, wanted = made(tmp_path, (130, 260), (128, 128), out=out)
    exact = torch.from_numpy(wanted).float()
    kind = {"F32": torch.float32, "F16": torch.float16, "F64": torch.float64}[out]
    assert evaluate(tensor)[0] == exact.to(kind).numpy().tobytes()


def test_nan_is_counted(tmp_path):
    tensor, _ = made(tmp_path, (5, 7), (1, 7))
    content = bytearray(tensor.of.file.path.read_bytes())
    content[3 + 10] = 0x7F
    tensor.of.file.path.write_bytes(content)
    assert evaluate(tensor)[1] == 1


@pytest.mark.parametrize(("shape", "block"), [s for s in SHAPES if len(s[0]) > 1])
def test_rows_are_parts_of_the_whole(tmp_path, shape, block):
    tensor, _ = made(tmp_path, shape, block)
    whole = np.frombuffer(evaluate(tensor)[0], np.uint16).reshape(shape)
    for first, last in [(0, 1), (1, shape[0]), (shape[0] - 1, shape[0])]:
        part = rows(rows(tensor, first, shape[0]), 0, last - first)
        assert evaluate(part)[0] == whole[first:last].tobytes()


@pytest.mark.parametrize(("shape", "block"), [s for s in SHAPES if len(s[0]) == 2])
def test_columns_are_parts_of_the_whole(tmp_path, shape, block):
    tensor, _ = made(tmp_path, shape, block)
    whole = np.frombuffer(evaluate(tensor)[0], np.uint16).reshape(shape)
    for first, last in [(0, 2), (2, shape[1]), (shape[1] // 2, shape[1] // 2 + 1)]:
        part = columns(rows(tensor, 1, shape[0]), first, last)
        assert evaluate(part)[0] == whole[1:, first:last].tobytes()
        for start, stop in [(0, part.size), (1, part.size), (part.size - 1, part.size)]:
            assert evaluate(part, start, stop)[0] == whole[1:, first:last].reshape(-1)[start:stop].tobytes()


def test_sums_are_of_the_values_in_the_tensors_own_type(tmp_path):
    tensor, _ = made(tmp_path, (130, 260), (128, 128))
    narrow = as_float64(evaluate(tensor)[0], "BF16")
    assert as_float64(evaluate(cast(tensor, "F32"))[0], "F32").tolist() == narrow.tolist()

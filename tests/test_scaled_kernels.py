"""Eight-bit floats, against torch's."""

import numpy as np
import pytest
import torch

from merger.scaled_kernels import TABLES, as_float32, count_non_finite_codes, multiply_by_scales
from tests.checkpoints import bfloat16

TORCH = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
ALL = np.arange(256, dtype=np.uint8)


@pytest.mark.parametrize("dtype", TORCH)
def test_every_pattern_is_what_torch_says(dtype):
    wanted = torch.from_numpy(ALL).view(TORCH[dtype]).float().numpy()
    np.testing.assert_array_equal(TABLES[dtype], wanted)
    numbers = ~np.isnan(wanted)  # NaN has no sign that counts
    np.testing.assert_array_equal(np.signbit(TABLES[dtype][numbers]), np.signbit(wanted[numbers]))


@pytest.mark.parametrize("dtype", TORCH)
def test_patterns_that_are_not_finite_are_counted(dtype):
    wanted = int((~torch.isfinite(torch.from_numpy(ALL).view(TORCH[dtype]).float())).sum())
    assert count_non_finite_codes(np.tile(ALL, 3), dtype) == 3 * wanted


def test_scales_of_every_type_become_float32():
    values = np.array([0.5, 1.5, -3.0])
    assert as_float32(values.astype(np.float32).view(np.uint8), "F32").tolist() == [0.5, 1.5, -3.0]
    assert as_float32(values.astype(np.float16).view(np.uint8), "F16").tolist() == [0.5, 1.5, -3.0]
    assert as_float32(np.frombuffer(bfloat16(values)[2], np.uint8), "BF16").tolist() == [0.5, 1.5, -3.0]
    assert as_float32(np.array([126, 127, 129], np.uint8), "F8_E8M0").tolist() == [0.5, 1.0, 4.0]
    assert as_float32(np.empty(0, np.uint8), "F32").size == 0


@pytest.mark.parametrize(("height", "width", "block"), [(5, 7, (2, 3)), (4, 4, (4, 4)), (3, 8, (1, 8)), (6, 5, (8, 2))])
@pytest.mark.parametrize("matrices", [1, 3])
def test_each_value_is_multiplied_by_the_scale_of_its_block(height, width, block, matrices):
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 0x78, matrices * height * width, dtype=np.uint8)
    grid = (-(-height // block[0]), -(-width // block[1]))
    scales = rng.normal(size=(matrices, *grid)).astype(np.float32)
    spread = np.kron(scales, np.ones(block, np.float32))[:, :height, :width]
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy().reshape(matrices, height, width)
    found = multiply_by_scales(
        codes,
        "F8_E4M3",
        scales.reshape(-1),
        start=0,
        width=width,
        place=(0, 0, 0),
        block=block,
        grid=(height, *grid),
    )
    np.testing.assert_array_equal(found.reshape(matrices, height, width), values * spread)

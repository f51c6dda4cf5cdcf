from itertools import combinations, product

import numpy as np
import pytest
import torch

from merger.dtypes import DTYPES, FROM_TORCH, TORCH_NAMES, Kind, promote
from tests.checkpoints import NUMPY

FLOATS = [name for name, dtype in DTYPES.items() if dtype.is_float]


@pytest.mark.parametrize("name", NUMPY)
def test_sizes_are_those_of_numpy(name):
    assert DTYPES[name].bits == 8 * np.dtype(NUMPY[name]).itemsize
    assert DTYPES[name].alignment == np.dtype(NUMPY[name]).itemsize


@pytest.mark.parametrize("name", NUMPY)
def test_kinds_are_those_of_numpy(name):
    kinds = {"f": Kind.FLOAT, "c": Kind.COMPLEX, "b": Kind.INTEGER, "i": Kind.INTEGER, "u": Kind.INTEGER}
    assert DTYPES[name].kind is kinds[np.dtype(NUMPY[name]).kind]


@pytest.mark.parametrize("name", DTYPES)
def test_every_type_is_known_by_its_own_name(name):
    assert DTYPES[name].name == name


@pytest.mark.parametrize("name", [name for name, dtype in DTYPES.items() if dtype.kind is Kind.PACKED])
def test_narrow_floats_take_no_part_in_arithmetic(name):
    assert DTYPES[name].bits <= 8
    assert not DTYPES[name].is_float


@pytest.mark.parametrize("name", ["F6_E2M3", "F6_E3M2", "F4"])
def test_types_under_a_byte_are_aligned_to_bytes(name):
    assert DTYPES[name].alignment == 1


@pytest.mark.parametrize("name", FLOATS)
def test_torch_has_a_floating_type_of_that_name_and_size(name):
    dtype = getattr(torch, TORCH_NAMES[name])
    assert dtype.is_floating_point
    assert 8 * dtype.itemsize == DTYPES[name].bits
    assert FROM_TORCH[TORCH_NAMES[name]] == name


@pytest.mark.parametrize(("a", "b"), list(product(FLOATS, FLOATS)))
def test_promotion_is_that_of_torch(a, b):
    together = torch.promote_types(getattr(torch, TORCH_NAMES[a]), getattr(torch, TORCH_NAMES[b]))
    assert promote(frozenset({a, b})) == FROM_TORCH[str(together).removeprefix("torch.")]


@pytest.mark.parametrize("names", [names for n in (3, 4) for names in combinations(FLOATS, n)])
def test_promotion_of_many_is_promotion_one_after_another(names):
    together = names[0]
    for name in names[1:]:
        together = promote(frozenset({together, name}))
    assert promote(frozenset(names)) == together

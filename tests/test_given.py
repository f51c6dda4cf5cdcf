import base64

import numpy as np
import pytest

from merger.given import as_text, from_text, given

VALUES = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


def test_any_range_of_elements_and_rows():
    tensor = given(VALUES)
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == ("F32", (3, 4), 48)
    flat = VALUES.reshape(-1)
    assert np.array_equal(tensor.values(2, 9, None).view(np.float32), flat[2:9])
    assert np.array_equal(tensor.rows(1, 3).values(0, 8, None).view(np.float32), flat[4:])
    assert list(tensor.leaves()) == list(tensor.reads(0, 12)) == []


def test_text_keeps_every_bit():
    assert np.array_equal(from_text(as_text(VALUES), (3, 4)), VALUES)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not base64!", "is not base64"),
        (base64.b64encode(b"123").decode(), "buffer size"),
        (as_text(VALUES[:2]), "reshape"),
        (as_text(np.array([1.0] * 11 + [np.nan], np.float32)), "not finite"),
    ],
)
def test_other_texts(text, words):
    with pytest.raises(ValueError, match=words):
        from_text(text, (3, 4))

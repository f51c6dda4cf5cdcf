import json
import os
import re
import struct
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open

from merger.dtypes import DTYPES
from merger.errors import FormatError, SourceError
from merger.storage import safetensors as reader
from merger.storage.safetensors import build_header, read_header
from tests.checkpoints import NUMPY, entry, write_header, write_safetensors


def pattern(size):
    return (np.arange(size) % 251).astype(np.uint8).tobytes()


def size_of(dtype, elements):
    return elements * DTYPES[dtype].bits // 8


# ---- what the library writes, and what it reads -------------------------------------------------------

WRITTEN = [name for name in DTYPES if not name.startswith("F6")]  # the library writes no six-bit types


@pytest.mark.parametrize("dtype", WRITTEN)
def test_a_file_of_the_library_is_read(tmp_path, dtype):
    tensors = {
        "b.weight": (dtype, (2, 8), pattern(size_of(dtype, 16))),
        "a.weight": (dtype, (4,), pattern(size_of(dtype, 4))),
        "empty": (dtype, (0, 8), b""),
    }
    path = write_safetensors(tmp_path / "a.safetensors", tensors, {"format": "pt", "note": "näher"})
    header = read_header(path)
    content = path.read_bytes()
    assert {name: (it.dtype, it.shape, content[it.start : it.stop]) for name, it in header.tensors.items()} == tensors
    assert header.metadata == {"format": "pt", "note": "näher"}
    assert header.file_size == len(content)
    assert header.data_start == 8 + struct.unpack("<Q", content[:8])[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_with_a_built_header_is_read_by_the_library(tmp_path, dtype):
    tensors = [("b.weight", dtype, (2, 8)), ("a.weight", dtype, (4,)), ("empty", dtype, (0, 8)), ("c", dtype, (8,))]
    head = build_header(tensors, {"format": "pt"})
    path = tmp_path / "a.safetensors"
    path.write_bytes(head + pattern(size_of(dtype, 28)))
    with safe_open(path, "np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {name: (it.get_dtype(), tuple(it.get_shape())) for name, it in slices.items()} == {
            name: (dtype, shape) for name, dtype, shape in tensors
        }
        assert file.metadata() == {"format": "pt"}
    theirs = {name: bytes(it["data"]) for name, it in deserialize(path.read_bytes())}
    ours = {name: path.read_bytes()[it.start : it.stop] for name, it in read_header(path).tensors.items()}
    assert ours == theirs
    assert b"".join(ours[name] for name, *_ in tensors) == pattern(size_of(dtype, 28))


def test_values_go_round_through_the_library(tmp_path):
    arrays = {name: np.arange(6).astype(kind).reshape(2, 3) for name, kind in NUMPY.items()}
    head = build_header([(name, name, (2, 3)) for name in arrays], {})
    path = tmp_path / "a.safetensors"
    path.write_bytes(head + b"".join(array.tobytes() for array in arrays.values()))
    with safe_open(path, "np") as file:
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)


@pytest.mark.parametrize("count", [0, 1, 30, 60, 1000])
def test_the_data_after_a_built_header_starts_at_a_page(count):
    head = build_header([(f"layers.{i}.weight", "F32", (3,)) for i in range(count)], {"format": "pt"})
    assert len(head) % 4096 == 0
    assert struct.unpack("<Q", head[:8])[0] == len(head) - 8
    assert json.loads(head[8:])["__metadata__"] == {"format": "pt"}


def test_a_header_without_metadata_has_none():
    assert b"__metadata__" not in build_header([("a", "F32", ())], {})


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    header = {"a": entry("U8", [2], 6, 8), "b": entry("U8", [6], 0, 6), "c": entry("U8", [0], 6, 6)}
    assert list(read_header(write_header(tmp_path / "a", header, bytes(8))).tensors) == ["b", "c", "a"]


def test_the_digest_changes_with_the_header_and_not_with_the_data(tmp_path):
    one = read_header(write_header(tmp_path / "1", {"a": entry("U8", [4], 0, 4)}, b"1234"))
    same = read_header(write_header(tmp_path / "2", {"a": entry("U8", [4], 0, 4)}, b"5678"))
    other = read_header(write_header(tmp_path / "3", {"a": entry("I8", [4], 0, 4)}, b"1234"))
    assert one.sha256 == same.sha256 != other.sha256


@pytest.mark.parametrize("header", [b"{}", b"{}   \n", b'{"__metadata__":{}}'])
def test_a_file_without_tensors_is_a_file(tmp_path, header):
    assert read_header(write_header(tmp_path / "a", header)).tensors == {}


def test_a_scalar_has_one_element(tmp_path):
    path = write_header(tmp_path / "a", {"x": entry("F64", [], 0, 8)}, bytes(8))
    assert read_header(path).tensors["x"].shape == ()


# ---- refusals -----------------------------------------------------------------------------------------


def refused(path, *, tensor=None, says=None):
    """The file is refused in words that name it, the tensor where one is to blame, and the problem."""
    with pytest.raises(FormatError, match=says) as caught:
        read_header(path)
    assert caught.value.where == (f"{path}: tensor {tensor!r}" if tensor else str(path))
    assert caught.value.remedy
    return caught.value


TWO = {"a": entry("F32", [2], 0, 8), "b": entry("F32", [3], 8, 20)}


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_of_a_few_bytes_is_refused(tmp_path, size):
    path = tmp_path / "a"
    path.write_bytes(bytes(size))
    refused(path, says=f"is {size} bytes long: too short")


@pytest.mark.parametrize("missing", [1, 8, 19, 20])
def test_a_truncated_file_is_refused(tmp_path, missing):
    path = write_header(tmp_path / "a", TWO, bytes(20))
    os.truncate(path, path.stat().st_size - missing)
    refused(path, says=r"is truncated: its header describes \d+ bytes, the file has \d+")


def test_a_file_truncated_within_its_header_is_refused(tmp_path):
    path = write_header(tmp_path / "a", TWO, bytes(20))
    os.truncate(path, 40)
    refused(path, says="is truncated: the header alone takes")


def test_bytes_after_the_end_are_refused(tmp_path):
    refused(write_header(tmp_path / "a", TWO, bytes(21)), says="bytes after its last tensor")


@pytest.mark.parametrize("length", [21, 1 << 20])
def test_a_header_longer_than_the_file_is_refused(tmp_path, length):
    refused(write_header(tmp_path / "a", b"{}" + bytes(18), length=length), says="is truncated")


@pytest.mark.parametrize("length", [(1 << 64) - 1, 1 << 63, 100 << 20])
def test_a_header_that_claims_too_much_is_refused_before_it_is_read(tmp_path, length):
    path = write_header(tmp_path / "a", b"{}", length=length)
    os.truncate(path, min(length, 100 << 20) + 8)  # takes no space: the rest is a hole
    refused(path, says="claims a header of")


@pytest.mark.parametrize(
    "text", [b"", b" ", b"{", b"not json", b"{}x", b"{}\0", b'{"a":}', b"\xff\xfe", b'{"a":"\xff"}']
)
def test_a_header_that_is_not_json_is_refused(tmp_path, text):
    refused(write_header(tmp_path / "a", text), says="not JSON")


@pytest.mark.parametrize("text", [b"[]", b"7", b'"a"', b"null", b"true", b" {}", b"\n{}"])
def test_a_header_that_is_not_an_object_is_refused(tmp_path, text):
    refused(write_header(tmp_path / "a", text), says="not a JSON object")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
            "a",
        ),
        (b'{"a":{"dtype":"U8","shape":[0],"shape":[0],"data_offsets":[0,0]}}', "shape"),
        (b'{"__metadata__":{"format":"pt","format":"np"}}', "format"),
        (b'{"__metadata__":{},"__metadata__":{}}', "__metadata__"),
    ],
)
def test_a_name_that_comes_twice_is_refused(tmp_path, text, name):
    refused(write_header(tmp_path / "a", text), says=f"names '{name}' twice")


@pytest.mark.parametrize("metadata", ["text", ["pt"], None, {"format": 1}, {"format": None}, {"format": {}}])
def test_metadata_that_are_not_strings_are_refused(tmp_path, metadata):
    refused(write_header(tmp_path / "a", {"__metadata__": metadata}), says="__metadata__")


def test_tensors_that_overlap_are_refused(tmp_path):
    header = {"a": entry("F32", [2], 0, 8), "b": entry("F32", [3], 4, 16)}
    refused(write_header(tmp_path / "a", header, bytes(16)), tensor="b", says="overlaps the tensor before it")


def test_two_tensors_in_one_place_are_refused(tmp_path):
    header = {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)}
    refused(write_header(tmp_path / "a", header, bytes(8)), tensor="b", says="overlaps the tensor before it")


@pytest.mark.parametrize(("first", "second", "guilty"), [((1, 9), (9, 21), "a"), ((0, 8), (9, 21), "b")])
def test_a_hole_is_refused(tmp_path, first, second, guilty):
    header = {"a": entry("F32", [2], *first), "b": entry("F32", [3], *second)}
    refused(write_header(tmp_path / "a", header, bytes(21)), tensor=guilty, says="leaves a hole before it")


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (0, 12), (8, 0), (0, 0)])
def test_offsets_of_another_size_than_the_shape_are_refused(tmp_path, start, stop):
    header = {"x": entry("F32", [2], start, stop)}
    refused(write_header(tmp_path / "a", header, bytes(12)), tensor="x", says=r"F32 \[2\] takes 8 bytes")


@pytest.mark.parametrize("dtype", ["F128", "float32", "", "f32", None, 4, ["F32"], {"F32": 1}])
def test_an_unknown_dtype_is_refused(tmp_path, dtype):
    header = {"x": entry(dtype, [2], 0, 8)}
    refused(write_header(tmp_path / "a", header, bytes(8)), tensor="x", says="unknown dtype")


@pytest.mark.parametrize("shape", [[-2], [-1, -2], [2.0], [True], ["2"], [None], [[2]], [1 << 64], [10**400]])
def test_a_shape_that_is_not_of_natural_numbers_is_refused(tmp_path, shape):
    refused(write_header(tmp_path / "a", {"x": entry("F32", shape, 0, 8)}, bytes(8)), tensor="x")


@pytest.mark.parametrize("shape", [2, "2", None, {"2": 2}])
def test_a_shape_that_is_not_a_list_is_refused(tmp_path, shape):
    header = {"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}
    refused(write_header(tmp_path / "a", header, bytes(8)), tensor="x", says="bad shape")


@pytest.mark.parametrize("offsets", [[0], [0, 8, 8], [], [-8, 0], [0.0, 8.0], [False, True], ["0", "8"], None, 8])
def test_bad_offsets_are_refused(tmp_path, offsets):
    header = {"x": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}
    refused(write_header(tmp_path / "a", header, bytes(8)), tensor="x", says="bad offsets")


@pytest.mark.parametrize("shape", [[1 << 62] * 2, [1 << 62] * 20, [1 << 40, 1 << 40, 0]])
def test_a_shape_of_more_elements_than_there_can_be_is_refused(tmp_path, shape):
    path = write_header(tmp_path / "a", {"x": entry("F32", shape, 0, 0)})
    with pytest.raises(SafetensorError):
        deserialize(path.read_bytes())
    refused(path, tensor="x")


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_a_missing_field_is_refused(tmp_path, field):
    header = entry("F32", [2], 0, 8)
    del header[field]
    refused(write_header(tmp_path / "a", {"x": header}, bytes(8)), tensor="x", says="must have exactly the fields")


def test_a_field_too_many_is_refused(tmp_path):
    header = {"x": {**entry("F32", [2], 0, 8), "strides": [1]}}
    refused(write_header(tmp_path / "a", header, bytes(8)), tensor="x", says="must have exactly the fields")


@pytest.mark.parametrize("value", [None, 7, "text", [], [["dtype", "F32"]]])
def test_a_tensor_that_is_not_an_object_is_refused(tmp_path, value):
    refused(write_header(tmp_path / "a", {"x": value}), tensor="x", says="must have exactly the fields")


@pytest.mark.parametrize("name", ["", "a\0b", "a\nb", "a\x1b[2J", "a\u202eb", "\ud800", "x" * 2000])
def test_an_unusable_name_is_refused(tmp_path, name):
    error = refused(write_header(tmp_path / "a", {name: entry("U8", [0], 0, 0)}), says="unusable name")
    assert error.message.isprintable()
    assert len(error.message) < 200


@pytest.mark.parametrize("name", ["x" * 1024, "ä.weight", "層.0", "a b", "../../etc/passwd", "'\"\\"])
def test_a_name_may_be_any_printable_text(tmp_path, name):
    path = write_header(tmp_path / "a", {name: entry("U8", [0], 0, 0)})
    assert list(read_header(path).tensors) == [name]


def test_too_many_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_TENSORS", 1)
    refused(write_header(tmp_path / "a", TWO, bytes(20)), says="holds 2 tensors")


@pytest.mark.parametrize(("dtype", "count"), [("F4", 1), ("F4", 3), ("F6_E2M3", 2), ("F6_E3M2", 3)])
def test_tensors_that_end_within_a_byte_are_refused(tmp_path, dtype, count):
    size = -(-count * DTYPES[dtype].bits // 8)
    path = write_header(tmp_path / "a", {"x": entry(dtype, [count], 0, size)}, bytes(size))
    with pytest.raises(SafetensorError):
        deserialize(path.read_bytes())
    refused(path, tensor="x", says="takes")


def test_nesting_of_any_depth_is_refused(tmp_path):
    limit = sys.getrecursionlimit()
    for depth in [2, *range(limit - 100, limit + 10), 100_000]:
        nest = b"[" * depth + b"]" * depth
        for place in (
            b"%s",
            b'{"dtype":"U8","shape":%s,"data_offsets":[0,0]}',
            b'{"dtype":%s,"shape":[],"data_offsets":[0,0]}',
        ):
            with pytest.raises(FormatError):
                read_header(write_header(tmp_path / "a", b'{"x":%s}' % (place % nest)))


@pytest.mark.parametrize(
    "header",
    [
        {"x": entry("F" * 100_000, [2], 0, 8)},
        {"x": entry("F32", [1] * 100_000, 0, 8)},
        {"x": entry("F32", ["2" * 100_000], 0, 8)},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0] * 100_000}},
    ],
    ids=["dtype", "shape", "bad shape", "offsets"],
)
def test_a_refusal_is_short_whatever_the_file_says(tmp_path, header):
    assert len(refused(write_header(tmp_path / "a", header, bytes(8)), tensor="x").message) < 1000


@pytest.mark.parametrize(
    "text",
    [
        b'{"x":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}',
        b'{"__metadata__":{"format":"\\ud800"}}',
        b'{"__metadata__":{"\\udfff":"pt"}}',
    ],
    ids=["minus zero", "half a character", "half a character as a key"],
)
def test_what_python_reads_and_the_library_does_not_is_refused(tmp_path, text):
    path = write_header(tmp_path / "a", text)
    with pytest.raises(SafetensorError):
        deserialize(path.read_bytes())
    refused(path)


def test_a_file_that_cannot_be_opened_is_an_error_of_the_source(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(SourceError, match="cannot be read") as caught:
            read_header(path)
        assert caught.value.where == str(path)


# ---- anything at all ----------------------------------------------------------------------------------


def check_against_the_library(path, content):
    """A header that we accept, the library accepts and reads in the same way; all else is a FormatError."""
    path.write_bytes(content)
    try:
        header = read_header(path)
    except FormatError:
        return
    theirs = {name: (it["dtype"], tuple(it["shape"]), bytes(it["data"])) for name, it in deserialize(content)}
    assert {name: (it.dtype, it.shape, content[it.start : it.stop]) for name, it in header.tensors.items()} == theirs


@given(st.binary(max_size=200))
def test_random_bytes_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "random"
    check_against_the_library(path, content)
    check_against_the_library(path, struct.pack("<Q", len(content)) + content)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 1 << 65)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([*DTYPES]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
dimensions = st.lists(st.integers(0, 4) | st.sampled_from([1 << 31, 1 << 40, 1 << 62]), max_size=4)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES]) | json_values,
        "shape": dimensions | json_values,
        "data_offsets": st.lists(st.integers(0, 16), min_size=2, max_size=2) | json_values,
    }
)


@given(
    st.dictionaries(st.sampled_from("abc") | st.text(max_size=3), entries | json_values, max_size=3),
    st.binary(max_size=32),
)
def test_headers_of_the_right_form_are_read_or_refused(tmp_path_factory, header, data):
    text = json.dumps(header).encode()
    path = tmp_path_factory.getbasetemp() / "formed"
    check_against_the_library(path, struct.pack("<Q", len(text)) + text + data)


@st.composite
def valid_files(draw):
    """The bytes of a file without a fault."""
    header, position = {}, 0
    for name in draw(st.lists(st.text("abc.", min_size=1, max_size=5), unique=True, max_size=4)):
        dtype = draw(st.sampled_from([*DTYPES]))
        shape = [*draw(st.lists(st.integers(0, 3), max_size=2)), 4]
        size = size_of(dtype, int(np.prod(shape)))
        header[name] = entry(dtype, shape, position, position + size)
        position += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + pattern(position)


@given(valid_files())
def test_every_file_without_a_fault_is_read(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "valid"
    check_against_the_library(path, content)
    read_header(path)


@given(valid_files(), st.data())
def test_damaged_files_are_read_or_refused(tmp_path_factory, content, data):
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["change", "digit", "insert", "remove", "cut"]))
        place = data.draw(st.integers(0, max(0, len(damaged) - 1)))
        if kind == "change":
            damaged[place : place + 1] = data.draw(st.binary(min_size=1, max_size=1))
        elif kind == "digit" and (digits := [found.start() for found in re.finditer(rb"\d", damaged[8:])]):
            damaged[8 + data.draw(st.sampled_from(digits))] = data.draw(st.sampled_from(b"0123456789-.e"))
        elif kind == "insert":
            damaged[place:place] = data.draw(st.binary(max_size=3))
        elif kind == "remove":
            del damaged[place : place + 2]
        else:
            del damaged[place:]
    check_against_the_library(tmp_path_factory.getbasetemp() / "damaged", bytes(damaged))

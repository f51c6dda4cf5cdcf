"""A receipt counts only for its own plan and for a file that is there, whole."""

import pytest

from merger.receipt import Receipt, read_receipt, write_receipt


@pytest.fixture
def output(tmp_path):
    (tmp_path / ".merger").mkdir()
    (tmp_path / "a").write_bytes(b"four")
    write_receipt(tmp_path, Receipt("a", 4, "0", "plan", {"x": 1}))
    return tmp_path


def test_a_finished_shard_is_known_again(output):
    assert read_receipt(output, "a", "plan") == Receipt("a", 4, "0", "plan", {"x": 1})


def test_another_plan_does_not_count(output):
    assert read_receipt(output, "a", "other") is None


@pytest.mark.parametrize("content", [b"five!", None])
def test_another_file_does_not_count(output, content):
    (output / "a").unlink()
    if content:
        (output / "a").write_bytes(content)
    assert read_receipt(output, "a", "plan") is None


@pytest.mark.parametrize("text", ["", "[]", '{"file": "a"}', '{"more": 1}'])
def test_a_damaged_receipt_does_not_count(output, text):
    (output / ".merger" / "a.json").write_text(text)
    assert read_receipt(output, "a", "plan") is None

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel

from merger.tokenizer import VOCABULARY_FILES, difference


@pytest.fixture
def model(tmp_path):
    """Makes the side files of a model from names and contents."""

    def make(label, files):
        folder = tmp_path / label
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return {name: folder / name for name in files}

    return make


def word_level(vocabulary, *added):
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(added))
    return tokenizer.to_str()


WORDS = {"[UNK]": 0, "a": 1, "b": 2}


def test_the_same_bytes_are_no_difference(model):
    files = {"tokenizer.json": word_level(WORDS), "tokenizer.model": b"\x00\x01"}
    assert difference(model("a", files), model("b", files)) is None


def test_the_same_ids_in_another_layout_are_no_difference(model):
    text = word_level(WORDS, "<end>")
    pretty = json.dumps(json.loads(text), indent=4, sort_keys=True)
    assert pretty != text
    assert difference(model("a", {"tokenizer.json": text}), model("b", {"tokenizer.json": pretty})) is None


def test_settings_beside_the_vocabulary_are_no_difference(model):
    tokenizer = Tokenizer.from_str(word_level(WORDS))
    tokenizer.enable_truncation(16)
    other = {"tokenizer.json": tokenizer.to_str()}
    assert difference(model("a", {"tokenizer.json": word_level(WORDS)}), model("b", other)) is None


@pytest.mark.parametrize(
    ("other", "token"),
    [
        (word_level({"[UNK]": 0, "a": 2, "b": 1}), "'a'"),
        (word_level({"[UNK]": 0, "a": 1, "c": 2}), "'b'"),
        (word_level(WORDS, "<pad>"), "'<pad>'"),
    ],
    ids=["other order", "other token", "token more"],
)
def test_the_first_token_with_another_id_is_named(model, other, token):
    found = difference(model("a", {"tokenizer.json": word_level(WORDS)}), model("b", {"tokenizer.json": other}))
    assert f"token {token} has the id" in found


@pytest.mark.parametrize(
    "kind",
    [BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]), Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], 0)],
    ids=["BPE", "Unigram"],
)
def test_every_kind_of_vocabulary_is_compared_by_ids(model, kind):
    a, b = Tokenizer(kind), Tokenizer(kind)
    b.add_tokens(["more"])
    first = model("a", {"tokenizer.json": a.to_str()})
    assert difference(first, model("same", {"tokenizer.json": a.to_str(pretty=True)})) is None
    assert "'more'" in difference(first, model("b", {"tokenizer.json": b.to_str()}))


def test_plain_vocabularies_are_compared_by_ids(model):
    first = model("a", {"vocab.json": '{"a": 0, "b": 1}'})
    assert difference(first, model("same", {"vocab.json": '{"b":1,"a":0}'})) is None
    assert "'b' has the id 1 in one and 2 in the other" in difference(
        first, model("b", {"vocab.json": '{"a": 0, "b": 2}'})
    )


def test_a_plain_vocabulary_may_have_the_word_model(model):
    # As that of GPT-2 has.
    first = model("a", {"vocab.json": '{"model": 0, "b": 1}'})
    assert difference(first, model("same", {"vocab.json": '{"b":1,"model":0}'})) is None
    assert "'model'" in difference(first, model("b", {"vocab.json": '{"model": 2, "b": 1}'}))


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "vocab.txt"])
def test_files_that_cannot_be_looked_into_must_be_equal(model, name):
    first = model("a", {name: b"\x0a\xff\x01"})
    assert difference(first, model("b", {name: b"\x0a\xff\x02"})) == f"{name} differs"


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "7",
        '"text"',
        "{}",
        "null",
        "not json",
        '{"model": {}}',
        '{"model": {"vocab": [1, 2]}}',
        '{"model": {"vocab": null}}',
        '{"model": {"vocab": {}}, "added_tokens": [{}]}',
        '{"model": {"vocab": {"a": "x", "b": null, "c": 3}}}',
        '{"model": {"vocab": {"a": []}}, "added_tokens": null}',
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_a_damaged_tokenizer_is_a_difference_not_a_crash(model, content):
    first = model("a", {"tokenizer.json": word_level(WORDS)})
    assert difference(first, model("b", {"tokenizer.json": content}))
    assert difference(model("c", {"tokenizer.json": content}), first)


def test_only_files_that_both_have_are_compared(model):
    assert difference(model("a", {"tokenizer.json": word_level(WORDS)}), model("b", {"vocab.json": "{}"})) is None
    assert difference({}, model("c", {"vocab.json": "{}"})) is None


def test_the_first_file_that_both_have_decides(model):
    text = word_level(WORDS)
    first = model("a", {"tokenizer.json": text, "vocab.json": '{"a": 0}'})
    assert difference(first, model("b", {"tokenizer.json": text, "vocab.json": '{"a": 1}'})) is None
    assert VOCABULARY_FILES[0] == "tokenizer.json"

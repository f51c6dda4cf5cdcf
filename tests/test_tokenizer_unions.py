"""Contents of tokenizer.json, read back by the tokenizers library."""

import json

import pytest
from tokenizers import Tokenizer

from merger.errors import IncompatibleSources, UnsupportedModel
from merger.tokenizer_files import TokenizerFiles, entry, kind_of
from merger.tokenizer_unions import check_kind, trimmed, united_content

CHARACTERS = {letter: i for i, letter in enumerate("abcd")}


def files(model, *added, label="model", specials=(), **parts):
    content = {"version": "1.0", "truncation": None, "padding": None, "decoder": None, "post_processor": None}
    content |= {"normalizer": None, "pre_tokenizer": None, "model": model, "added_tokens": list(added)}
    return TokenizerFiles(label, {**content, **parts}, {}, specials)


def bpe(vocabulary, *merges, **model):
    return {"type": "BPE", "vocab": vocabulary, "merges": [list(merge) for merge in merges], **model}


def read(content):
    return Tokenizer.from_str(json.dumps(content))


def test_merges_of_the_first_win():
    first = files(bpe({**CHARACTERS, "ab": 4}, "ab"))
    other = files(bpe({**CHARACTERS, "bc": 4, "abc": 5, "cd": 6}, "bc", ("a", "bc"), "cd"), label="other")
    made = read(united_content([first, other]))
    assert made.get_vocab() == {**CHARACTERS, "ab": 4, "bc": 5, "abc": 6, "cd": 7}
    assert made.encode("abcd").tokens == ["ab", "cd"]
    assert made.encode("bc").tokens == ["bc"]


def test_a_token_that_is_known_gets_no_second_merge():
    first = files(bpe({**CHARACTERS, "ab": 4, "abc": 5}, "ab", ("ab", "c")))
    other = files(bpe({**CHARACTERS, "bc": 4, "abc": 5, "abcd": 6}, "bc", ("a", "bc"), ("abc", "d")), label="other")
    content = united_content([first, other])
    assert content["model"]["merges"] == [["a", "b"], ["ab", "c"], ["b", "c"], ["abc", "d"]]
    assert read(content).encode("abcd").tokens == ["abcd"]


def test_suffixes_are_joined_without_their_prefix():
    words = {"a": 0, "##b": 1, "##c": 2}
    prefix = {"continuing_subword_prefix": "##"}
    other = files(bpe({**words, "ab": 3, "abc": 4}, ("a", "##b"), ("ab", "##c"), **prefix), label="other")
    made = united_content([files(bpe(words, **prefix)), other])
    assert made["model"]["merges"] == [["a", "##b"], ["ab", "##c"]]
    assert read(made).encode("abc").tokens == ["abc"]


def test_added_tokens_keep_their_ids_though_words_come_behind_them():
    first = files(bpe(CHARACTERS), entry("<x>", 4, special=True))
    other = files(bpe({**CHARACTERS, "ab": 4}, "ab"), entry("<y>", 5, {"lstrip": True}), label="other")
    made = read(united_content([first, other], ["<z>"]))
    assert made.get_vocab() == {**CHARACTERS, "<x>": 4, "ab": 5, "<y>": 6, "<z>": 7}
    assert made.encode("ab<x>a <y>b<z>").ids == [5, 4, 0, 6, 1, 7]
    decoder = made.get_added_tokens_decoder()
    assert [decoder[number].special for number in (4, 6, 7)] == [True, False, False]
    assert [decoder[number].lstrip for number in (4, 6, 7)] == [False, True, False]


def test_scores_and_places_of_pieces():
    first = files({"type": "Unigram", "unk_id": 0, "vocab": [["<u>", 0.0], ["a", -1.0], ["b", -2.0]]}, entry("<x>", 5))
    pieces = [["<u>", 0.0], ["ab", -0.5], ["b", -9.0]]
    other = files({"type": "Unigram", "unk_id": 0, "vocab": pieces}, label="other")
    content = united_content([first, other])
    assert content["model"]["vocab"] == [
        *(["<u>", 0.0], ["a", -1.0], ["b", -2.0]),
        *(["<unused_3>", 0.0], ["<unused_4>", 0.0], ["<x>", 0.0], ["ab", -0.5]),
    ]
    made = read(content)
    assert [made.token_to_id(token) for token in ("b", "<x>", "ab")] == [2, 5, 6]
    assert made.encode("ab<x>b").tokens == ["ab", "<x>", "b"]


def test_tokens_without_a_row_go_with_their_merges():
    whole = files(bpe({**CHARACTERS, "ab": 4, "abc": 5, "bc": 6}, "ab", ("ab", "c"), "bc"), entry("<x>", 7))
    kept = trimmed(whole, 5)
    assert kept.ids == {**CHARACTERS, "ab": 4}
    assert read(kept.content).encode("abc").tokens == ["ab", "c"]
    assert trimmed(whole, 8) is whole
    pieces = files({"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0], ["b", -2.0], ["ab", -0.5]]})
    assert trimmed(pieces, 2).ids == {"a": 0, "b": 1}


def test_special_tokens_are_never_lost():
    content = united_content([trimmed(files(bpe(CHARACTERS), entry("<x>", 4, special=True), specials=("<x>",)), 4)])
    assert read(content).get_vocab() == {**CHARACTERS, "<x>": 4}
    assert content["added_tokens"] == [entry("<x>", 4, special=True)]


def test_tokens_that_only_are_added_need_no_splits_alike():
    other = files(bpe(CHARACTERS), entry("<y>", 4), label="other", normalizer={"type": "NFC"})
    assert united_content([files(bpe(CHARACTERS)), other])["normalizer"] is None


@pytest.mark.parametrize(
    ("other", "where"),
    [
        (files({"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "x"}, label="other"), "model.type"),
        (files(bpe({"x": 0}), label="other", normalizer={"type": "NFC"}), "normalizer"),
        (files(bpe({"x": 0}), label="other", pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer"),
        (files(bpe({"x": 0}, byte_fallback=True), label="other"), "model.byte_fallback"),
        (files(bpe({"x": 0}, end_of_word_suffix="</w>"), label="other"), "model.end_of_word_suffix"),
    ],
)
def test_tokens_of_other_texts_are_refused(other, where):
    with pytest.raises(IncompatibleSources, match=r"first.*other") as caught:
        united_content([files(bpe(CHARACTERS), label="first"), other])
    assert caught.value.where == f"tokenizer: {where}"


def test_kinds_that_old_files_do_not_name():
    assert kind_of({"vocab": {}, "merges": []}) == "BPE"
    assert kind_of({"vocab": []}) == "Unigram"
    assert kind_of({"vocab": {}, "max_input_chars_per_word": 100}) == "WordPiece"
    assert kind_of({"vocab": {}, "unk_token": "?"}) == "WordLevel"
    with pytest.raises(UnsupportedModel, match="kind Other"):
        check_kind(files({"type": "Other", "vocab": {}}))

"""Models in one vocabulary, against float64, against the tokenizers library and transformers, and against mergekit."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from merger import loading
from merger.checkpoint import open_checkpoint
from merger.errors import FormatError, IncompatibleSources, RecipeError, UnsupportedModel
from merger.expression import Stored
from merger.gathered import Gathered
from merger.methods.combination import weighted_sum
from merger.methods.lora import with_adapter
from merger.plan import make_plan
from merger.unpublished import link_result
from merger.vocabularies import united
from merger.vocabulary_settings import TokenizerSettings
from tests import adapters
from tests.tiny import stored
from tests.vocabularies import (
    CODE,
    ENGLISH,
    KINDS,
    edit,
    llama_tokenizer,
    tensors,
    tokenizer,
    vocabulary,
    write,
    write_model,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORDS = {"BPE": (330, 320), "Unigram": (90, 90), "WordPiece": (110, 100)}


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """For each kind of tokenizer three models: English, code, and one of a few more words."""
    root = tmp_path_factory.mktemp("vocabularies")
    for kind in KINDS:
        first, other = WORDS[kind]
        own = tokenizer(kind, ENGLISH, first, ("<think>",), ("<|call|>",))
        write_model(root / kind / "a", own, 1)
        write_model(root / kind / "b", tokenizer(kind, CODE, other, ("<tool>",), ("<|call|>", "<|end|>")), 2)
        write_model(root / kind / "c", tokenizer(kind, ENGLISH + CODE, other - 5, ("<tool>",)), 3)
    return root


def opened(shelf, kind, *names):
    return [open_checkpoint(shelf / kind / name) for name in names]


def settings(**fields):
    return TokenizerSettings.model_validate(fields)


def index_of(names):
    def find(reference):
        if reference not in names:
            raise RecipeError(f"names {reference!r}", where="tokenizer")
        return names.index(reference)

    return find


def unite(shelf, kind, names, base, **fields):
    return united(opened(shelf, kind, *names), base, settings(**fields), index_of(list(names)))


def expected(shelf, kind, names, ids, base, name=EMBEDDING):
    """The rows that each model should have, token by token in float64, by mergekit's rules."""
    vocabularies = [vocabulary(shelf / kind / it) for it in names]
    weights = [stored(shelf / kind / it)[name].double().numpy() for it in names]
    found = []
    for model in range(len(names)):
        rows = np.zeros((max(ids.values()) + 1, weights[0].shape[1]))
        for token, number in ids.items():
            having = [i for i, tokens in enumerate(vocabularies) if token in tokens]
            if token in vocabularies[model]:
                having = [model]
            elif base in having:
                having = [base]
            rows[number] = np.mean([weights[i][vocabularies[i][token]] for i in having], axis=0) if having else 0
        found.append(rows)
    return found


# ---- unions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", [0, 1, None])
def test_a_union_keeps_the_ids_of_the_first_and_has_the_tokens_of_all(shelf, kind, base):
    made, found = unite(shelf, kind, "abc", base)
    donor = vocabulary(shelf / kind / "abc"[base or 0])
    assert {token: found.ids[token] for token in donor} == donor
    assert set(found.ids) == set().union(*(vocabulary(shelf / kind / name) for name in "abc"))
    assert sorted(found.ids.values()) == list(range(len(found.ids)))
    assert found.size == len(found.ids)
    assert all(model.tensors[EMBEDDING].shape == (found.size, 32) for model in made)
    assert all(model.config["vocab_size"] == found.size for model in made)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", [0, 2, None])
def test_every_row_is_that_of_its_token(shelf, kind, base):
    made, found = unite(shelf, kind, "abc", base)
    for name in (EMBEDDING, HEAD):
        wanted = expected(shelf, kind, "abc", found.ids, base, name)
        for model, rows in zip(made, wanted, strict=True):
            np.testing.assert_allclose(tensors(model)[name], rows, rtol=6e-8, atol=0)


def test_a_model_whose_rows_stay_is_not_touched(shelf):
    made, _ = unite(shelf, "BPE", "ab", 0, source="base")
    assert all(isinstance(tensor, Stored) for tensor in made[0].tensors.values())
    assert isinstance(made[1].tensors[EMBEDDING], Gathered)
    assert made[0].side_files == opened(shelf, "BPE", "a")[0].side_files
    assert dict(made[0].texts) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_a_tokenizer_and_a_model_for_transformers(shelf, kind, tmp_path):
    made, found = unite(shelf, kind, "abc", 0)
    folder = write(weighted_sum(made, [0.5, 0.3, 0.2]), tmp_path / "out")
    tokens = AutoTokenizer.from_pretrained(folder)
    assert tokens.get_vocab() == dict(found.ids)
    assert vocabulary(folder) == dict(found.ids)
    for text in (ENGLISH[0], CODE[0], "the value of <think> is <tool> there <|call|> <|end|>"):
        ids = tokens(text)["input_ids"]
        assert tokens.unk_token_id not in ids
        if kind != "WordPiece":
            assert tokens.decode(ids, clean_up_tokenization_spaces=False) == text
    assert found.ids["<tool>"] in tokens("a <tool> b")["input_ids"]
    assert tokens.decode([found.ids["<|end|>"]], skip_special_tokens=True) == ""
    model = AutoModelForCausalLM.from_pretrained(folder)
    given = tokens("the value", return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**given, max_new_tokens=4, do_sample=False)
    assert out.shape[1] <= given["input_ids"].shape[1] + 4
    assert isinstance(tokens.decode(out[0]), str)


def test_texts_of_the_base_are_cut_as_before(shelf, tmp_path):
    """Words that no new token is part of: most of the base's."""
    made, found = unite(shelf, "BPE", "ab", 0)
    folder = write(made[0], tmp_path / "out")
    new, old = (Tokenizer.from_file(str(path / "tokenizer.json")) for path in (folder, shelf / "BPE" / "a"))
    fresh = set(found.ids) - set(old.get_vocab())
    same = 0
    for word in " ".join(ENGLISH[:3]).split():
        a, b = old.encode(f" {word}"), new.encode(f" {word}")
        if not fresh & set(b.tokens):
            assert a.ids == b.ids
            same += 1
    assert same > 40


def test_new_words_are_tokens_of_the_model_and_not_cut_out_of_others(shelf, tmp_path):
    made, found = unite(shelf, "BPE", "ab", 0)
    folder = write(made[0], tmp_path / "out")
    content = json.loads((folder / "tokenizer.json").read_text())
    assert {it["content"] for it in content["added_tokens"]} == {
        *("<s>", "</s>", "<pad>", "<think>", "<|call|>", "<tool>", "<|end|>")
    }
    merges = [tuple(merge) for merge in content["model"]["merges"]]
    own = json.loads((shelf / "BPE/a/tokenizer.json").read_text())["model"]["merges"]
    assert merges[: len(own)] == [tuple(merge) for merge in own]
    assert len(merges) > len(own)
    code = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(CODE[0])
    assert set(code.tokens) - set(vocabulary(shelf / "BPE/a"))
    assert "Ġself" in found.ids or "self" in found.ids


def test_scores_of_unigram_pieces_are_their_own(shelf):
    _, found = unite(shelf, "Unigram", "ab", 0)
    pieces = [tuple(piece) for piece in json.loads(found.texts["tokenizer.json"])["model"]["vocab"]]
    own, other = (
        dict(json.loads((shelf / f"Unigram/{name}/tokenizer.json").read_text())["model"]["vocab"]) for name in "ab"
    )
    for token, score in pieces:
        assert score == own.get(token, other.get(token, 0.0))


def test_merges_that_are_texts_stay_texts(shelf, tmp_path):
    for name in "ab":
        content = json.loads((shelf / f"BPE/{name}/tokenizer.json").read_text())
        content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
        (tmp_path / name).mkdir()
        for path in (shelf / "BPE" / name).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
        edit(tmp_path / name, "tokenizer.json", **content)
    models = [open_checkpoint(tmp_path / name) for name in "ab"]
    made, found = united(models, 0, settings(), index_of("ab"))
    assert all(isinstance(merge, str) for merge in json.loads(found.texts["tokenizer.json"])["model"]["merges"])
    assert vocabulary(write(made[0], tmp_path / "out")) == dict(unite(shelf, "BPE", "ab", 0)[1].ids)


def test_the_same_tokenizers_change_nothing_but_the_size(shelf):
    made, found = unite(shelf, "BPE", "aa", 0)
    assert found.texts == {}
    assert all(isinstance(tensor, Stored) for model in made for tensor in model.tensors.values())


# ---- what a configuration says of tokens --------------------------------------------------------------


def test_rows_of_tokens_are_chosen(shelf):
    """In a: `<think>`, not `<tool>`; in b: `<tool>`, not `<think>`."""
    tokens = {
        "<think>": {"source": {"kind": "zero"}},
        "<tool>": {"source": {"kind": "model_token", "model": "a", "token": "Ġthe"}, "force": True},
        "<|end|>": {"source": {"kind": "model_token", "model": "b", "token_id": 7}},
        "<new>": {"source": {"kind": "model_token", "model": "a", "token": "<s>"}},
        "</s>": {"source": "b", "force": True},
        "<s>": {"source": "b"},
        "<empty>": {},
    }
    made, found = unite(shelf, "BPE", "ab", 0, tokens=tokens)
    a, b = (stored(shelf / "BPE" / name)[EMBEDDING].numpy() for name in "ab")
    ids_a, ids_b = (vocabulary(shelf / "BPE" / name) for name in "ab")
    x, y = (tensors(model)[EMBEDDING] for model in made)

    def same(rows, token, wanted):
        np.testing.assert_array_equal(rows[found.ids[token]], wanted)

    same(x, "<think>", a[ids_a["<think>"]])
    same(y, "<think>", 0)
    same(x, "<tool>", a[ids_a["Ġthe"]])
    same(y, "<tool>", a[ids_a["Ġthe"]])
    same(x, "<|end|>", b[7])
    same(y, "<|end|>", b[ids_b["<|end|>"]])
    same(x, "<new>", a[ids_a["<s>"]])
    same(y, "<new>", a[ids_a["<s>"]])
    same(x, "</s>", b[ids_b["</s>"]])
    same(x, "<s>", a[ids_a["<s>"]])
    same(y, "<s>", b[ids_b["<s>"]])
    same(x, "<empty>", 0)
    assert any("'<empty>'" in note for note in found.notes)


def test_rows_up_to_a_multiple_are_the_mean(shelf, tmp_path):
    made, found = unite(shelf, "BPE", "ab", 0, pad_to_multiple_of=64)
    count = len(found.ids)
    assert found.size % 64 == 0
    assert 0 < found.size - count < 64
    wanted = [rows.mean(0) for rows in expected(shelf, "BPE", "ab", found.ids, 0)]
    for model, row in zip(made, wanted, strict=True):
        np.testing.assert_allclose(tensors(model)[EMBEDDING][count:], np.tile(row, (found.size - count, 1)), atol=1e-8)
    folder = write(weighted_sum(made, [0.5, 0.5]), tmp_path / "out")
    merged = stored(folder)[EMBEDDING].numpy()
    np.testing.assert_allclose(merged[count:], np.tile(sum(wanted) / 2, (found.size - count, 1)), atol=1e-7)
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == found.size


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        ({"<x>": {"source": {"kind": "model_token", "model": "a", "token": "nowhere"}}}, "'nowhere' in .*a, which has"),
        (
            {"<x>": {"source": {"kind": "model_token", "model": "a", "token_id": 99999}}},
            "row 99999 of .*a, which",
        ),
        ({"<x>": {"source": "b"}}, "'<x>' in .*b"),
        ({"<x>": {"source": "elsewhere"}}, "elsewhere"),
    ],
)
def test_rows_that_are_not_there_are_refused_in_the_plan(shelf, tokens, match):
    with pytest.raises(RecipeError, match=match):
        unite(shelf, "BPE", "ab", 0, tokens=tokens)


@pytest.mark.parametrize(
    "fields",
    [
        {"sauce": "union"},
        {"tokens": {"<x>": {"source": {"kind": "model_token", "model": "a"}}}},
        {"tokens": {"<x>": {"source": {"kind": "model_token", "model": "a", "token": "b", "token_id": 1}}}},
        {"tokens": {"<x>": {"source": {"kind": "zero", "model": "a"}}}},
        {"tokens": {"<x>": {"forced": True}}},
        {"pad_to_multiple_of": 0},
    ],
)
def test_settings_that_mean_nothing_are_refused(fields):
    with pytest.raises(ValueError):
        settings(**fields)


# ---- sources ------------------------------------------------------------------------------------------


def test_another_models_tokenizer(shelf, tmp_path):
    made, found = unite(shelf, "BPE", "ab", 0, source="b")
    assert dict(found.ids) == vocabulary(shelf / "BPE/b")
    assert found.texts == {}
    for name in (EMBEDDING, HEAD):
        wanted = expected(shelf, "BPE", "ab", found.ids, 0, name)
        for model, rows in zip(made, wanted, strict=True):
            np.testing.assert_allclose(tensors(model)[name], rows, rtol=6e-8)
    folder = write(weighted_sum(made, [0.4, 0.6]), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == dict(found.ids)
    assert any("are not in the result's vocabulary" in note for note in found.notes)


def test_embeddings_with_more_rows_than_tokens(shelf, tmp_path):
    own = tokenizer("BPE", ENGLISH, 330, ("<think>",))
    model = open_checkpoint(write_model(tmp_path / "padded", own, 1, rows=384))
    made, found = united([model, *opened(shelf, "BPE", "b")], 0, settings(source="base"), index_of("ab"))
    assert found.size == len(own)
    assert tensors(made[0])[EMBEDDING].shape == (len(own), 32)
    assert any(f"{384 - len(own)} fewer" in note for note in found.notes)
    grown, more = united([model, *opened(shelf, "BPE", "b")], 0, settings(), index_of("ab"))
    wanted = stored(tmp_path / "padded")[EMBEDDING].numpy()
    np.testing.assert_array_equal(tensors(grown[0])[EMBEDDING][: len(own)], wanted[: len(own)])
    assert more.size == len(more.ids)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_without_a_row_are_no_tokens(shelf, tmp_path, kind):
    own = tokenizer(kind, ENGLISH, WORDS[kind][0], ("<think>", "<far>"))
    kept = len(own) - 8
    model = open_checkpoint(write_model(tmp_path / "short", own, 1, rows=kept))
    made, found = united([model, *opened(shelf, kind, "b")], 0, settings(), index_of("ab"))
    gone = {token for token, number in own.get_vocab().items() if number >= kept}
    assert not {"<think>", "<far>"} & found.ids.keys()
    assert gone & found.ids.keys() <= vocabulary(shelf / kind / "b").keys()
    folder = write(weighted_sum(made, [0.5, 0.5]), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == dict(found.ids)


def test_special_tokens_without_a_row_get_one(shelf, tmp_path):
    """A pad token that somebody added without making room for it. transformers adds it again whatever is stored."""
    own = tokenizer("BPE", ENGLISH, 330)
    own.add_special_tokens({"pad_token": "[PAD]"})
    model = open_checkpoint(write_model(tmp_path / "short", own, 1, rows=len(own) - 1, pad_token_id=None))
    for source in ("union", "base"):
        made, found = united([model, *opened(shelf, "BPE", "b")], 0, settings(source=source), index_of("ab"))
        np.testing.assert_array_equal(tensors(made[0])[EMBEDDING][found.ids["[PAD]"]], 0)
        assert any("'[PAD]' first: their rows are zeros" in note for note in found.notes)
        folder = write(weighted_sum(made, [0.5, 0.5]), tmp_path / source)
        assert AutoTokenizer.from_pretrained(folder).pad_token_id == found.ids["[PAD]"] < found.size


def test_tokens_that_only_other_files_name(shelf, tmp_path):
    """As older libraries left them: added_tokens.json, and a pad token that no vocabulary has."""
    own = tokenizer("BPE", ENGLISH, 330)
    folder = write_model(tmp_path / "old", own, 1, rows=len(own) + 2)
    (folder / "added_tokens.json").write_text(json.dumps({"<late>": len(own)}))
    edit(folder, "tokenizer_config.json", pad_token="[PAD]")
    made, found = united([open_checkpoint(folder), *opened(shelf, "BPE", "b")], 0, settings(), index_of("ab"))
    assert found.ids["<late>"] == len(own)
    assert found.ids["[PAD]"] == len(own) + 1
    assert "added_tokens.json" not in {*made[0].side_files, *made[0].texts}
    out = write(made[0], tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out).get_vocab() == dict(found.ids) == vocabulary(out)


def test_tied_heads_and_stored_ones(shelf, tmp_path):
    own, other = tokenizer("BPE", ENGLISH, 330), tokenizer("BPE", CODE, 320)
    tied = write_model(tmp_path / "tied", own, 1, tie_word_embeddings=True)
    apart = write_model(tmp_path / "apart", other, 2)
    made, found = united([open_checkpoint(tied), open_checkpoint(apart)], 0, settings(), index_of("ab"))
    assert HEAD not in made[0].tensors
    head = tensors(made[1])[HEAD]
    rows, ids = stored(tied)[EMBEDDING].numpy(), vocabulary(tied)
    fresh = [token for token in ids if token not in vocabulary(apart)]
    np.testing.assert_array_equal(head[[found.ids[t] for t in fresh]], rows[[ids[t] for t in fresh]])
    folder = write(weighted_sum(made, [0.5, 0.5]), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight.shape == (found.size, 32)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_biases_of_heads_go_along(tmp_path):
    for name, texts, words, seed in (("a", ENGLISH, 330, 1), ("b", CODE, 320, 2)):
        write_model(tmp_path / name, tokenizer("BPE", texts, words), seed, kind="phi")
    made, found = united([open_checkpoint(tmp_path / name) for name in "ab"], 0, settings(), index_of("ab"))
    wanted = expected_biases(tmp_path, found.ids)
    for model, bias in zip(made, wanted, strict=True):
        np.testing.assert_array_equal(tensors(model)["lm_head.bias"], bias)
    AutoModelForCausalLM.from_pretrained(write(weighted_sum(made, [0.5, 0.5]), tmp_path / "out"))


def expected_biases(root, ids):
    own = [(vocabulary(root / name), stored(root / name)["lm_head.bias"].numpy()) for name in "ab"]
    for pair in (own, own[::-1]):
        having = [next(it for it in pair if token in it[0]) for token in sorted(ids, key=ids.__getitem__)]
        yield [bias[old[token]] for token, (old, bias) in zip(sorted(ids, key=ids.__getitem__), having, strict=True)]


def test_dtypes_of_several_models_become_one_that_holds_all(shelf, tmp_path):
    write_model(tmp_path / "half", tokenizer("BPE", CODE, 320), 2, dtype="bfloat16")
    models = [*opened(shelf, "BPE", "a"), open_checkpoint(tmp_path / "half")]
    made, found = united(models, 0, settings(), index_of("ab"))
    assert [model.tensors[EMBEDDING].dtype for model in made] == ["F32", "F32"]
    own, ids = stored(tmp_path / "half")[EMBEDDING].double().numpy(), vocabulary(tmp_path / "half")
    token = next(token for token in ids if token not in vocabulary(shelf / "BPE/a"))
    np.testing.assert_array_equal(tensors(made[0])[EMBEDDING][found.ids[token]], own[ids[token]])


def test_a_model_without_a_tokenizer_has_the_base_s(shelf, tmp_path):
    own = tokenizer("BPE", ENGLISH, 330, ("<think>",), ("<|call|>",))
    bare = write_model(tmp_path / "bare", own, 5)
    for path in bare.glob("tokenizer*"):
        path.unlink()
    made, found = united([*opened(shelf, "BPE", "a"), open_checkpoint(bare)], 0, settings(), index_of("ab"))
    assert isinstance(made[1].tensors[EMBEDDING], Stored)
    assert any("bare has no tokenizer" in note for note in found.notes)
    with pytest.raises(UnsupportedModel, match="has no tokenizer"):
        united([open_checkpoint(bare), *opened(shelf, "BPE", "a")], 0, settings(), index_of("ab"))


def test_pieces_of_bytes_as_llama_has_them(tmp_path):
    for name, texts, seed in (("a", ENGLISH, 1), ("b", CODE, 2)):
        write_model(tmp_path / name, llama_tokenizer(texts), seed)
        edit(tmp_path / name, "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    made, found = united([open_checkpoint(tmp_path / name) for name in "ab"], 0, settings(), index_of("ab"))
    tokens = AutoTokenizer.from_pretrained(write(weighted_sum(made, [0.5, 0.5]), tmp_path / "out"))
    assert tokens.get_vocab() == dict(found.ids)
    for text in (ENGLISH[0], CODE[0], "été ☃"):
        assert tokens.decode(tokens(text, add_special_tokens=False)["input_ids"]) == text
    assert found.ids["<0x41>"] == vocabulary(tmp_path / "a")["<0x41>"]


def test_embeddings_that_adapters_change(tmp_path):
    folders = []
    for name, texts, seed in (("a", ENGLISH, 0), ("b", CODE, 2)):
        folders.append(write_model(tmp_path / name, tokenizer("BPE", texts, 320), seed))
    modules = ["embed_tokens", "lm_head", "q_proj"]
    sizes = {"vocab_size": 320, "num_hidden_layers": 2}
    lora = adapters.save(tmp_path / "lora", r=3, target_modules=modules, sizes=sizes)
    with_lora = with_adapter(open_checkpoint(folders[0]), open_checkpoint(lora))
    made, found = united([with_lora, open_checkpoint(folders[1])], 0, settings(), index_of("ab"))
    peft = adapters.load(folders[0], lora).merge_and_unload()
    ids = vocabulary(folders[0])
    mine = [found.ids[token] for token in ids]
    for model in made:
        rows = mine if model is made[0] else [found.ids[t] for t in ids if t not in vocabulary(folders[1])]
        kept = [number for token, number in ids.items() if found.ids[token] in set(rows)]
        wanted = peft.model.embed_tokens.weight.detach().double().numpy()
        np.testing.assert_allclose(tensors(model)[EMBEDDING][rows], wanted[kept], rtol=1e-5, atol=1e-6)


def test_a_result_that_is_put_together_elsewhere_gets_the_vocabulary(shelf, tmp_path):
    models = opened(shelf, "BPE", "a", "b")
    made, found = united(models, 0, settings(), index_of("ab"))
    (tmp_path / "tokenizer.model").write_bytes(b"old")
    side_files = {**models[1].side_files, "tokenizer.model": tmp_path / "tokenizer.model"}
    texts = {"added_tokens.json": "{}", "trainable.json": "{}"}
    result = found.applied(replace(made[1], config=models[1].config, side_files=side_files, texts=texts))
    assert result.config == {**models[1].config, "vocab_size": found.size}
    assert not {"tokenizer.model", "added_tokens.json"} & {*result.side_files, *result.texts}
    assert result.texts["trainable.json"] == "{}"
    place = link_result(make_plan(result, {}, 1 << 30), write(result, tmp_path / "out"), tmp_path / "linked")
    assert AutoTokenizer.from_pretrained(place).get_vocab() == dict(found.ids)
    assert not (place / "tokenizer.json").is_symlink()


def test_tokenizers_that_the_library_reads_otherwise_are_refused(shelf, tmp_path):
    """A merge of tokens that are not there."""
    for path in (shelf / "BPE/a").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    edit(tmp_path, "tokenizer.json", model={**model, "merges": [*model["merges"], ["no", "where"]]})
    with pytest.raises(UnsupportedModel, match="cannot be made: Token"):
        united([open_checkpoint(tmp_path), *opened(shelf, "BPE", "b")], 0, settings(), index_of("ab"))


def test_recipes_over_united_models_are_measured_with_the_new_tokenizer(shelf):
    made, found = unite(shelf, "BPE", "ab", 0, pad_to_multiple_of=32)
    result = loading.load(weighted_sum(made, [0.5, 0.5]), "AutoModelForCausalLM", "float32", "cpu")
    assert result.tokenizer.get_vocab() == dict(found.ids)
    assert result.model.get_input_embeddings().weight.shape[0] == found.size


# ---- configs ------------------------------------------------------------------------------------------


def test_ids_of_special_tokens_follow_the_tokenizer(shelf, tmp_path):
    """b is the base and gives the config, a gives the tokenizer, whose end of a text is another token."""
    own = tokenizer("BPE", ENGLISH, 330, (), ("<|call|>", "<|stop|>"))
    giver = write_model(tmp_path / "giver", own, 1)
    stop = own.convert_tokens_to_ids("<|stop|>")
    edit(giver, "config.json", eos_token_id=[2, stop])
    edit(giver, "generation_config.json", eos_token_id=[2, stop])
    other = tokenizer("BPE", CODE, 320, (), ("<|x|>", "<|call|>", "<|image|>"))
    base = write_model(tmp_path / "base", other, 2)
    call, image = (other.convert_tokens_to_ids(token) for token in ("<|call|>", "<|image|>"))
    edit(base, "config.json", image_token_id=image, call_token_id=call)
    models = [open_checkpoint(base), open_checkpoint(giver)]
    made, found = united(models, 0, settings(source="giver"), index_of(["base", "giver"]))
    config = made[0].config
    assert config["eos_token_id"] == [2, stop]
    assert config["call_token_id"] == found.ids["<|call|>"] != call
    assert config["image_token_id"] is None
    assert config["vocab_size"] == found.size
    assert json.loads(made[0].texts["generation_config.json"])["eos_token_id"] == [2, stop]
    assert made[1].config == {**models[1].config, "vocab_size": found.size}
    assert "generation_config.json" not in made[1].texts


def test_ids_beyond_the_last_row_are_no_ids(tmp_path, shelf):
    own = tokenizer("BPE", ENGLISH, 330)
    folder = write_model(tmp_path / "padded", own, 1, rows=384)
    edit(folder, "config.json", pad_token_id=380)
    made, _ = united([open_checkpoint(folder), *opened(shelf, "BPE", "b")], 0, settings(source="base"), index_of("ab"))
    assert made[0].config["pad_token_id"] is None
    AutoModelForCausalLM.from_pretrained(write(made[0], tmp_path / "out"))


def test_sizes_within_parts_of_a_config_change_too(shelf):
    from merger.vocabulary_configs import with_vocabulary_size

    config = {"text_config": {"vocab_size": 5}, "vision_config": {"vocab_size": 7}}
    assert with_vocabulary_size(config, 9) == {"text_config": {"vocab_size": 9}, "vision_config": {"vocab_size": 7}}
    assert with_vocabulary_size({}, 9) == {"vocab_size": 9}
    assert with_vocabulary_size({"padded_vocab_size": 3}, 9) == {"padded_vocab_size": 9}


# ---- refusals -----------------------------------------------------------------------------------------


def test_tokenizers_of_two_kinds_have_no_union(shelf):
    models = [*opened(shelf, "BPE", "a"), *opened(shelf, "WordPiece", "b")]
    with pytest.raises(IncompatibleSources, match=r"BPE/a has .* BPE and .*WordPiece/b one of the kind WordPiece"):
        united(models, 0, settings(), index_of("ab"))
    made, found = united(models, 0, settings(source="base"), index_of("ab"))
    assert dict(found.ids) == vocabulary(shelf / "BPE/a")
    assert made[1].tensors[EMBEDDING].shape == (found.size, 32)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
        ("normalizer", {"type": "NFKC"}),
    ],
)
def test_tokenizers_that_split_otherwise_have_no_union(shelf, tmp_path, part, value):
    for path in (shelf / "BPE/b").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    edit(tmp_path, "tokenizer.json", **{part: value})
    models = [*opened(shelf, "BPE", "a"), open_checkpoint(tmp_path, "other")]
    with pytest.raises(IncompatibleSources, match=rf"{part}: .*BPE/a and other bring") as caught:
        united(models, 0, settings(), index_of("ab"))
    assert "source: base" in str(caught.value)
    united(models, 0, settings(source="base"), index_of("ab"))


def test_models_of_other_widths_are_refused(shelf, tmp_path):
    write_model(tmp_path / "wide", tokenizer("BPE", CODE, 320), 2, hidden_size=64)
    with pytest.raises(IncompatibleSources, match="other widths") as caught:
        united([*opened(shelf, "BPE", "a"), open_checkpoint(tmp_path / "wide")], 0, settings(), index_of("ab"))
    assert caught.value.where == f"tensor {EMBEDDING!r}"


def test_broken_files_are_refused(shelf, tmp_path):
    for path in (shelf / "BPE/b").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(FormatError, match="no tokenizer that can be read"):
        united([open_checkpoint(tmp_path)], None, settings(), index_of("a"))


def test_sentencepiece_models_are_converted_or_refused(shelf, tmp_path):
    for path in (shelf / "BPE/b").iterdir():
        if path.name != "tokenizer.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UnsupportedModel, match="transformers cannot make it") as caught:
        united([open_checkpoint(tmp_path)], None, settings(), index_of("a"))
    assert "save_pretrained" in str(caught.value)


def test_older_files_become_a_tokenizer_json(shelf, tmp_path):
    """vocab.json and merges.txt, as GPT-2 has them."""
    content = json.loads((shelf / "BPE/b/tokenizer.json").read_text())
    for path in (shelf / "BPE/b").iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(" ".join(m) for m in content["model"]["merges"])])
    )
    edit(tmp_path, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", bos_token="<s>", eos_token="</s>")
    edit(tmp_path, "tokenizer_config.json", unk_token="<s>", pad_token="<pad>")
    models = [open_checkpoint(tmp_path, "old"), *opened(shelf, "BPE", "a")]
    made, found = united(models, 0, settings(), index_of("ab"))
    vocabulary_b = content["model"]["vocab"]
    assert {token: found.ids[token] for token in vocabulary_b} == vocabulary_b
    assert not {"vocab.json", "merges.txt"} & made[0].side_files.keys()
    folder = write(weighted_sum(made, [0.5, 0.5]), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == dict(found.ids)

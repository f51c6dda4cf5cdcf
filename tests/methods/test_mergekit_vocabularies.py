"""mergekit's configurations over models with different tokenizers, and with adapters, through the whole of a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import adapters, tiny
from tests.checkpoints import as_float64, read_raw
from tests.methods.making import make, plan
from tests.vocabularies import CODE, ENGLISH, KINDS, tokenizer, vocabulary, write_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of PEFT

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, dict[str, Path]]:
    """Two models of each kind of tokenizer, trained on other texts, with tokens of their own."""
    place, made = tmp_path_factory.mktemp("vocabularies"), {}
    for kind in KINDS:
        # Sizes that hold every byte, and few words more.
        a = tokenizer(kind, ENGLISH, 300, added=("<tool>",))
        b = tokenizer(kind, CODE, 290, added=("<think>",), specials=("<|end|>",))
        made[kind] = {
            name: write_model(place / kind / name, tokens, seed)
            for seed, (name, tokens) in enumerate([("a", a), ("b", b)])
        }
    return made


def stored(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: as_float64(content, dtype).reshape(shape)
        for file in folder.glob("*.safetensors")
        for name, (dtype, shape, content) in read_raw(file).items()
    }


def configuration(pair: dict[str, Path], method: str = "linear", **more: Any) -> dict[str, Any]:
    each = {"parameters": {"weight": 0.5}} if method == "linear" else {}
    return {"merge_method": method, "models": [{"model": str(pair[name]), **each} for name in "ab"], **more}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_union(models, tmp_path: Path, kind: str) -> None:
    pair = models[kind]
    make(configuration(pair, tokenizer_source="union", chat_template="chatml"), tmp_path / "out")
    ids = vocabulary(tmp_path / "out")
    own = {name: vocabulary(pair[name]) for name in "ab"}
    assert ids.keys() == own["a"].keys() | own["b"].keys()
    assert {token: ids[token] for token in own["a"]} == own["a"]
    rows, result = {name: stored(pair[name])[EMBEDDING] for name in "ab"}, stored(tmp_path / "out")
    for token, number in ids.items():
        having = [rows[name][own[name][token]] for name in "ab" if token in own[name]]
        # Who lacks a token gets the mean of those that have it, so the mean of both is the mean of those.
        assert np.allclose(result[EMBEDDING][number], np.mean(having, axis=0), atol=1e-6), token
    inner = "model.layers.1.mlp.up_proj.weight"
    assert np.allclose(result[inner], sum(stored(pair[name])[inner] for name in "ab") / 2, atol=1e-6)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(ids) == result[EMBEDDING].shape[0]
    given = tokens("the value <think>", return_tensors="pt", return_token_type_ids=False)
    assert ids["<think>"] in given["input_ids"][0]
    out = model.generate(**given, max_new_tokens=4, do_sample=False)
    assert out.shape[1] > given["input_ids"].shape[1]
    talk = tokens.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert talk == "<|im_start|>user\nhi<|im_end|>\n"


def test_rules_that_measure_work_on_rows_that_are_made(models, tmp_path: Path) -> None:
    """Rows up to a multiple are a mean, which is measured before what the rule measures."""
    pair = models["BPE"]
    settings = {"source": "union", "pad_to_multiple_of": 64}
    given = configuration(pair, "slerp", base_model=str(pair["a"]), parameters={"t": 0.5}, tokenizer=settings)
    make(given, tmp_path / "out")
    result, count = stored(tmp_path / "out"), len(vocabulary(tmp_path / "out"))
    assert result[EMBEDDING].shape[0] == -(-count // 64) * 64 > count
    assert np.ptp(result[EMBEDDING][count:], axis=0).max() < 1e-7
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == result[EMBEDDING].shape[0]


def test_another_tokenizer_is_another_plan(models, tmp_path: Path) -> None:
    pair = models["BPE"]
    before = plan(configuration(pair, tokenizer_source="union")).fingerprint
    assert plan(configuration(pair, tokenizer_source="union")).fingerprint == before
    path = pair["b"] / "tokenizer.json"
    text = path.read_text()
    content = json.loads(text)
    words, others = content["model"]["vocab"], vocabulary(pair["a"])
    first = next(word for word in sorted(words, key=words.get, reverse=True) if word in others)
    second = next(word for word in sorted(words, key=words.get, reverse=True) if word not in others)
    words[first], words[second] = words[second], words[first]  # two rows are those of other words
    try:
        path.write_text(json.dumps(content))
        assert plan(configuration(pair, tokenizer_source="union")).fingerprint != before
    finally:
        path.write_text(text)


def test_models_with_adapters(tmp_path: Path) -> None:
    """W + scale * B A of one, W of the other, half and half."""
    base = tiny.save(tmp_path / "base", "llama", tie_word_embeddings=False)
    adapter = adapters.save(tmp_path / "adapter", r=3, target_modules=["q_proj", "up_proj"])
    each = {"parameters": {"weight": 0.5}}
    given = {"merge_method": "linear", "models": [{"model": f"{base}+{adapter}", **each}, {"model": str(base), **each}]}
    make(given, tmp_path / "out")
    deltas = adapters.deltas(base, adapter)
    before, found = stored(base), stored(tmp_path / "out")
    changed = 0
    for name, value in before.items():
        delta = deltas.get(name.removesuffix(".weight"))
        wanted = value if delta is None else value + delta.numpy() / 2
        assert np.allclose(found[name], wanted, atol=1e-6), name
        changed += not np.array_equal(found[name], value)
    assert changed == 2 * 4

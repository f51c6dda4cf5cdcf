"""Tiny models with real tokenizers of their own, and how they are written. Knows tokenizers and transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from merger.budget import allot
from merger.checkpoint import Checkpoint
from merger.engine import write_shards
from merger.plan import make_plan
from merger.publish import complete, finish
from merger.values import values
from tests.checkpoints import as_float64
from tests.tiny import save

ENGLISH = [
    "the quick brown fox jumps over the lazy dog and then the dog sleeps in the sun all day long",
    "there is nothing that the other ones would rather do than sit here together with their friends",
    "this is the house that they thought of when they were there, and these are those things",
] * 4
CODE = [
    "def return_value(self, index): return self.values[index] if index else None",
    "for index in range(len(values)): print(values[index], file=sys.stderr)",
    "class Value(Base): def __init__(self, value): self.value = value; super().__init__(value)",
] * 4
SPECIALS = ["<s>", "</s>", "<pad>"]


def _bpe(specials: list[str]) -> tuple[Tokenizer, Any]:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return made, trainers.BpeTrainer(special_tokens=specials, initial_alphabet=alphabet, show_progress=False)


def _unigram(specials: list[str]) -> tuple[Tokenizer, Any]:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    specials = [*specials, "<unk>"]
    return made, trainers.UnigramTrainer(special_tokens=specials, unk_token="<unk>", show_progress=False)


def _wordpiece(specials: list[str]) -> tuple[Tokenizer, Any]:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made, trainers.WordPieceTrainer(special_tokens=[*specials, "<unk>"], show_progress=False)


KINDS = {"BPE": _bpe, "Unigram": _unigram, "WordPiece": _wordpiece}


def tokenizer(
    kind: str, texts: list[str], words: int, added: tuple[str, ...] = (), specials: tuple[str, ...] = (), **options: Any
) -> PreTrainedTokenizerFast:
    """A tokenizer trained on texts, of so many tokens, with words and special tokens added behind them."""
    made, trainer = KINDS[kind](SPECIALS)
    trainer.vocab_size = words
    made.train_from_iterator(texts, trainer)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **options
    )
    whole.add_tokens(list(added))
    if specials:
        whole.add_special_tokens({"extra_special_tokens": list(specials)})
    return whole


def llama_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Pieces with a mark for a word's start, and a token for each byte, as Llama 2 and Mistral have them."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    ends = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(ends)
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=390, special_tokens=specials, show_progress=False))
    content = json.loads(made.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are none
    own = Tokenizer.from_str(json.dumps(content))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=own, **roles)


def write_model(folder: Path, tokens: PreTrainedTokenizerFast, seed: int, rows: int = 0, **config: Any) -> Path:
    """A tiny model with this tokenizer; its embedding may have more or fewer `rows` than there are tokens."""
    ids = {f"{role}_token_id": getattr(tokens, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    sizes = {"vocab_size": rows or len(tokens), "num_hidden_layers": 2, "tie_word_embeddings": False, **ids}
    save(folder, seed=seed, **{"kind": "llama", **sizes, **config})
    tokens.save_pretrained(folder)
    return folder


def write(checkpoint: Checkpoint, folder: Path) -> Path:
    """The checkpoint as the engine writes it."""
    plan = make_plan(checkpoint, {}, 1 << 30)
    (folder / ".merger").mkdir(parents=True)
    write_shards(plan.shards, folder, allot(plan, 64 << 20, 2), plan.fingerprint)
    complete(folder, plan, dict(checkpoint.texts), {})
    finish(folder)
    return folder


def tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """All values in float64."""
    return {
        name: as_float64(content.tobytes(), tensor.dtype).reshape(tensor.shape)
        for name, tensor, content in values(checkpoint)
    }


def vocabulary(folder: Path) -> dict[str, int]:
    """The tokens as the tokenizers library reads them from a folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


def edit(folder: Path, name: str, **changes: Any) -> Path:
    """Other values for the keys of a JSON file."""
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))
    return folder

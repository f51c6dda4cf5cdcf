"""The tokenizer of a model as its files say it: which token has which id. Knows the files' formats; knows nothing of
weights.

tokenizer.json is what counts (huggingface/tokenizers); tokens that only the files beside it name
(tokenizer_config.json, added_tokens.json, special_tokens_map.json) are added to it as transformers adds them when it
loads a tokenizer.
"""

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from merger.checkpoint import Checkpoint
from merger.errors import FormatError, UnsupportedModel

Content = Mapping[str, Any]

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
SPECIAL, ADDED = "special_tokens_map.json", "added_tokens.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json")
# Files that hold a vocabulary of their own, which would contradict a new tokenizer.json.
_OLD = ("vocab.json", "merges.txt", "vocab.txt", "tekken.json", ADDED)
_OLD_ENDS = (".model", ".tiktoken")
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerFiles:
    """A model's tokenizer: the content of its tokenizer.json with all added tokens, and of its tokenizer_config.json.

    `specials` are the tokens that play a role, a text's end for one. `is_converted`: there was no tokenizer.json, and
    transformers made one.
    """

    label: str
    content: Content
    settings: Content
    specials: tuple[str, ...] = ()
    is_converted: bool = False

    @property
    def kind(self) -> str:
        """BPE, Unigram, WordPiece or WordLevel."""
        return kind_of(self.content["model"])

    @cached_property
    def added(self) -> dict[str, Content]:
        """The tokens that are found before the model looks at a text, special ones among them."""
        return {str(entry["content"]): entry for entry in self.content.get("added_tokens") or ()}

    @cached_property
    def ids(self) -> dict[str, int]:
        """Every token's id. Where the model and an added token both have one, the model's counts."""
        return {**{token: entry["id"] for token, entry in self.added.items()}, **vocabulary_of(self.content["model"])}

    @cached_property
    def tokens(self) -> dict[int, str]:
        """Every id's token."""
        return {number: token for token, number in self.ids.items()}


def is_tokenizer_file(name: str) -> bool:
    """Whether a side file belongs to the tokenizer, its chat template among it."""
    return name in (TOKENIZER, SETTINGS, SPECIAL, *TEMPLATES) or is_old(name)


def is_old(name: str) -> bool:
    """Whether a side file holds a vocabulary in another form than tokenizer.json."""
    return name in _OLD or name.endswith(_OLD_ENDS)


def files_of(checkpoint: Checkpoint) -> TokenizerFiles | None:
    """The tokenizer of a model, None where it has none.

    Raises FormatError, and UnsupportedModel where there is no tokenizer.json and transformers cannot make one.
    """
    names = {*checkpoint.side_files, *checkpoint.texts}
    if not any(name == TOKENIZER or (is_old(name) and name != ADDED) for name in names):
        return None
    settings, label = read(checkpoint, SETTINGS), checkpoint.label
    is_converted = TOKENIZER not in names
    content = _converted(checkpoint) if is_converted else read(checkpoint, TOKENIZER)
    try:
        specials = tuple(dict.fromkeys(_specials(settings, read(checkpoint, SPECIAL))))
        completed = _completed(content, settings, read(checkpoint, ADDED), specials)
        return TokenizerFiles(label, completed, settings, specials, is_converted)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise FormatError(f"is no tokenizer that can be read: {error!r}", where=f"{label}: {TOKENIZER}") from error


def read(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """The JSON object in a text or side file of a model, empty where it has none. Raises FormatError."""
    where = f"{checkpoint.label}: {name}"
    try:
        if name in checkpoint.texts:
            content = json.loads(checkpoint.texts[name])
        elif name in checkpoint.side_files:
            content = json.loads(checkpoint.side_files[name].read_text(encoding="utf-8"))
        else:
            return {}
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"is not readable JSON: {error}", where=where) from error
    if type(content) is not dict:
        raise FormatError("is not a JSON object", where=where)
    return content


# ---- tokenizer.json -----------------------------------------------------------------------------------


def kind_of(model: Content) -> str:
    """The kind of a tokenizer's model; old files do not name it."""
    if "type" in model:
        return str(model["type"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        return "Unigram"
    return "BPE" if "merges" in model else "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def vocabulary_of(model: Content) -> dict[str, int]:
    """The tokens of a tokenizer's model and their ids."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        return {str(piece[0]): number for number, piece in enumerate(vocabulary)}
    if not all(type(number) is int for number in vocabulary.values()):
        raise ValueError("ids that are no whole numbers")
    return dict(vocabulary)


def entry(token: str, number: int, flags: Content | None = None, *, special: bool = False) -> dict[str, Any]:
    """An added token as tokenizer.json holds it; without flags as `add_tokens` makes one."""
    normal = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special, "special": special}
    return {"id": number, "content": token, **{flag: bool((flags or normal).get(flag)) for flag in _FLAGS}}


def next_id(ids: Iterable[int]) -> int:
    """The id after the last."""
    return max(ids, default=-1) + 1


def _completed(content: Content, settings: Content, late: Content, specials: Iterable[str]) -> dict[str, Any]:
    """The content with the added tokens that stand in other files only."""
    own = list(content.get("added_tokens") or ())
    ids = {str(it["content"]): int(it["id"]) for it in own} | vocabulary_of(content["model"])
    taken = set(ids.values())
    decoder = settings.get("added_tokens_decoder") or {}
    named = {str(flags["content"]): (int(number), flags) for number, flags in decoder.items()}
    named |= {str(token): (int(number), None) for token, number in late.items() if token not in named}
    for token, (number, flags) in sorted(named.items(), key=lambda item: item[1][0]):
        if token not in ids and number not in taken:
            ids[token] = number
            taken.add(number)
            own.append(entry(token, number, flags))
    for token in specials:
        if token not in ids:
            ids[token] = next_id(ids.values())
            own.append(entry(token, ids[token], special=True))
    return {**content, "added_tokens": own}


def _specials(settings: Content, special: Content) -> Iterable[str]:
    """The tokens that play a role, in the order of the roles."""
    for content in (settings, special):
        roles = [content.get(role) for role in _ROLES]
        more = content.get("extra_special_tokens") or content.get("additional_special_tokens") or ()
        roles += list(more.values()) if isinstance(more, Mapping) else list(more)
        for role in roles:
            token = role.get("content") if isinstance(role, Mapping) else role
            if isinstance(token, str):
                yield token


def _converted(checkpoint: Checkpoint) -> dict[str, Any]:
    """The tokenizer.json that transformers makes of older files. Raises UnsupportedModel."""
    where = f"{checkpoint.label}: {TOKENIZER}"
    remedy = "Save the tokenizer again where it loads: AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)."
    try:
        import transformers
    except ImportError as error:
        message = "is not there, and transformers, which could make it, is not installed"
        raise UnsupportedModel(message, where=where, remedy=remedy) from error
    with tempfile.TemporaryDirectory() as folder:
        for name, path in checkpoint.side_files.items():
            (Path(folder) / name).symlink_to(path.resolve())
        (Path(folder) / "config.json").write_text(json.dumps(dict(checkpoint.config or {})))
        try:
            found = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            content: dict[str, Any] = json.loads(found.backend_tokenizer.to_str())
        except Exception as error:  # whatever the many tokenizers raise
            why = next(iter(str(error).splitlines()), repr(error))
            raise UnsupportedModel(
                f"is not there, and transformers cannot make it: {why}", where=where, remedy=remedy
            ) from error
    return content

"""The tokenizer files of a result. Knows what they hold and what reads them; knows nothing of weights."""

import json
from pathlib import Path
from typing import Any

from merger.checkpoint import Checkpoint
from merger.errors import UnsupportedModel
from merger.tokenizer_files import SETTINGS, TOKENIZER, TokenizerFiles, is_old, is_tokenizer_file

_REMEDY = "Save this tokenizer again with transformers' `save_pretrained`; `tokenizer: {source: base}` changes none."


def tokenizer_outputs(
    donor: Checkpoint, own: TokenizerFiles, result: TokenizerFiles
) -> tuple[dict[str, str], dict[str, Path]]:
    """The result's tokenizer files: the giver's own where no token changes. Raises UnsupportedModel."""
    side = {name: path for name, path in donor.side_files.items() if is_tokenizer_file(name)}
    texts = {name: text for name, text in donor.texts.items() if is_tokenizer_file(name)}
    if result.ids == own.ids:
        return texts, side
    texts = {name: text for name, text in texts.items() if not is_old(name)}
    texts[TOKENIZER] = json.dumps(result.content, indent=2, ensure_ascii=False) + "\n"
    _check_readable(texts[TOKENIZER], result)
    if own.settings:
        texts[SETTINGS] = json.dumps(_settings_of(result), indent=2, ensure_ascii=False) + "\n"
    return texts, {name: path for name, path in side.items() if name not in texts and not is_old(name)}


def _check_readable(text: str, result: TokenizerFiles) -> None:
    """See that the library which reads the file finds the same ids, where it is installed. Raises UnsupportedModel."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return
    try:
        found = Tokenizer.from_str(text).get_vocab()
    except Exception as error:  # the library raises nothing narrower
        raise UnsupportedModel(
            f"cannot be made: {error}", where=f"{result.label}: {TOKENIZER}", remedy=_REMEDY
        ) from error
    odd = sorted(token for token in found.keys() | result.ids.keys() if found.get(token) != result.ids.get(token))
    if odd:
        raise UnsupportedModel(
            f"would give {odd[0]!r} the id {found.get(odd[0])}, not {result.ids.get(odd[0])}",
            where=f"{result.label}: {TOKENIZER}",
            remedy=_REMEDY,
        )


def _settings_of(result: TokenizerFiles) -> dict[str, Any]:
    """tokenizer_config.json, its list of added tokens as it is now."""
    settings = dict(result.settings)
    if "added_tokens_decoder" in settings:
        added = result.content["added_tokens"]
        settings["added_tokens_decoder"] = {
            str(it["id"]): {key: value for key, value in it.items() if key != "id"} for it in added
        }
    return settings

"""Configs in another vocabulary: its size and the ids of special tokens. Knows keys; knows nothing of tensors."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merger.checkpoint import Checkpoint
from merger.tokenizer_files import TokenizerFiles, read

_SIZES = ("vocab_size", "padded_vocab_size")
_ID = re.compile(r"_token_(id|ids|index)$")
_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")
GENERATION = "generation_config.json"


def with_vocabulary_size(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The config with another number of tokens, wherever it states one of its text model."""
    inner = config.get("text_config")
    changed = dict(config)
    if isinstance(inner, Mapping):
        changed["text_config"] = with_vocabulary_size(inner, size)
    changed |= {key: size for key in _SIZES if key in config}
    if not any(key in config for key in _SIZES) and not isinstance(inner, Mapping):
        changed["vocab_size"] = size
    return changed


@dataclass(frozen=True)
class Ids:
    """Ids in the files of a model, in the new vocabulary. Those of texts' starts and ends are the `donor`'s, the model
    whose ids are kept (`is_donor`: it is this one).
    """

    files: TokenizerFiles
    result: TokenizerFiles
    donor: Checkpoint
    is_donor: bool
    size: int

    def in_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return self._changed(config, self.donor.config or {})

    def generation_text(self, model: Checkpoint) -> dict[str, str]:
        """The generation config as a text, where its ids change."""
        own = read(model, GENERATION)
        changed = self._changed(own, {**(self.donor.config or {}), **read(self.donor, GENERATION)})
        return {GENERATION: json.dumps(changed, indent=2) + "\n"} if changed != own else {}

    def _changed(self, config: Mapping[str, Any], donor: Mapping[str, Any]) -> dict[str, Any]:
        changed: dict[str, Any] = {}
        for key, value in config.items():
            if isinstance(value, Mapping) and key.endswith("_config"):
                inner = donor.get(key)
                changed[key] = self._changed(value, inner if isinstance(inner, Mapping) else donor)
            elif _ID.search(key):
                known = key in _ROLES and donor.get(key) is not None
                changed[key] = self._within(donor[key]) if known else self._moved(value)
            else:
                changed[key] = value
        return changed

    def _within(self, value: Any) -> Any:
        """Ids that are kept, without those that have no row any more."""
        if isinstance(value, list):
            return [number for number in value if self._within(number) is not None]
        return value if type(value) is not int or value < self.size else None

    def _moved(self, value: Any) -> Any:
        """Ids of this model by way of their tokens, without those that are no tokens of the result."""
        if self.is_donor:
            return self._within(value)
        if isinstance(value, list):
            return [moved for number in value if (moved := self._moved(number)) is not None]
        if type(value) is not int or value < 0:
            return value
        token = self.files.tokens.get(value)
        return self.result.ids.get(token) if token is not None else None

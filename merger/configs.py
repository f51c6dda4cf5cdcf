"""Configs with every default written out, as transformers knows them.

A config.json holds what differs from the defaults of its own family. Under another `model_type`, or with another
number of layers, other defaults count: a raw copy would change rope_theta or the norm's epsilon without a word.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from functools import cache
from typing import Any

from merger.errors import NotInstalled, UnsupportedModel

# Fields of every config that say nothing about the model; written only where the source has them.
_OF_ALL = {
    "_name_or_path",
    "transformers_version",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "id2label",
    "label2id",
    "problem_type",
}


def resolved(config: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """The config with every default of its family. Raises UnsupportedModel where transformers does not know it."""
    kind = (config or {}).get("model_type")
    if config and "peft_type" in config:
        remedy = "`method: lora` with `base` makes a model of it."
        raise UnsupportedModel("is an adapter, not a model", where=where, remedy=remedy)
    if config is None or not isinstance(kind, str):
        raise UnsupportedModel("has no config.json with a model_type", where=where, remedy="Restore config.json.")
    if config.get("quantization_config"):
        raise UnsupportedModel(
            "is quantized: its stored numbers are not its weights", where=where, remedy="Dequantize it first."
        )
    full = _ask(kind, config, where, fitting=False)
    return {key: value for key, value in full.items() if key not in _OF_ALL or key in config}


def made(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The full config of a family with these fields; those that the family does not have are left out."""
    full = _ask(kind, fields, kind, fitting=True)
    return {key: value for key, value in full.items() if key not in _OF_ALL}


def _ask(kind: str, config: Mapping[str, Any], where: str, *, fitting: bool) -> dict[str, Any]:
    request = json.dumps({"kind": kind, "config": dict(config), "fitting": fitting})
    answer = json.loads(_answer(request))
    if "missing" in answer:
        raise NotInstalled("transformers, which knows the defaults of every family, is not installed")
    if "error" in answer:
        raise UnsupportedModel(answer["error"], where=where)
    full: dict[str, Any] = answer["config"]
    return full


@cache
def _answer(request: str) -> str:
    """From this process where it has transformers, else from one that has nothing else (`merger.defaults`)."""
    if "transformers" in sys.modules:
        from merger.defaults import answer

        return json.dumps(answer(json.loads(request)))
    child = _child()
    with _LOCK:
        try:
            print(request, file=child.stdin, flush=True)
            said = child.stdout.readline() if child.stdout else ""
        except BrokenPipeError:
            said = ""
    return said or json.dumps({"error": "transformers could not be asked: its process has died"})


_LOCK = threading.Lock()


@cache
def _child() -> "subprocess.Popen[str]":
    """Answers until this process ends and closes its standard input."""
    command = [sys.executable, "-m", "merger.defaults"]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )

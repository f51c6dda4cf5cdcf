"""mergekit itself, to compare with. Knows how to run it here; knows nothing of merger."""

import logging
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tests.tiny import stored


def mergekit(module: str) -> ModuleType:
    """A module of mergekit's, which warns of much when it is loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module(f"mergekit.{module}")


def merge(content: Mapping[str, Any], output: Path) -> dict[str, torch.Tensor]:
    """What `mergekit-yaml` makes of a configuration: the tensors, under their names on disk."""
    config = mergekit("config").MergeConfiguration.model_validate(dict(content))
    options = mergekit("options").MergeOptions(write_model_card=False, copy_tokenizer=False, quiet=True)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mergekit("merge").run_merge(config, str(output), options=options)
    finally:
        logging.disable(logging.NOTSET)
    return stored(output)

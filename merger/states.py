"""What a stage keeps while it trains, beside the folder of its model. Knows files; knows nothing of training.

Two processes may train one stage at once, one of them left behind by a runner that was killed, or of another job. Both
compute the same, so it is enough that whatever they write appears whole, and that they take no name from each other.
"""

import glob
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from merger.stages import FINISHED, is_finished
from merger.storage.disk import write_atomically


@dataclass(frozen=True)
class State:
    """Weights and moments after `step` steps, in the part of the stage that begins with step `first`."""

    first: int
    step: int
    tensors: Mapping[str, torch.Tensor]


class States:
    """The state of the stage whose model goes to `folder`, and that model; of the very stage that has this `key`."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        self._state = folder.with_name(f"{folder.name}.state.safetensors")
        self._token = secrets.token_hex(6)  # the ids of processes repeat, on other machines at once

    def kept(self) -> State | None:
        """What an earlier process kept, read whole: another one may replace or remove it at any time."""
        try:
            with safe_open(self._state, "pt") as file:
                told: dict[str, str] = file.metadata() or {}
                if told.get("key") != self._key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except (OSError, SafetensorError):
            return None
        return State(int(told["first"]), int(told["step"]), tensors)

    def keep(self, state: State) -> None:
        """Write a state; whole or not at all."""
        if is_finished(self._folder, self._key):
            return  # by another process, which has cleaned up
        made = self._own("state")  # a folder: who is killed while it writes leaves files of safetensors' own names
        told = {"key": self._key, "first": str(state.first), "step": str(state.step)}
        try:
            made.mkdir(exist_ok=True)
            save_file(dict(state.tensors), made / self._state.name, told)
            (made / self._state.name).replace(self._state)
            made.rmdir()
        except (OSError, SafetensorError):
            if not is_finished(self._folder, self._key):  # by another process, which has cleaned up
                raise

    def finish(self, save: Callable[[Path], None]) -> None:
        """Put the model that `save` writes in its place, and remove what was kept. Raises what `save` does."""
        made = self._own("model")
        try:
            save(made)
            write_atomically(made / FINISHED, json.dumps({"key": self._key}).encode())
            self._publish(made)
        except (OSError, SafetensorError):
            if not is_finished(self._folder, self._key):  # by another process, which has cleaned up
                raise
        self._state.unlink(missing_ok=True)
        for left in self._folder.parent.glob(f".{glob.escape(self._folder.name)}.part-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _publish(self, made: Path) -> None:
        try:
            made.rename(self._folder)
        except OSError:  # something is there
            if is_finished(self._folder, self._key):
                return
            shutil.rmtree(self._folder, ignore_errors=True)  # of another recipe, or an older one of this name
            made.rename(self._folder)

    def _own(self, what: str) -> Path:
        return self._folder.with_name(f".{self._folder.name}.part-{what}-{os.getpid()}-{self._token}")

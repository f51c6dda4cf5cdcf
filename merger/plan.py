"""What will be written, known before any weight is read. Pure: knows tensors, shards and sizes; touches no disk.

A plan lists the output files ("shards") with every byte's place in them, and has a fingerprint that changes
with anything that could change a byte of the result: the recipe, the sources as they are, the layout.
"""

import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from merger.checkpoint import Checkpoint
from merger.expression import Expression, File, Identical
from merger.remote import Remote
from merger.storage.folder import ADAPTER, OPTIMIZER
from merger.storage.safetensors import build_header
from merger.whole import Making, Whole, scratch_size, wholes_in

# Raised when the same recipe and sources give other bytes than before; results of older versions are not resumed.
ARITHMETIC = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a shard; its first byte is at `offset`, counted from the end of the header."""

    name: str
    expression: Expression
    offset: int


@dataclass(frozen=True)
class Shard:
    """One output file: the unit of work, of retry and of resume."""

    name: str
    header: bytes
    entries: tuple[Entry, ...]
    data_size: int

    @property
    def size(self) -> int:
        return len(self.header) + self.data_size

    @property
    def read_size(self) -> int:
        """Bytes that are read to make it."""
        return sum(entry.expression.read_size for entry in self.entries)

    @property
    def scratch_size(self) -> int:
        """Bytes that lie beside it while it is made."""
        return scratch_size(entry.expression for entry in self.entries)


@dataclass(frozen=True)
class Plan:
    """A resolved recipe: the checkpoint it makes and the files it will lie in."""

    recipe: Mapping[str, Any]
    checkpoint: Checkpoint
    shards: tuple[Shard, ...]
    fingerprint: str

    @property
    def size(self) -> int:
        """Bytes that will be written."""
        return sum(shard.size for shard in self.shards)

    @cached_property
    def read_size(self) -> int:
        """Bytes that will be read."""
        return sum(shard.read_size for shard in self.shards)

    def scratch_size(self, at_once: int = 1) -> int:
        """Bytes that lie beside the result while as many shards are made `at_once`."""
        return sum(sorted((shard.scratch_size for shard in self.shards), reverse=True)[:at_once])

    @cached_property
    def wholes(self) -> list[Whole]:
        """The tensors that are made as a whole, the dearest first."""
        found = wholes_in(entry.expression for shard in self.shards for entry in shard.entries)
        return sorted(found, key=lambda whole: -whole.cost)

    @cached_property
    def measuring(self) -> int:
        """The most bytes that finding the numbers of one tensor takes in the first pass."""
        expressions = (entry.expression for shard in self.shards for entry in shard.entries)
        measures = (measure for expression in expressions for measure in expression.measures())
        return max((measure.memory for measure in measures if not isinstance(measure, Making)), default=0)

    @property
    def is_remote(self) -> bool:
        """Whether any of it is read from elsewhere."""
        return any(isinstance(file.path, Remote) for file in _files_of(self.checkpoint))

    @property
    def weights(self) -> tuple[Shard, ...]:
        """The shards of the model itself: all but the optimizer's."""
        return tuple(shard for shard in self.shards if shard.name != OPTIMIZER)

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.checkpoint.tensors.values())

    def buffers(self) -> Iterator[tuple[str, Identical]]:
        """The tensors that must be the same in every source."""
        written = ((name, tensor) for name, tensor in self.checkpoint.tensors.items() if isinstance(tensor, Identical))
        return chain(written, self.checkpoint.same)


def make_plan(checkpoint: Checkpoint, recipe: Mapping[str, Any], shard_size: int) -> Plan:
    """Lay the checkpoint out in shards of at most `shard_size` bytes of tensors (a larger tensor gets one of its
    own); an adapter, which PEFT reads from one file, in one.
    """
    groups = list(_groups(checkpoint.tensors, sys.maxsize if checkpoint.is_adapter else shard_size))
    whole = ADAPTER if checkpoint.is_adapter else "model.safetensors"
    names = [whole] if len(groups) == 1 else list(_numbered(len(groups)))
    shards = tuple(_shard(name, group) for name, group in zip(names, groups, strict=True))
    if checkpoint.optimizer:
        shards = (*shards, _shard(OPTIMIZER, checkpoint.optimizer.items()))
    return Plan(recipe, checkpoint, shards, _fingerprint(checkpoint, recipe, shards))


def _numbered(count: int) -> Iterator[str]:
    return (f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1))


def _groups(tensors: Mapping[str, Expression], shard_size: int) -> Iterator[list[tuple[str, Expression]]]:
    """Tensors in their order, cut where a shard is full."""
    group: list[tuple[str, Expression]] = []
    size = 0
    for name, tensor in tensors.items():
        if group and size + tensor.nbytes > shard_size:
            yield group
            group, size = [], 0
        group.append((name, tensor))
        size += tensor.nbytes
    yield group


def _shard(name: str, group: Iterable[tuple[str, Expression]]) -> Shard:
    """Wide elements come first, so that every tensor starts at a multiple of its element's size."""
    ordered = sorted(group, key=lambda item: -item[1].itemsize)
    entries, position = [], 0
    for tensor, expression in ordered:
        entries.append(Entry(tensor, expression, position))
        position += expression.nbytes
    header = build_header(
        ((entry.name, entry.expression.dtype, entry.expression.shape) for entry in entries), _METADATA
    )
    return Shard(name, header, tuple(entries), position)


def _files_of(checkpoint: Checkpoint) -> list[File]:
    """The files of its sources, and of statistics of these."""
    files = [file for part in checkpoint.parts for file in part.source.files]
    return [*files, *(file for part in checkpoint.parts for own in part.source.observed for file in own.files)]


# What a recipe says of its output that changes no byte of the weights: where it goes, and what is allowed.
ELSEWHERE = ("path", "push", "branch", "create_pr", "private", "drop_code", "accept_license")
_METADATA = {"format": "pt"}  # what transformers writes, and older versions of it require


def _fingerprint(checkpoint: Checkpoint, recipe: Mapping[str, Any], shards: Iterable[Shard]) -> str:
    """sha256 over what the result follows from, in canonical JSON; neither the folder that it goes to, what is measured
    of it, nor whether licences were accepted is part of it.
    """
    output = {key: value for key, value in recipe.get("output", {}).items() if key not in ELSEWHERE}
    moments = {leaf.file for tensor in checkpoint.optimizer.values() for leaf in tensor.leaves()}
    files = _files_of(checkpoint)
    content = {
        "arithmetic": ARITHMETIC,
        "recipe": {**{key: value for key, value in recipe.items() if key != "evaluate"}, "output": output},
        "parts": [(part.source.reference, part.weight) for part in checkpoint.parts],
        "files": [
            (str(file.path), file.size, file.mtime_ns, file.header_sha256)
            for file in [*files, *sorted(moments, key=lambda file: str(file.path))]
        ],
        **({"digests": checkpoint.digests} if checkpoint.digests else {}),
        "shards": [(shard.name, hashlib.sha256(shard.header).hexdigest()) for shard in shards],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def index_of(plan: Plan) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    return {
        "metadata": {"total_parameters": plan.parameters, "total_size": sum(shard.data_size for shard in plan.weights)},
        "weight_map": {entry.name: shard.name for shard in plan.weights for entry in shard.entries},
    }


def read_again(shards: Iterable[Shard]) -> set[File]:
    """The files of which more is read than they hold, as for copies of one tensor, or for a pass that measures."""
    wanted: Counter[File] = Counter()
    for shard in shards:
        for entry in shard.entries:
            tensors = [entry.expression, *(of for measure in entry.expression.measures() for of in measure.inputs)]
            for part in chain.from_iterable(tensor.reads(0, tensor.size) for tensor in tensors):
                wanted[part.file] += part.stop - part.start
    return {file for file, size in wanted.items() if size > 1.2 * file.size}


def fetch_size(plan: Plan) -> int:
    """Bytes that come from elsewhere: what is read of files there, and all of those that are read more than once."""
    if not plan.is_remote:
        return 0
    again = read_again(plan.shards)
    whole = sum(file.size for file in again if isinstance(file.path, Remote))
    tensors = (entry.expression for shard in plan.shards for entry in shard.entries)
    parts = chain.from_iterable(tensor.reads(0, tensor.size) for tensor in tensors)
    return whole + sum(p.stop - p.start for p in parts if isinstance(p.file.path, Remote) and p.file not in again)


def remote_files(shards: Iterable[Shard], among: Collection[str] | None = None) -> set[Remote]:
    """The files elsewhere that are read, those with an address `among` these where such are given."""
    leaves = chain.from_iterable(entry.expression.leaves() for shard in shards for entry in shard.entries)
    found = {leaf.file.path for leaf in leaves if isinstance(leaf.file.path, Remote)}
    return found if among is None else {remote for remote in found if remote.address in among}

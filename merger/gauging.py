"""Makes statistics of a model by running it on text, and leaves them in a folder. Imports torch.

Knows what is computed and how much memory it takes; knows nothing of recipes. The folder appears when it is whole.
"""

import hashlib
import json
import platform
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import Linear
from transformers.core_model_loading import revert_weight_conversion

from merger.checkpoint import Checkpoint
from merger.dtypes import DTYPES
from merger.errors import JobError, NotEnoughMemory, OutputOccupied, SourceError, UnsupportedModel
from merger.grams import Layers, grams, linear_layers, shared_inputs, size_of
from merger.host import free_memory
from merger.identity import digest_of
from merger.loading import Loaded, load
from merger.quantized import dequantized
from merger.rows import rows_of
from merger.sensitivity import Labels, fisher
from merger.sizes import parameters
from merger.statistics import MANIFEST, Kind, Manifest, OfData, OfFile, OfModel, OfText
from merger.storage.disk import write_atomically
from merger.storage.safetensors import read_header
from merger.tasks import Encoding, Text

Tell = Callable[[str], None]
Tensors = dict[str, torch.Tensor]
_EVERY = 2.0  # seconds between two words of progress
_FILE_SIZE = 5 * 10**9  # bytes of Fisher information in one file


@dataclass(frozen=True)
class Order:
    """What to compute of a model, from which text. `memory` is for Gram matrices: where they take more, the text is run
    several times.
    """

    kind: Kind
    data: tuple[Path, ...]
    context: int = 512
    limit: int | None = None
    batch_size: int = 4
    labels: Labels = "model"
    seed: int = 0
    memory: int = 4 << 30
    device: str = "auto"


def make_statistics(stored: Checkpoint, order: Order, output: Path, tell: Tell) -> Manifest:
    """Make the folder `output` with the statistics of a stored model. Raises RequestError and JobError."""
    if output.exists():
        raise OutputOccupied("is there already", where=str(output))
    for path in order.data:
        if not path.is_file():
            raise SourceError("is not there", where=str(path), remedy="Give the path of a text.")
    model = dequantized(stored)
    _check_room(_memory(model, order.kind), model.label, "Make them on a machine with more.")
    loaded = load(model, "AutoModelForCausalLM", "float32", order.device)
    windows = _windows(loaded, order)
    made = _Fisher(model, loaded) if order.kind == "fisher" else _Grams(model, loaded, order, windows)
    of_model, of_data = _of_model(stored), _of_data(order, windows)
    mark = hashlib.sha256(f"{order.kind} {order.labels} {order.seed} {of_model.digest} {of_data}".encode()).hexdigest()
    with _making(output) as part:
        told = _write(part, made.groups(order, windows, tell), mark)
        content = Manifest(
            kind=order.kind,
            model=of_model,
            data=of_data,
            labels=order.labels if order.kind == "fisher" else "",
            seed=order.seed if order.kind == "fisher" else 0,
            mean=made.mean,
            same=made.same,
            without=made.without,
            files=told,
            versions={
                "python": platform.python_version(),
                **{n: version(n) for n in ("merger", "torch", "transformers")},
            },
        )
        (part / "README.md").write_text(_card(content))
        write_atomically(part / MANIFEST, (content.model_dump_json(indent=2) + "\n").encode())
    return content


# ---- what is run --------------------------------------------------------------------------------------


def _windows(loaded: Loaded, order: Order) -> list[tuple[int, ...]]:
    """The text in windows of tokens, none across two texts. Raises SourceError where there is none."""
    task = Text()
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or order.context
    encoding = Encoding(loaded.tokenizer, (), min(order.context, longest))
    found: list[tuple[int, ...]] = []
    for where, row in rows_of(order.data):
        found += task.examples(row, where, encoding)
        if order.limit and len(found) >= order.limit:
            break
    if not found:
        raise SourceError("holds no text of two tokens or more", where=", ".join(map(str, order.data)))
    return found[: order.limit]


def _memory(model: Checkpoint, kind: Kind) -> int:
    """The bytes that the model takes in float32, while it loads once more as it is stored; for Fisher information with
    its gradients, their squares, and these once more while they are renamed. What a window takes comes on top.
    """
    numbers = parameters(model)
    loads = 4 * numbers + sum(tensor.nbytes for tensor in model.tensors.values())
    return max(loads, 16 * numbers) if kind == "fisher" else loads


def _check_room(needed: int, label: str, remedy: str) -> None:
    """Raises NotEnoughMemory."""
    free = free_memory()
    if needed > free:
        told = f"its statistics take {needed:,} bytes of memory, {free:,} are free"
        raise NotEnoughMemory(told, where=label, remedy=remedy)


def _stored_names(model: Any) -> dict[int, str]:
    """The names under which weights of linear layers are stored, as they are used, by the `id` of each."""
    linear = {module.weight.data_ptr(): module.weight for module in model.modules() if isinstance(module, Linear)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    own = {names[id(weight)]: weight.detach() for weight in linear.values() if id(weight) in names}
    found = revert_weight_conversion(model, own)
    pairs = ((name, tensor, linear.get(tensor.data_ptr())) for name, tensor in found.items())
    return {id(weight): name for name, tensor, weight in pairs if weight is not None and weight.shape == tensor.shape}


def _finite(tensors: Tensors, label: str) -> Tensors:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise JobError("its statistics come to NaN or infinity", where=f"{label}: tensor {name!r}")
    return tensors


class _Fisher:
    """Fisher information, for every tensor under the name that it is stored under."""

    def __init__(self, model: Checkpoint, loaded: Loaded) -> None:
        self._model, self._loaded = model, loaded
        self.mean, self.same, self.without = 0.0, dict[str, str](), list[str]()

    def groups(self, order: Order, windows: Sequence[tuple[int, ...]], tell: Tell) -> Iterator[tuple[int, Tensors]]:
        """How many files there will be, and what each of them holds."""
        found = fisher(self._loaded.model, windows, order.labels, order.seed, _progress(tell))
        total = sum(float(tensor.double().sum()) for tensor in found.values())
        self.mean = total / sum(tensor.numel() for tensor in found.values())
        named = _finite(revert_weight_conversion(self._loaded.model, found), self._model.label)
        self._check(named)
        groups = list(_by_size(named))
        yield from ((len(groups), group) for group in groups)

    def _check(self, named: Tensors) -> None:
        """See that transformers gives back the names and shapes that the model is stored in; note what has none."""
        floating = {name: t for name, t in self._model.tensors.items() if DTYPES[t.dtype].is_float}
        for name, tensor in named.items():
            if name not in floating or floating[name].shape != tuple(tensor.shape):
                raise UnsupportedModel(
                    "is a parameter that does not lie in the model under this name and shape",
                    where=f"{self._model.label}: tensor {name!r}",
                    remedy="Save the model once with transformers' save_pretrained, and use that.",
                )
        self.without = sorted(floating.keys() - named.keys())


def _by_size(tensors: Tensors) -> Iterator[Tensors]:
    group, size = Tensors(), 0
    for name, tensor in sorted(tensors.items()):
        if group and size + tensor.nbytes > _FILE_SIZE:
            yield group
            group, size = Tensors(), 0
        group[name] = tensor.contiguous()
        size += tensor.nbytes
    yield group


class _Grams:
    """Gram matrices of the linear layers, under the names of their weights."""

    def __init__(self, model: Checkpoint, loaded: Loaded, order: Order, windows: Sequence[tuple[int, ...]]) -> None:
        self._model, self._loaded = model, loaded
        found = linear_layers(loaded.model, _stored_names(loaded.model))
        layers = {name: layer for name, layer in found.items() if name in model.tensors}
        if not layers:
            raise UnsupportedModel(
                "has no linear layers (torch.nn.Linear) whose weights lie in it as they are used",
                where=model.label,
                remedy="`--kind fisher` is for every parameter.",
            )
        shared = shared_inputs(loaded.model, layers, windows[0])
        self.mean, self.same = 0.0, {name: first for name, first in shared.items() if name != first}
        self.without = sorted(
            name for name, t in model.tensors.items() if name not in layers and DTYPES[t.dtype].is_float
        )
        firsts = {name: layer for name, layer in layers.items() if name not in self.same}
        self._passes = list(_passes(firsts, order.memory, model.label))
        largest = max(sum(2 * size_of(layer) for layer in group.values()) for group in self._passes)
        _check_room(largest, model.label, "Allow less with --memory: the text is run more often for it.")

    def groups(self, order: Order, windows: Sequence[tuple[int, ...]], tell: Tell) -> Iterator[tuple[int, Tensors]]:
        """How many files there will be, and what each of them holds."""
        count = len(self._passes)
        for number, layers in enumerate(self._passes, 1):
            say = _progress(tell, f"pass {number} of {count}: " if count > 1 else "")
            yield count, _finite(grams(self._loaded.model, layers, windows, order.batch_size, say), self._model.label)


def _passes(layers: Layers, memory: int, label: str) -> Iterator[dict[str, Linear]]:
    """The layers whose matrices are computed together: each is there twice when it is divided and written. Raises
    NotEnoughMemory.
    """
    group, size = dict[str, Linear](), 0
    for name, layer in layers.items():
        needed = 2 * size_of(layer)
        if needed > memory:
            raise NotEnoughMemory(
                f"its Gram matrix takes {needed:,} bytes, {memory:,} are allowed",
                where=f"{label}: tensor {name!r}",
                remedy=f"Allow at least --memory {-(-needed // 1024)}KiB.",
            )
        if group and size + needed > memory:
            yield group
            group, size = {}, 0
        group[name] = layer
        size += needed
    yield group


def _progress(tell: Tell, before: str = "") -> Callable[[int, int], None]:
    due = time.monotonic() + _EVERY

    def say(done: int, total: int) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + _EVERY
            tell(f"{before}{done:,} of {total:,} windows")

    return say


# ---- what is written ----------------------------------------------------------------------------------


@contextmanager
def _making(output: Path) -> Iterator[Path]:
    """A folder that gets its name when the block ends well, and is removed when it does not."""
    part = output.with_name(f".{output.name}.part-{secrets.token_hex(6)}")
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(output)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(folder: Path, groups: Iterable[tuple[int, Tensors]], mark: str) -> dict[str, OfFile]:
    """Write each group to a file of its own, and an index where there are several; what the files are. The `mark` in
    their headers tells them from those of other models and texts.
    """
    told, where = dict[str, OfFile](), dict[str, str]()
    for number, (count, group) in enumerate(groups, 1):
        name = "statistics.safetensors" if count == 1 else f"statistics-{number:05d}-of-{count:05d}.safetensors"
        save_file(group, folder / name, {"statistics": mark})  # one key: several come in any order
        (folder / name).chmod(0o644)  # made for nobody else to read
        told[name] = _of_file(folder / name)
        where |= dict.fromkeys(group, name)
    if len(told) > 1:
        index = {"metadata": {"total_size": sum(file.size for file in told.values())}, "weight_map": where}
        write_atomically(folder / "statistics.safetensors.index.json", json.dumps(index, indent=2).encode())
    return told


def _of_file(path: Path) -> OfFile:
    return OfFile(size=path.stat().st_size, header_sha256=read_header(path).sha256, sha256=sha256_of(path))


def sha256_of(path: Path) -> str:
    """The digest of a file, in hexadecimal. Raises SourceError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _of_model(stored: Checkpoint) -> OfModel:
    source = stored.parts[0].source
    return OfModel(
        reference=source.reference, repository=source.repository, revision=source.revision, digest=digest_of(stored)
    )


def _of_data(order: Order, windows: Sequence[tuple[int, ...]]) -> OfData:
    predicted = sum(len(window) - (order.kind == "fisher") for window in windows)
    return OfData(
        files=[OfText(name=path.name, sha256=sha256_of(path)) for path in order.data],
        context=order.context,
        limit=order.limit,
        windows=len(windows),
        tokens=predicted,
    )


def _card(manifest: Manifest) -> str:
    model, data = manifest.model, manifest.data
    what = {"fisher": "Fisher information", "gram": "Gram matrices of the inputs of linear layers"}[manifest.kind]
    base = f"base_model: {model.repository}\n" if model.repository else ""
    return (
        f"---\n{base}tags:\n- merger\n- {manifest.kind}\n---\n\n# {what} of {Path(model.reference).name}\n\n"
        f"Over {data.tokens:,} tokens of text in {data.windows:,} windows, made by `merger statistics`; for "
        f"`method: {'fisher' if manifest.kind == 'fisher' else 'regmean'}` in a recipe of merger. `{MANIFEST}` says of "
        "which model and of which text they are.\n"
    )

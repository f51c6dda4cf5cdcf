"""Whether a checkpoint on disk is what it should be. Knows files and headers; knows nothing of how they were made.

After a run the headers are read back and the counts of the writing pass are judged; `check_folder` does it
all again at any time, reading every byte.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merger.adapters import module_of, summary
from merger.architecture import embedding_of, head_of, is_depth_router, ties_embeddings
from merger.budget import DEFAULT_MEMORY
from merger.checkpoint import open_checkpoint
from merger.checksum import checksum, leaves
from merger.dtypes import DTYPES
from merger.errors import NotInstalled
from merger.expression import Expression
from merger.factors import Truncation
from merger.host import processors
from merger.kernels import Bytes, count_non_finite
from merger.measuring import found_in
from merger.plan import Plan
from merger.reader import OpenFiles
from merger.receipt import Receipt
from merger.storage.disk import PAGE, InputFile, page_aligned
from merger.storage.folder import ADAPTER, ModelFolder, open_folder, read_json
from merger.storage.safetensors import Header

MANIFEST = "merger.json"
_BLOCK = 4 << 20  # bytes, a multiple of LEAF


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: whether it holds, and what was seen."""

    name: str
    passed: bool
    detail: str


# ---- after a run --------------------------------------------------------------------------------------


def check_written(plan: Plan, output: Path, receipts: Sequence[Receipt]) -> list[Check]:
    """Judge finished shards against their plan: files, headers, finite values, ties. Reads headers only."""
    wrong = [shard.name for shard in plan.shards if not _as_planned(output / shard.name, shard.header, shard.size)]
    tensors = len(plan.checkpoint.tensors)
    files = _check("files", wrong, f"names, shapes and sizes as planned, {tensors} tensors")
    overflowed = {name: count for receipt in receipts for name, count in receipt.overflowed.items()}
    non_finite = {name: count for receipt in receipts for name, count in receipt.non_finite.items()}
    return [files, _finite(non_finite, overflowed), _ties(plan.checkpoint.config, plan.checkpoint.tensors)]


def _as_planned(path: Path, header: bytes, size: int) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(header)) == header and os.fstat(file.fileno()).st_size == size
    except OSError:
        return False


def _check(name: str, problems: Sequence[str], good: str) -> Check:
    if not problems:
        return Check(name, True, good)
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return Check(name, False, f"{', '.join(problems[:3])}{more}")


def _finite(inherited: Mapping[str, int], overflowed: Mapping[str, int]) -> Check:
    """Values that a source already lacked are its own; values that the output dtype cannot hold are a failure."""
    if overflowed:
        found = [f"{name}: {count} values are too large for the output dtype" for name, count in overflowed.items()]
        return _check("finite", found, "")
    if inherited:
        found = [f"{name} ({count})" for name, count in inherited.items()]
        return Check("finite", True, f"NaN or infinity carried over from a source: {_check('', found, '').detail}")
    return Check("finite", True, "every value is finite")


def _ties(config: Mapping[str, Any] | None, tensors: Mapping[str, Expression]) -> Check:
    head, embedding = head_of(tensors), embedding_of(tensors)
    if not ties_embeddings(config):
        return Check("ties", True, "embedding and head are not tied by the config")
    if head is None or embedding is None:
        return Check("ties", True, f"the head is tied to {embedding or 'the embedding'}, stored once")
    same = tensors[head].shape == tensors[embedding].shape
    return Check(
        "ties", same, f"{head} is tied to {embedding} and also stored, {'' if same else 'not '}in the same shape"
    )


def check_ranks(plan: Plan) -> list[Check]:
    """How much of the sum is in the factors of a lower rank that were written; nothing where none were.

    Raises ReadFailed and SourceChanged: the sources are looked at once more.
    """
    names = {
        measure: entry.name
        for shard in plan.shards
        for entry in shard.entries
        for measure in entry.expression.measures()
        if isinstance(measure, Truncation)
    }
    inputs = OpenFiles()
    try:
        found = found_in(plan.shards, inputs, processors(), DEFAULT_MEMORY) if names else {}
    finally:
        inputs.close()
    norms = {name: found[measure][-2:] for measure, name in names.items()}
    if not norms:
        return []
    kept, whole = (sum(pair[i] for pair in norms.values()) for i in (0, 1))
    shares = {name: pair[0] / pair[1] if pair[1] else 1.0 for name, pair in norms.items()}
    least = min(shares, key=lambda name: shares[name])
    told = f"{kept / whole if whole else 1.0:.4%} of the squared norm of the sum is kept in {len(norms)} modules"
    return [Check("rank", True, f"{told}; the least, {shares[least]:.4%}, in {module_of(least)}")]


# ---- at any time --------------------------------------------------------------------------------------


def check_folder(folder: Path, *, load: bool = False, on_bytes: Callable[[int], None] = lambda _: None) -> list[Check]:
    """Check a checkpoint in a folder, ours or not, reading all of it. With `load` also in transformers, on no device.

    Raises SourceError and FormatError where there is no readable checkpoint at all.
    """
    model = open_folder(folder)
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
    files = [*model.files, *([model.optimizer] if model.optimizer else [])]
    scans = {file.path.name: _scan(_file(folder, file.path.name), file.header, on_bytes) for file in files}
    found = {name: count for scan in scans.values() for name, count in scan.non_finite.items()}
    known = manifest.get("non_finite", {}) if manifest else {}
    new = {name: count for name, count in found.items() if known.get(name) != count}
    finite = _check("finite", [f"{name}: {count} values are NaN or infinite" for name, count in new.items()], "")
    checks = [_structure(model), finite if new else _finite(found, {})]
    is_adapter = model.files[0].path.name == ADAPTER
    if is_adapter:
        checks.append(_adapter(folder))
    if manifest:
        checks.append(_against_manifest(manifest, {name: scan.xxh3 for name, scan in scans.items()}))
    return [*checks, _not_loaded() if is_adapter else _loads(folder)] if load else checks


def _file(model: Path, name: str) -> Path:
    return model if model.is_file() else model / name


def _adapter(folder: Path) -> Check:
    """Whether each factor has its other half, in the rank that the config says."""
    found = summary(open_checkpoint(folder))
    if "refused" in found:
        return Check("adapter", True, f"{found['type']}; merger could not merge it: {found['refused']}")
    ranks = ", ".join(map(str, found["ranks"]))
    return Check("adapter", True, f"{found['type']} of rank {ranks}: factors for {found['modules']} modules, in pairs")


def _not_loaded() -> Check:
    return Check("loads", True, "not tried: an adapter loads onto its base only")


def _structure(model: ModelFolder) -> Check:
    tensors = sum(len(file.header.tensors) for file in model.files)
    return Check("files", True, f"well formed, {tensors} tensors")


def _against_manifest(manifest: Mapping[str, Any], checksums: Mapping[str, str]) -> Check:
    planned = {shard["file"]: shard["xxh3"] for shard in manifest.get("shards", [])}
    missing = [f"{name} is missing" for name in planned.keys() - checksums.keys()]
    damaged = [
        f"{name} is not the file that was written" for name, value in checksums.items() if planned.get(name) != value
    ]
    return _check("checksums", [*missing, *damaged], "byte for byte what was written")


@dataclass(frozen=True)
class _Scan:
    """What reading a whole file tells: its checksum, and how many values of which tensors are not finite."""

    xxh3: str
    non_finite: Mapping[str, int]


def _scan(path: Path, header: Header, on_bytes: Callable[[int], None]) -> _Scan:
    tensors = [(name, t) for name, t in header.tensors.items() if DTYPES[t.dtype].is_float]
    found: dict[str, int] = {}

    def block(start: int) -> bytes:
        stop = min(start + _BLOCK, header.file_size)
        data = file.read(start, stop, page_aligned(_BLOCK + 2 * PAGE))
        for name, tensor in tensors:
            if tensor.start < stop and start < tensor.stop:
                bad = _bad_values(data, start, tensor.start, tensor.stop, tensor.dtype)
                found[name] = found.get(name, 0) + bad
        on_bytes(stop - start)
        return leaves(data)

    with InputFile(path, header.file_size) as file, ThreadPoolExecutor(processors()) as pool:
        head = file.read(0, header.data_start, page_aligned(header.data_start + 2 * PAGE)).tobytes()
        data_leaves = b"".join(pool.map(block, range(header.data_start, header.file_size, _BLOCK)))
    return _Scan(checksum(head, data_leaves), {name: count for name, count in found.items() if count})


def _bad_values(data: Bytes, start: int, first: int, last: int, dtype: str) -> int:
    """NaN and infinite values of a tensor within a block; an element on the edge of two blocks counts in the first."""
    size = DTYPES[dtype].alignment
    skip = -(start - first) % size if start > first else first - start
    part = data[skip : last - start]
    whole = part[: part.size // size * size]
    return count_non_finite(whole.copy() if whole.ctypes.data % size else whole, dtype)


# ---- in transformers ----------------------------------------------------------------------------------


def _loads(folder: Path) -> Check:
    """Load with transformers on the meta device: every tensor of the file has its place, and every place its tensor."""
    try:
        import transformers  # seconds, and only for this check
    except ImportError as error:
        raise NotInstalled("needs transformers, which is not installed", where="--load") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = (read_json(folder / "config.json") if (folder / "config.json").is_file() else {}).get("architectures") or []
    model = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if model is None:
        return Check("loads", False, f"transformers {transformers.__version__} does not know {names[0]}")
    try:
        _, info = model.from_pretrained(
            folder, device_map="meta", dtype="auto", output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        return Check("loads", False, f"transformers: {error}")
    problems = [
        f"{kind} {key}"
        for kind in ("missing", "unexpected", "mismatched")
        for key in sorted(info[f"{kind}_keys"], key=str)
        if not is_depth_router(str(key))
    ]
    return _check(
        "loads",
        problems,
        f"transformers {transformers.__version__} loads it as {model.__name__}, no key missing or left over",
    )

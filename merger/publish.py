"""The output folder: taking it, going on in it, completing it. Knows what may be written where; knows no arithmetic.

Shards and receipts come first, the index and config.json (of an adapter adapter_config.json) last: a folder that has
it is complete. While the work goes on the folder has a `.merger` folder, which holds the plan's fingerprint, receipts
and a lock.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from merger.errors import OutputOccupied, WriteFailed
from merger.plan import Plan, index_of
from merger.receipt import FOLDER, Receipt, read_receipt
from merger.storage.disk import sync_folder, write_atomically
from merger.storage.folder import ADAPTER_CONFIG, CONFIG, read_json
from merger.verify import MANIFEST

_PLAN = "plan.json"
INDEX = "model.safetensors.index.json"


def is_complete(output: Path, plan: Plan) -> bool:
    """Whether the folder already holds the finished result of this very plan."""
    return not (output / FOLDER).exists() and _fingerprint(output / MANIFEST) == plan.fingerprint


def check_free(output: Path, plan: Plan) -> None:
    """See that the folder is new, empty, or holds this plan's unfinished work.

    Raises OutputOccupied; writes nothing.
    """
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir():
        raise OutputOccupied("is a file", where=str(output))
    begun = _fingerprint(output / FOLDER / _PLAN)
    if begun == plan.fingerprint or not any(output.iterdir()):
        return
    if begun:
        raise OutputOccupied(
            "holds unfinished work of another recipe, or of sources that have changed", where=str(output)
        )
    first = sorted(path.name for path in output.iterdir())[0]
    what = "a finished result of another recipe" if (output / MANIFEST).exists() else f"something else ({first})"
    raise OutputOccupied(f"holds {what}", where=str(output))


def _fingerprint(path: Path) -> str | None:
    try:
        value = json.loads(path.read_text()).get("fingerprint")
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, str) else None


@contextmanager
def taken(output: Path, plan: Plan) -> Iterator[None]:
    """Hold the folder against other runs for as long as the block lasts. Raises OutputOccupied and WriteFailed."""
    check_free(output, plan)
    try:
        (output / FOLDER).mkdir(parents=True, exist_ok=True)
        lock = os.open(output / FOLDER / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise WriteFailed(f"cannot be made: {error.strerror}", where=str(output)) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _check_there(output, lock)
        write_atomically(output / FOLDER / _PLAN, json.dumps({"fingerprint": plan.fingerprint}).encode())
        yield
    except BlockingIOError as error:
        raise OutputOccupied(
            "is being written by another run", where=str(output), remedy="Wait for it to end."
        ) from error
    finally:
        os.close(lock)


def _check_there(output: Path, lock: int) -> None:
    """See that a lock is the folder's still: whoever held it before may have taken the folder away with it."""
    try:
        same = os.path.samestat(os.fstat(lock), (output / FOLDER / "lock").stat())
    except FileNotFoundError:
        same = False
    if not same:
        raise BlockingIOError


def finished_shards(output: Path, plan: Plan) -> list[Receipt]:
    """The receipts of the shards that an earlier run finished."""
    receipts = (read_receipt(output, shard.name, plan.fingerprint) for shard in plan.shards)
    return [receipt for receipt in receipts if receipt]


def complete(output: Path, plan: Plan, texts: Mapping[str, str | bytes], manifest: Mapping[str, Any]) -> None:
    """Put everything but the shards into the folder, its config last; the traces of the work stay."""
    checkpoint = plan.checkpoint
    for name, source in checkpoint.side_files.items():
        write_atomically(output / name, source.read_bytes())
    for name, text in texts.items():
        write_atomically(output / name, text if isinstance(text, bytes) else text.encode())
    if len(plan.weights) > 1:
        _write_json(output / INDEX, index_of(plan))
    _write_json(output / MANIFEST, manifest)
    if checkpoint.config is not None:
        _write_json(output / (ADAPTER_CONFIG if checkpoint.is_adapter else CONFIG), checkpoint.config)


def finish(output: Path) -> None:
    """Clear the traces of the work: nothing is left to be done for this result."""
    shutil.rmtree(output / FOLDER)
    sync_folder(output)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def published(output: Path) -> list[Receipt]:
    """The receipts of a complete result, as its manifest tells them."""
    manifest = read_json(output / MANIFEST)
    shards = [Receipt(fingerprint=manifest["fingerprint"], **shard) for shard in manifest["shards"]]
    return [replace(shards[0], non_finite=manifest["non_finite"]), *shards[1:]]


def remove(output: Path) -> None:
    """Take a folder away whose result is elsewhere by now; renamed first, so that nobody takes half of it for work."""
    gone = output.with_name(f".{output.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    output.rename(gone)
    shutil.rmtree(gone)


def remove_abandoned(output: Path, plan: Plan) -> None:
    """Take away what a killed run has left of a folder whose result is elsewhere, unless another run is at it."""
    shutil.rmtree(output.with_name(f".{output.name}.gone"), ignore_errors=True)
    if output.exists():
        with suppress(OutputOccupied), taken(output, plan):
            remove(output)


def discard(output: Path, plan: Plan) -> None:
    """Take back what a run that cannot succeed has written: its own shards and traces, and the folder if that
    empties it.
    """
    for receipt in finished_shards(output, plan):
        (output / receipt.file).unlink(missing_ok=True)
    shutil.rmtree(output / FOLDER, ignore_errors=True)
    if not any(output.iterdir()):
        output.rmdir()

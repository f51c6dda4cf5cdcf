"""What a finished shard leaves. Knows one small JSON file a shard; knows nothing of how the shard was made."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from merger.storage.disk import write_atomically

FOLDER = ".merger"  # inside the output folder while the work goes on


@dataclass(frozen=True)
class Receipt:
    """A shard that is on the disk, whole: its name, size and checksum, and the plan that it belongs to.

    `non_finite` counts NaN and infinite values by tensor where a source had them; `overflowed` counts those that
    the output dtype could not hold.
    """

    file: str
    size: int
    xxh3: str
    fingerprint: str
    non_finite: Mapping[str, int] = field(default_factory=dict)
    overflowed: Mapping[str, int] = field(default_factory=dict)


def write_receipt(output: Path, receipt: Receipt) -> None:
    """Leave the receipt of a shard that has been synced and renamed."""
    write_atomically(_path(output, receipt.file), json.dumps(asdict(receipt)).encode())


def read_receipt(output: Path, file: str, fingerprint: str) -> Receipt | None:
    """The receipt of a finished shard of this very plan, or None where the shard has to be made."""
    try:
        receipt = Receipt(**json.loads(_path(output, file).read_text()))
        complete = receipt.fingerprint == fingerprint and (output / file).stat().st_size == receipt.size
    except (OSError, ValueError, TypeError):
        return None
    return receipt if complete else None


def _path(output: Path, file: str) -> Path:
    return output / FOLDER / f"{file}.json"

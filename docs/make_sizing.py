"""Writes the table of sizes into docs/operating.md.

    python docs/make_sizing.py

Lays out models of known shapes as sparse files, plans an average of them as the service does, and computes times from
what bench/ has measured. Knows shapes and plans; reads no weight.
"""

import json
import re
import struct
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from merger.plan import Plan
from merger.recipe import make_document
from merger.run import Options, plan_of
from workers.resources import TaskSize, measuring_request, request_for

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- sizes: made by docs/make_sizing.py -->", "<!-- sizes end -->"
SHARD = 5_000_000_000
SPEEDS = (1, 5)  # GB/s of the storage


@dataclass(frozen=True)
class Shape:
    """A decoder: dense where `experts` is 0."""

    name: str
    layers: int
    hidden: int
    inner: int
    keys: int  # rows of each of the projections to keys and values
    vocabulary: int
    experts: int = 0

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for end in ("model.embed_tokens", "lm_head"):
            yield f"{end}.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            place = f"model.layers.{layer}"
            for part, rows in {"q": self.hidden, "k": self.keys, "v": self.keys, "o": self.hidden}.items():
                yield f"{place}.self_attn.{part}_proj.weight", (rows, self.hidden)
            for block in [f"experts.{i}" for i in range(self.experts)] or ["mlp"]:
                for part in ("gate", "up"):
                    yield f"{place}.{block}.{part}_proj.weight", (self.inner, self.hidden)
                yield f"{place}.{block}.down_proj.weight", (self.hidden, self.inner)


SHAPES = (
    Shape("7B, dense", 32, 4096, 11008, 4096, 32000),
    Shape("70B, dense", 80, 8192, 28672, 1024, 128256),
    Shape("1T, 384 experts", 61, 7168, 2048, 7168, 163840, 384),
)


def write_sparse(folder: Path, shape: Shape) -> None:
    """A checkpoint of that shape in bfloat16, with headers and no weights."""
    folder.mkdir(parents=True)
    files: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD
    for name, dims in shape.tensors():
        size = 2 * dims[0] * dims[1]
        if size > room and files[-1]:
            files.append({})
            room = SHARD
        files[-1][name] = dims
        room -= size
    names = {tensor: f"model-{i:05d}.safetensors" for i, part in enumerate(files, 1) for tensor in part}
    for i, part in enumerate(files, 1):
        _write_part(folder / f"model-{i:05d}.safetensors", part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _write_part(path: Path, part: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, dims in part.items():
        begin, end = end, end + 2 * dims[0] * dims[1]
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def planned(folder: Path) -> Plan:
    """The plan of an average of the three models in a folder."""
    output = {"path": str(folder / "out"), "shard_size": "5GB"}
    recipe = {"method": "average", "checkpoints": str(folder / "step-*"), "output": output}
    return plan_of(make_document(recipe), Options())[0]


def seconds_of_processor() -> float:
    """Seconds of one processor for a GB read or written: `merger run` over warm inputs (bench/average.md)."""
    runs = json.loads((FOLDER.parent / "bench" / "average.json").read_text())["warm"]["merger"]
    middle = sorted(run["cpu"] for run in runs)[len(runs) // 2]
    return float(middle / (4 * 2.2))  # three models of 2.2 GB in, one out


def row(shape: Shape) -> str:
    """What an average of three such models takes."""
    with tempfile.TemporaryDirectory() as folder:
        for step in (1, 2, 3):
            write_sparse(Path(folder) / f"step-{step}", shape)
        plan = planned(Path(folder))
    moved = (plan.read_size + plan.size) / 1e9
    task, _ = request_for(plan, TaskSize())
    times = [_time(moved / speed) for speed in SPEEDS]
    return " | ".join(
        [
            f"| {shape.name}",
            f"{plan.size / 1e9:,.0f} GB",
            f"{len(plan.shards):,}",
            f"{task.memory / 2**30:.1f} GiB",
            f"{plan.read_size / 1e9:,.0f} GB",
            *times,
            f"{_time(moved * seconds_of_processor())}",
            f"{measuring_request(plan, TaskSize()).memory / 2**30:,.0f} GiB |",
        ]
    )


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def table() -> str:
    """The table of the guide."""
    heads = ["model, bfloat16", "result", "shards of 5 GB", "memory of a task", "read", "at 1 GB/s", "at 5 GB/s"]
    heads += ["processor time", "memory to measure it"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *map(row, SHAPES)]
    return "\n".join(lines)


def replaced(guide: str) -> str:
    """The guide with the table as it is now."""
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{table()}\n{END}", guide, flags=re.DOTALL)


if __name__ == "__main__":
    path = FOLDER / "operating.md"
    path.write_text(replaced(path.read_text()))

"""Three checkpoints of 1.1e9 parameters, averaged by merger and by mergekit in turn, with a loop that only reads and
writes.

Prints a table and writes it to bench/average.md and bench/average.json. `make bench` runs it; it needs 11 GB of disk.
Every run is a process of its own, after `sync`; "cold" drops the inputs from the page cache first.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from data import make
from processes import Run, measure, median, wrapped

from merger.host import processors
from merger.storage.safetensors import read_header

HERE = Path(__file__).parent
DATA, BIN = HERE / "data", Path(sys.executable).parent
INPUTS = [DATA / f"model-{i}" for i in range(3)]
WEIGHTS = [0.5, 0.3, 0.2]
GIGABYTES = 8.8  # read and written by each run
THREADS = 2 * processors()


def prepare() -> None:
    """Inputs and both configurations."""
    for seed, folder in enumerate(INPUTS):
        make(folder, seed)
    models = [{"model": str(path), "parameters": {"weight": w}} for path, w in zip(INPUTS, WEIGHTS, strict=True)]
    mergekit = {"merge_method": "linear", "dtype": "bfloat16", "models": models}
    (DATA / "mergekit.yaml").write_text(json.dumps(mergekit))
    ours = {"method": "average", "checkpoints": [str(path) for path in INPUTS], "weights": WEIGHTS}
    (DATA / "merger.yaml").write_text(json.dumps(ours))


def run_merger(*, cold: bool) -> Run:
    output = DATA / "out-merger"
    command = wrapped(str(BIN / "merger"), "run", str(DATA / "merger.yaml"), "-o", str(output), "--json")
    run, printed = measure(command, output, INPUTS, cold=cold)
    return replace(run, inner=json.loads(printed)["figures"]["seconds"])


def run_mergekit(*, cold: bool) -> Run:
    output = DATA / "out-mergekit"
    command = wrapped(str(BIN / "mergekit-yaml"), str(DATA / "mergekit.yaml"), str(output), "--lazy-unpickle")
    return measure(command, output, INPUTS, cold=cold)[0]


def run_bare(*, cold: bool) -> Run:
    output = DATA / "out-bare"
    inputs = [str(folder / "model.safetensors") for folder in INPUTS]
    command = wrapped(sys.executable, str(HERE / "bare.py"), str(THREADS), str(output), *inputs)
    run, printed = measure(command, output, INPUTS, cold=cold)
    return replace(run, inner=float(printed))


def compare_outputs() -> str:
    """See that both outputs are what their arithmetic allows, on the first million elements of every tensor."""
    ours, theirs = DATA / "out-merger" / "model.safetensors", _only(DATA / "out-mergekit")
    inputs = [folder / "model.safetensors" for folder in INPUTS]
    files = [ours, theirs, *inputs]
    headers = [read_header(path) for path in files]
    worst_ours = worst_theirs = 0.0
    for name in headers[0].tensors:
        a, b, *sources = (
            _values(path, header.tensors[name].start, header.tensors[name].stop)
            for path, header in zip(files, headers, strict=True)
        )
        terms = [w * x for w, x in zip(WEIGHTS, sources, strict=True)]
        exact, size = sum(terms), sum(abs(term) for term in terms)
        half_ulp = 2.0**-9 * 2.0 ** np.ceil(np.log2(np.maximum(abs(exact), 1e-30)))
        worst_ours = max(worst_ours, float(np.max(abs(a - exact) / (half_ulp + 3 * 2.0**-24 * size))))
        # bfloat16 arithmetic: a rounding of every weight, product and sum.
        worst_theirs = max(worst_theirs, float(np.max(abs(b - exact) / (half_ulp + 4 * 2.0**-8 * size))))
    if worst_ours > 1 or worst_theirs > 1:
        raise SystemExit(f"outputs are off: {worst_ours:.2f} and {worst_theirs:.2f} of what rounding allows")
    shares = f"merger {worst_ours:.2f}, mergekit {worst_theirs:.2f}"
    return f"the largest error against float64, as a share of what the rounding of each allows, is {shares}"


def _only(folder: Path) -> Path:
    return next(iter(folder.glob("*.safetensors")))


def _values(path: Path, start: int, stop: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    bits = np.fromfile(path, np.uint16, min(1_000_000, (stop - start) // 2), offset=start)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def table(results: dict[str, dict[str, list[Run]]], agreement: str) -> str:
    lines = [
        "# Averaging three checkpoints of 1.1e9 parameters (bf16, 2.2 GB each), weights 0.5 / 0.3 / 0.2",
        "",
        f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}; medians of "
        f"{len(results['warm']['merger'])} alternating runs, `sync` before each, peak memory of the whole process.",
        "",
        "| inputs | tool | wall s | GB/s | CPU s | peak MB | engine s |",
        "|---|---|---|---|---|---|---|",
    ]
    for state, tools in results.items():
        for tool, runs in tools.items():
            wall = median(runs, "wall")
            inner = f"{median(runs, 'inner'):.2f}" if runs[0].inner is not None else ""
            lines.append(
                f"| {state} | {tool} | {wall:.2f} | {GIGABYTES / wall:.2f} | {median(runs, 'cpu'):.2f} | "
                f"{median(runs, 'peak'):.0f} | {inner} |"
            )
    lines += [
        "",
        "| inputs | mergekit / merger, wall | merger / mergekit, peak | merger / bare loop, engine |",
        "|---|---|---|---|",
    ]
    for state, tools in results.items():
        speed = median(tools["mergekit"], "wall") / median(tools["merger"], "wall")
        memory = median(tools["merger"], "peak") / median(tools["mergekit"], "peak")
        limit = statistics.median(
            a.inner / b.inner for a, b in zip(tools["merger"], tools["bare loop"], strict=True) if a.inner and b.inner
        )
        lines.append(f"| {state} | **{speed:.1f}** | 1/{1 / memory:.1f} | {limit:.2f} |")
    return "\n".join([*lines, "", f"Both outputs agree: {agreement}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=6)
    runs = parser.parse_args().runs
    prepare()
    run_merger(cold=False)  # compiles the kernels, once for a machine
    tools = {"merger": run_merger, "bare loop": run_bare, "mergekit": run_mergekit}
    results: dict[str, dict[str, list[Run]]] = {state: {tool: [] for tool in tools} for state in ("warm", "cold")}
    for state, rows in results.items():
        for i in range(runs):
            # Rotated, because a run feels what the one before it left to the disk.
            for tool, run in [*tools.items()][i % 3 :] + [*tools.items()][: i % 3]:
                rows[tool].append(run(cold=state == "cold"))
                print(f"{state} {i + 1}/{runs} {tool}: {rows[tool][-1]}", flush=True)
    text = table(results, compare_outputs())
    (HERE / "average.md").write_text(text)
    data = {
        state: {tool: [asdict(run) for run in runs] for tool, runs in rows.items()} for state, rows in results.items()
    }
    (HERE / "average.json").write_text(json.dumps(data, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()

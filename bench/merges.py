"""mergekit's configurations of models of 1.1e9 parameters (bf16), by merger and by mergekit-yaml in turn.

Prints a table and writes it to bench/merges.md and bench/merges.json. Both read the same file. Every run is a process
of its own, after `sync`, with the inputs in the page cache. It needs 11 GB of disk, and for all methods an hour.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data import make
from processes import Run, measure, median, wrapped

HERE = Path(__file__).parent
DATA, BIN = HERE / "data", Path(sys.executable).parent
INPUTS = [DATA / f"model-{i}" for i in range(3)]
BASE, FIRST, SECOND = map(str, INPUTS)
# Numbers for all models, numbers for each; and how many models beside the base.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "linear": ({}, {"weight": 0.5}, 2),
    "slerp": ({"t": 0.3}, {}, 1),
    "dare_linear": ({}, {"weight": 0.5, "density": 0.5}, 2),
    "dare_ties": ({}, {"weight": 0.5, "density": 0.5}, 2),
    "model_stock": ({}, {}, 2),
    "breadcrumbs": ({}, {"weight": 0.5, "density": 0.9, "gamma": 0.01}, 2),
    "ties": ({}, {"weight": 0.5, "density": 0.5}, 2),
    "della": ({}, {"weight": 0.5, "density": 0.5, "epsilon": 0.1}, 2),
}
ASKED = {"ties": 20, "della": 12, "breadcrumbs": 12}  # times faster; 5 for the others


def configuration(method: str) -> Path:
    """The file that both read."""
    shared, each, count = METHODS[method]
    models = [{"model": path, "parameters": each} for path in (FIRST, SECOND)[:count]]
    content: dict[str, Any] = {"merge_method": method, "models": models, "parameters": shared, "dtype": "bfloat16"}
    if method == "linear":
        content["models"] = [{"model": BASE, "parameters": each}, *models]
    else:
        content["base_model"] = BASE
    path = DATA / f"{method}.yaml"
    path.write_text(json.dumps(content))
    return path


def run(tool: str, path: Path) -> Run:
    output = DATA / f"out-{tool}"
    ours = ["run", str(path), "-o", str(output), "--json"]
    theirs = [str(path), str(output), "--lazy-unpickle", "--allow-crimes"]
    command = [str(BIN / "merger"), *ours] if tool == "merger" else [str(BIN / "mergekit-yaml"), *theirs]
    return measure(wrapped(*command), output, INPUTS, cold=False)[0]


def table(results: dict[str, dict[str, list[Run]]]) -> str:
    counts = {len(runs) for tools in results.values() for runs in tools.values()}
    lines = [
        "# mergekit's configurations of models of 1.1e9 parameters (bf16), two and a base where there is one",
        "",
        f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}; mergekit 0.1.5; "
        f"medians of {' to '.join(map(str, sorted(counts)))} alternating runs of the whole process, inputs in the page "
        "cache, `sync` before each.",
        "",
        "| method | merger s | mergekit s | times faster | asked | merger peak MB | mergekit peak MB | peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, tools in results.items():
        ours, theirs = tools["merger"], tools["mergekit"]
        ratio = statistics.median(b.wall / a.wall for a, b in zip(ours, theirs, strict=True))
        peak = median(theirs, "peak") / median(ours, "peak")
        lines.append(
            f"| {method} | {median(ours, 'wall'):.1f} | {median(theirs, 'wall'):.1f} | **{ratio:.1f}** | "
            f"{ASKED.get(method, 5)} | {median(ours, 'peak'):.0f} | {median(theirs, 'peak'):.0f} | 1/{peak:.0f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    arguments = parser.parse_args()
    for seed, folder in enumerate(INPUTS):
        make(folder, seed)
    results: dict[str, dict[str, list[Run]]] = {}
    for method in arguments.methods:
        path = configuration(method)
        run("merger", path)  # compiles the kernels, once for a machine
        results[method] = {"merger": [], "mergekit": []}
        for i in range(arguments.runs):
            for tool in ("merger", "mergekit")[:: 1 if i % 2 else -1]:
                results[method][tool].append(run(tool, path))
                print(method, i + 1, tool, results[method][tool][-1], flush=True)
        (HERE / "merges.json").write_text(
            json.dumps({m: {t: [asdict(r) for r in rs] for t, rs in ts.items()} for m, ts in results.items()}, indent=1)
            + "\n"
        )
        (HERE / "merges.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()

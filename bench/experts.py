"""A dense checkpoint of 1.1e9 parameters becomes 8 experts a layer: merger, mergekit-moe, and dd, in turn.

Prints a table and writes it to bench/experts.md and bench/experts.json; needs 40 GB of disk. `dd` writes as many bytes
with the engine's block size and direct I/O. Every run is a process of its own, after `sync`; merger runs without the
proof by logits, which mergekit has not. mergekit's gates are random too.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

from data import make
from processes import Run, measure, median, wrapped
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
DATA, BIN = HERE / "data", Path(sys.executable).parent
DENSE = DATA / "model-0"
EXPERTS = 8
BLOCK = 2 << 20


def prepare() -> None:
    """The dense model and both configurations."""
    make(DENSE, 0)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(DENSE)  # mergekit-moe loads one
    ours = {"method": "upcycle", "source": str(DENSE), "experts": EXPERTS}
    theirs = {
        "base_model": str(DENSE),
        "gate_mode": "random",
        "dtype": "bfloat16",
        "architecture": "mixtral",
        "experts": [{"source_model": str(DENSE), "positive_prompts": []} for _ in range(EXPERTS)],
    }
    (DATA / "upcycle.yaml").write_text(json.dumps(ours))
    (DATA / "moe.yaml").write_text(json.dumps(theirs))


def run_merger(*, cold: bool) -> Run:
    output = DATA / "out-moe-merger"
    options = ["--json", "--parity", "off"]
    command = wrapped(str(BIN / "merger"), "run", str(DATA / "upcycle.yaml"), "-o", str(output), *options)
    run, printed = measure(command, output, [DENSE], cold=cold)
    return replace(run, inner=json.loads(printed)["figures"]["seconds"])


def run_mergekit(*, cold: bool) -> Run:
    output = DATA / "out-moe-mergekit"
    flag = "--i-understand-this-is-not-useful-without-training"
    command = wrapped(str(BIN / "mergekit-moe"), str(DATA / "moe.yaml"), str(output), flag)
    return measure(command, output, [DENSE], cold=cold)[0]


def run_dd(*, cold: bool) -> Run:
    output, count = DATA / "out-dd", size_of(DATA / "out-moe-merger") // BLOCK
    options = ["if=/dev/zero", f"of={output}", f"bs={BLOCK}", f"count={count}", "oflag=direct", "conv=fsync"]
    return measure(wrapped("dd", *options), output, [DENSE], cold=cold)[0]


def size_of(folder: Path) -> int:
    """Bytes of weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def table(results: dict[str, dict[str, list[Run]]]) -> str:
    size = size_of(DATA / "out-moe-merger")
    runs = len(results["warm"]["merger"])
    lines = [
        f"# 1.1e9 parameters (bf16, 2.2 GB) to {EXPERTS} experts a layer ({size / 1e9:.1f} GB)",
        "",
        f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}; medians of {runs} "
        "alternating runs, `sync` before each, peak memory of the whole process.",
        "",
        "| inputs | tool | wall s | on the disk s | GB/s to disk | CPU s | peak MB | engine s | engine GB/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for state, tools in results.items():
        for tool, made in tools.items():
            wall, inner = median(made, "wall"), median(made, "inner") if made[0].inner is not None else None
            durable = median(made, "durable")
            engine = f"{inner:.2f} | {size / inner / 1e9:.2f}" if inner else " | "
            lines.append(
                f"| {state} | {tool} | {wall:.2f} | {durable:.2f} | {size / durable / 1e9:.2f} | "
                f"{median(made, 'cpu'):.2f} | "
                f"{median(made, 'peak'):.0f} | {engine} |"
            )
    lines += [
        "",
        "`on the disk` adds a `sync` after the run: merger and dd have synced when they end, mergekit-moe has not.",
        "",
        "| inputs | mergekit-moe / merger, wall | the same, on the disk | dd / engine | dd / merger, wall |",
        "|---|---|---|---|---|",
    ]
    for state, tools in results.items():
        speed = median(tools["mergekit-moe"], "wall") / median(tools["merger"], "wall")
        pairs = list(zip(tools["dd"], tools["merger"], strict=True))
        engine = statistics.median(dd.wall / ours.inner for dd, ours in pairs if ours.inner)
        whole = statistics.median(dd.wall / ours.wall for dd, ours in pairs)
        durable = median(tools["mergekit-moe"], "durable") / median(tools["merger"], "durable")
        lines.append(f"| {state} | **{speed:.1f}** | {durable:.1f} | {engine:.2f} | {whole:.2f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=4)
    runs = parser.parse_args().runs
    prepare()
    run_merger(cold=False)  # compiles the kernels, once for a machine; its size is what dd writes
    tools = {"merger": run_merger, "dd": run_dd, "mergekit-moe": run_mergekit}
    results: dict[str, dict[str, list[Run]]] = {state: {tool: [] for tool in tools} for state in ("warm", "cold")}
    for state, rows in results.items():
        for i in range(runs):
            for tool, run in [*tools.items()][i % 3 :] + [*tools.items()][: i % 3]:
                rows[tool].append(run(cold=state == "cold"))
                print(f"{state} {i + 1}/{runs} {tool}: {rows[tool][-1]}", flush=True)
    text = table(results)
    (HERE / "experts.md").write_text(text)
    data = {
        state: {tool: [asdict(run) for run in made] for tool, made in rows.items()} for state, rows in results.items()
    }
    (HERE / "experts.json").write_text(json.dumps(data, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()

"""Two models of 1.1e9 parameters on a Hub on this machine: how fast they are read by ranges, and merged and pushed.

Prints a table and writes it to bench/hub.md and bench/hub.json. The Hub is the one of the tests, in a process of its
own, which sends files with sendfile; a download of both files by two connections of curl is the measure. It needs 12 GB
of disk.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from data import make
from processes import measure, wrapped

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
DATA, BIN = HERE / "data", Path(sys.executable).parent
INPUTS = [DATA / f"model-{i}" for i in range(2)]
NAMES = ["org/first", "org/second"]
BLOCK = 2 << 20  # bytes of each file that one block of the engine needs
# Reads both files as the engine's blocks would, and does nothing with them. Prints bytes, seconds, and its peak memory.
READER = """
import resource, sys, time
from merger.ahead import Ahead
from merger.budget import MOST_AHEAD
from merger.expression import ByteRange
from merger.remote_models import open_on_hub
from merger.storage.hub import own_access
files = [open_on_hub(name, own_access()).parts[0].source.files[0] for name in sys.argv[2:]]
block, size = int(sys.argv[1]), files[0].size
starts = range(0, size, block)
began = time.perf_counter()
ahead = Ahead(((s, [ByteRange(f, s, min(s + block, size), "U8") for f in files]) for s in starts), MOST_AHEAD)
for start in starts:
    ahead.begin(start)
    for file in files:
        position, stop = start, min(start + block, size)
        while position < stop:
            segment = ahead.covering(file, position)
            end = min(segment.stop, stop)
            segment.part(position, end)
            position = end
    ahead.done(start)
ahead.close()
seconds = time.perf_counter() - began
print(2 * size, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def by_ranges(environment: dict[str, str]) -> tuple[float, float]:
    """Gigabytes a second, and the peak of the process in MB."""
    command = [sys.executable, "-c", READER, str(BLOCK), *NAMES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    size, seconds, peak = map(float, done.stdout.split())
    return size / seconds / 1e9, peak / 1e6


def by_curl(server: Any) -> float:
    """Gigabytes a second of two downloads at once."""
    began = time.perf_counter()
    downloads = []
    for name in NAMES:
        url = f"{server.endpoint}/{name}/resolve/main/model.safetensors"
        token = f"Authorization: Bearer {server.token}"
        downloads.append(subprocess.Popen(["curl", "-sfL", "-H", token, "-o", os.devnull, url]))
    codes = [download.wait() for download in downloads]
    if any(codes):
        raise SystemExit("curl failed")
    seconds = time.perf_counter() - began
    return sum((folder / "model.safetensors").stat().st_size for folder in INPUTS) / seconds / 1e9


def merged(server: Any, environment: dict[str, str], place: Path, number: int) -> dict[str, Any]:
    """One `merger run` with `push:`; what it took, and what the Hub's log says of it."""
    recipe = place / "recipe.yaml"
    output = {"push": f"hf://me/merged-{number}", "shard_size": "500MB", "accept_license": True}
    recipe.write_text(json.dumps({"method": "average", "checkpoints": NAMES, "output": output}))
    server.clear_log()
    os.environ.update(environment)
    run, printed = measure(
        wrapped(str(BIN / "merger"), "run", str(recipe), "--json"), place / "nothing", [], cold=False
    )
    log = server.log()
    tensors = 2 * 2_200_096_768  # bytes of both models' tensors, all of which are used
    fetched = sum(entry.sent for entry in log if entry.origin == "cdn" and entry.method == "GET")
    resolves = sum(e.method == "HEAD" and e.path.endswith(".safetensors") for e in log)
    sent = sum(entry.received for entry in log if entry.method == "PUT")
    json.loads(printed)
    return {"wall": run.wall, "peak": run.peak, "fetched": fetched / tensors, "resolves": resolves, "sent": sent}


def main() -> None:
    from tests.hub_server.fixtures import environment, hub  # the path was just set

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=6)
    runs = parser.parse_args().runs
    for seed, folder in enumerate(INPUTS):
        make(folder, seed)
    with tempfile.TemporaryDirectory(dir=DATA) as temporary, hub(Path(temporary), process=True) as server:
        place = Path(temporary)
        for name, folder in zip(NAMES, INPUTS, strict=True):
            server.add_model(name, folder)
        variables = {**environment(server, place), "XDG_CACHE_HOME": str(place / "cache"), "HF_HUB_OFFLINE": "0"}
        pairs = [(by_ranges(variables), by_curl(server)) for _ in range(runs)]
        whole = [merged(server, variables, place, number) for number in range(min(3, runs))]
    text = table(pairs, whole)
    (HERE / "hub.md").write_text(text)
    (HERE / "hub.json").write_text(json.dumps({"reading": pairs, "merging": whole}, indent=1) + "\n")
    print(text)


def table(pairs: list[tuple[tuple[float, float], float]], whole: list[dict[str, Any]]) -> str:
    ranges, curl = (statistics.median(row) for row in zip(*((a[0], b) for a, b in pairs), strict=True))
    share = statistics.median(a[0] / b for a, b in pairs)
    peak = max(a[1] for a, _ in pairs)
    first = whole[0]
    wall, most = statistics.median(row["wall"] for row in whole), max(row["peak"] for row in whole)
    return "\n".join(
        [
            "# Reading two models of 1.1e9 parameters (bf16, 2.2 GB each) from a Hub on this machine",
            "",
            f"{platform.machine()}, {os.cpu_count()} processors, which the server shares; medians of {len(pairs)} "
            "alternating runs, peak memory of the whole process.",
            "",
            "| reading | GB/s | peak MB |",
            "|---|---|---|",
            f"| merger, by ranges | {ranges:.2f} | {peak:.0f} |",
            f"| curl, two connections | {curl:.2f} | |",
            "",
            f"Ranges reach **{share:.0%}** of the download.",
            "",
            f"`merger run` with `push:` to the same Hub: {wall:.1f} s (median of {len(whole)}), peak {most:.0f} MB, "
            f"1 GiB of buffers allowed; it fetched {first['fetched']:.4f} times the bytes of the tensors, with "
            f"{first['resolves']} resolves of 2 weight files, and sent {first['sent'] / 1e9:.2f} GB.",
            "",
        ]
    )


if __name__ == "__main__":
    main()

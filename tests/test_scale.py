"""A model of 10^12 parameters, of which only headers exist."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from merger.storage.safetensors import build_header

SHARDS, TENSORS = 200, 500  # 100,000 tensors of 10^7 parameters


def write_headers(folder: Path) -> None:
    folder.mkdir()
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        names = [f"model.layers.{shard}.mlp.experts.{i}.down_proj.weight" for i in range(TENSORS)]
        header = build_header(((name, "BF16", (2500, 4000)) for name in names), {"format": "pt"})
        with (folder / file).open("wb") as out:
            out.write(header)
            out.truncate(len(header) + TENSORS * 2500 * 4000 * 2)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")


# Linux counts the memory of whoever starts a program into that program's maximum: here it is a process that has none,
# not pytest, which may have gigabytes behind it.
STARTER = """
import os, sys
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
print(usage.ru_maxrss, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.slow
def test_a_plan_for_a_trillion_parameters_takes_little_memory(tmp_path):
    for i in range(3):
        write_headers(tmp_path / f"model-{i}")
    (tmp_path / "recipe.yaml").write_text(f"method: average\ncheckpoints: {tmp_path}/model-*\n")
    command = [sys.executable, "-m", "merger", "plan", str(tmp_path / "recipe.yaml"), "--json"]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-S", "-c", STARTER, *command], capture_output=True, text=True, check=True)
    peak = int(done.stderr.split()[-1])  # kibibytes
    sys.stdout.write(f"planned in {time.perf_counter() - began:.1f} s, {peak / 1024:.0f} MiB\n")
    plan = json.loads(done.stdout)
    assert (plan["parameters"], plan["tensors"], plan["read_bytes"]) == (10**12, 100_000, 6 * 10**12)
    assert peak < 1 << 20

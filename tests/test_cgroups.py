"""Limits of containers: from files as the kernel writes them, and from real control groups where they can be made."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from merger.cgroups import Groups
from merger.host import free_memory, processors

GIB = 1 << 30


def groups(folder: Path, own: str, **files: str) -> Groups:
    """Control groups whose files are `path__name=content`, with the process's own list of them."""
    (folder / "own").write_text(own)
    for name, content in files.items():
        path = folder / "mount" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return Groups(folder / "mount", folder / "own")


def stat(active: int, inactive: int, prefix: str = "") -> str:
    own = "active_file 1\ninactive_file 2\n" if prefix else ""
    return f"anon 77\nshmem 5\n{own}{prefix}inactive_file {inactive}\n{prefix}active_file {active}\n"


V2 = "0::/\n"
NESTED = "0::/kubepods/pod1/container\n"
V1 = "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/\n0::/\n"


@pytest.mark.parametrize(
    ("content", "share"),
    [("250000 100000\n", 2.5), ("50000 100000\n", 0.5), ("max 100000\n", None), ("", None), ("broken\n", None)],
)
def test_processors_of_version_2(tmp_path: Path, content: str, share: float | None) -> None:
    assert groups(tmp_path, V2, cpu_dot_max=content).processors() == share


def test_the_narrowest_group_above_counts(tmp_path: Path) -> None:
    files = {
        "kubepods__cpu_dot_max": "800000 100000\n",
        "kubepods__pod1__cpu_dot_max": "150000 100000\n",
        "kubepods__pod1__container__cpu_dot_max": "max 100000\n",
        "kubepods__memory_dot_max": f"{GIB}\n",
        "kubepods__memory_dot_current": f"{GIB // 4}\n",
        "kubepods__pod1__container__memory_dot_max": f"{8 * GIB}\n",
        "kubepods__pod1__container__memory_dot_current": "0\n",
    }
    found = groups(tmp_path, NESTED, **files)
    assert found.processors() == 1.5
    assert found.free_memory() == GIB - GIB // 4


def test_memory_of_version_2_counts_the_page_cache_as_free(tmp_path: Path) -> None:
    files = {
        "memory_dot_max": f"{4 * GIB}\n",
        "memory_dot_current": f"{3 * GIB}\n",
        "memory_dot_stat": stat(GIB // 2, GIB),
    }
    assert groups(tmp_path, V2, **files).free_memory() == 4 * GIB - (3 * GIB - GIB - GIB // 2)


@pytest.mark.parametrize(("allowed", "used", "free"), [("max", "5", None), ("10", "15", 0), ("10", "", None)])
def test_memory_without_a_limit_and_beyond_it(tmp_path: Path, allowed: str, used: str, free: int | None) -> None:
    found = groups(tmp_path, V2, memory_dot_max=f"{allowed}\n", memory_dot_current=f"{used}\n")
    assert found.free_memory() == free


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
def test_processors_of_version_1(tmp_path: Path, mount: str) -> None:
    files = {f"{mount}__docker__abc__cpu_dot_cfs_quota_us": "300000\n"}
    files[f"{mount}__docker__abc__cpu_dot_cfs_period_us"] = "200000\n"
    files[f"{mount}__cpu_dot_cfs_quota_us"] = "-1\n"
    files[f"{mount}__cpu_dot_cfs_period_us"] = "100000\n"
    assert groups(tmp_path, V1, **files).processors() == 1.5


def test_a_container_whose_group_has_another_path_inside(tmp_path: Path) -> None:
    """Without a namespace of its own it reads the host's path, and finds its files at the mount."""
    files = {
        "memory__memory_dot_limit_in_bytes": f"{2 * GIB}\n",
        "memory__memory_dot_usage_in_bytes": f"{GIB}\n",
        "memory__memory_dot_stat": stat(100, 200, "total_"),
    }
    assert groups(tmp_path, V1, **files).free_memory() == GIB + 300
    assert groups(tmp_path, "0::/../../other\n", cpu_dot_max="100000 100000\n").processors() == 1.0


def test_version_1_without_a_limit(tmp_path: Path) -> None:
    files = {
        "memory__docker__abc__memory_dot_limit_in_bytes": "9223372036854771712\n",
        "memory__docker__abc__memory_dot_usage_in_bytes": "5\n",
    }
    assert groups(tmp_path, V1, **files).free_memory() is None


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    nothing = Groups(tmp_path / "none", tmp_path / "none")
    assert nothing.processors() is None
    assert nothing.free_memory() is None
    assert processors(nothing) == len(os.sched_getaffinity(0))


def test_the_host_gives_the_smaller_of_machine_and_container(tmp_path: Path) -> None:
    files = {"cpu_dot_max": "10000 100000\n", "memory_dot_max": "5000\n", "memory_dot_current": "1000\n"}
    small = groups(tmp_path, V2, **files)
    assert processors(small) == 1
    assert free_memory(small) == 4000
    (tmp_path / "mount" / "cpu.max").write_text("99900000 100000\n")
    (tmp_path / "mount" / "memory.max").write_text(f"{1 << 59}\n")
    assert processors(small) == len(os.sched_getaffinity(0))
    assert 0 < free_memory(small) < 1 << 50


# ---- real control groups ------------------------------------------------------------------------------

LIMIT = 700 << 20


@pytest.fixture
def limited() -> Iterator[list[Path]]:
    """The folders of a real control group with half a processor's time and 700 MiB."""
    mount, name = Path("/sys/fs/cgroup"), f"merger-test-{uuid.uuid4().hex[:8]}"
    whole = (mount / "cgroup.controllers").exists()
    folders = [mount / name] if whole else [mount / "cpu" / name, mount / "memory" / name]
    v2 = {"cpu.max": "50000 100000", "memory.max": str(LIMIT)}
    v1 = {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000", "memory.limit_in_bytes": str(LIMIT)}
    try:
        for folder in folders:
            folder.mkdir()
        for file, content in (v2 if whole else v1).items():
            folder = folders[0] if whole or file.startswith("cpu") else folders[1]
            (folder / file).write_text(content)
    except OSError as error:
        for folder in folders:
            if folder.exists():
                folder.rmdir()
        pytest.skip(f"control groups cannot be made here: {error}")
    yield folders
    for folder in folders:
        folder.rmdir()


def test_a_real_limit_is_seen(limited: list[Path]) -> None:
    program = (
        "import sys, os\n"
        "for path in sys.argv[1:]: open(path, 'w').write(str(os.getpid()))\n"
        "from merger.host import free_memory, processors\n"
        "before = free_memory()\n"
        "taken = b'x' * (200 << 20)\n"
        "print(processors(), before, before - free_memory())"
    )
    joined = [str(folder / "cgroup.procs") for folder in limited]
    done = subprocess.run([sys.executable, "-c", program, *joined], check=True, capture_output=True, text=True)
    count, before, taken = map(int, done.stdout.split())
    assert count == 1
    assert LIMIT - (150 << 20) < before <= LIMIT
    assert 190 << 20 < taken < 250 << 20

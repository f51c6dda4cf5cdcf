"""The whole flow through the real command: interrupted, resumed, refused, complete."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import as_float64, bfloat16, read_raw, write_model

SHARDS = 24


def merger(*arguments: object, cwd: Path, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "merger", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with two models of 200 MB of random bits that are all finite BF16, and a recipe."""
    folder = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        tensors = {}
        for i in range(SHARDS):
            bits = rng.integers(0, 0x7F00, 4_000_000, dtype=np.uint16)
            tensors[f"model.layers.{i}.weight"] = ("BF16", (2000, 2000), bits.tobytes())
        write_model(folder / name, tensors, {"model_type": "llama"}, side_files={"tokenizer.json": "{}"})
    recipe = "method: average\ncheckpoints: [a, b]\nweights: [0.25, 0.75]\noutput: {shard_size: 8MB}\n"
    (folder / "recipe.yaml").write_text(recipe)
    return folder


@pytest.fixture(scope="module")
def undisturbed(models) -> dict[str, bytes]:
    done = merger("run", "recipe.yaml", "-o", "undisturbed", cwd=models)
    assert done.returncode == 0, done.stderr
    return weights(models / "undisturbed")


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of every shard that has a receipt."""
    names = [path.name.removesuffix(".json") for path in folder.glob(".merger/model-*.json")]
    return {name: ((folder / name).stat().st_ino, (folder / name).stat().st_mtime_ns) for name in names}


# The command on a disk that becomes slow after some shards: a run of these sizes is over in less time than it takes to
# look at it from outside.
SLOWLY = """
import itertools, runpy, signal, sys, time
from merger import engine
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
write, count = engine.write_receipt, itertools.count(1)
def write_slowly(*arguments):
    write(*arguments)
    time.sleep(0.5 * (next(count) >= {wanted}))
engine.write_receipt = write_slowly
sys.argv = ["merger", "run", "recipe.yaml", "-o", {output!r}, "--threads", "1"]
runpy.run_module("merger", run_name="__main__")
"""


def stop_after_some_shards(models: Path, output: str, with_signal: int) -> subprocess.Popen[str]:
    """Start a run, wait for a random number of receipts, and send a signal."""
    wanted = random.Random(output).randrange(1, SHARDS // 2)
    command = [sys.executable, "-c", SLOWLY.format(wanted=wanted, output=output)]
    child = subprocess.Popen(command, cwd=models, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    for line in child.stderr:
        wanted -= line.startswith("finished")
        if not wanted:
            break
    child.send_signal(with_signal)
    return child


def check_that_it_goes_on(models: Path, output: str, undisturbed: dict[str, bytes]) -> None:
    finished = identities(models / output)
    assert 0 < len(finished) < SHARDS
    done = merger("run", "recipe.yaml", "-o", output, cwd=models)
    assert done.returncode == 0, done.stderr
    assert weights(models / output) == undisturbed
    after = {
        name: ((models / output / name).stat().st_ino, (models / output / name).stat().st_mtime_ns) for name in finished
    }
    assert after == finished
    assert not (models / output / ".merger").exists()


def test_the_result_is_the_weighted_sum(models, undisturbed):
    sources = [read_raw(models / name / "model.safetensors") for name in ("a", "b")]
    for path in (models / "undisturbed").glob("*.safetensors"):
        for name, (dtype, _, content) in read_raw(path).items():
            a, b = (as_float64(source[name][2], "BF16") for source in sources)
            exact = 0.25 * a + 0.75 * b
            half_ulp = 2.0**-9 * 2.0 ** np.floor(np.log2(np.maximum(abs(exact), 2.0**-126)) + 1)
            assert dtype == "BF16"
            assert np.all(abs(as_float64(content, dtype) - exact) <= half_ulp)


@pytest.mark.parametrize("options", [("--threads", 1), ("--threads", 4), ("--memory", "64MiB"), ("--memory", "4GiB")])
def test_the_bytes_do_not_depend_on_threads_and_memory(models, undisturbed, options):
    output = "same" + "".join(map(str, options))
    assert merger("run", "recipe.yaml", "-o", output, *options, cwd=models).returncode == 0
    assert weights(models / output) == undisturbed


@pytest.mark.parametrize("attempt", range(3))
def test_a_killed_run_goes_on_after_its_last_finished_shard(models, undisturbed, attempt):
    child = stop_after_some_shards(models, f"killed-{attempt}", signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    check_that_it_goes_on(models, f"killed-{attempt}", undisturbed)


@pytest.mark.parametrize("with_signal", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on(models, undisturbed, with_signal):
    child = stop_after_some_shards(models, f"stopped-{with_signal}", with_signal)
    complaints = child.communicate()[1]
    assert child.returncode == 130
    assert "run the same command again" in complaints
    assert "Traceback" not in complaints
    check_that_it_goes_on(models, f"stopped-{with_signal}", undisturbed)


def test_a_disk_that_fills_up_while_writing_is_an_error_and_the_next_run_goes_on(models, undisturbed):
    limit = "import resource,sys,runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, 6_000_000)); "
    program = (
        limit + "sys.argv=['merger','run','recipe.yaml','-o','full']; runpy.run_module('merger', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=models, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "cannot reserve" in done.stderr
    assert "Traceback" not in done.stderr
    assert merger("run", "recipe.yaml", "-o", "full", cwd=models).returncode == 0
    assert weights(models / "full") == undisturbed


def test_a_finished_result_is_left_alone(models, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in (models / "undisturbed").iterdir()}
    done = merger("run", "recipe.yaml", "-o", "undisturbed", cwd=models)
    assert (done.returncode, "nothing was written" in done.stdout) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in (models / "undisturbed").iterdir()} == before


def test_a_finished_result_of_another_recipe_is_not_overwritten(models, undisturbed):
    done = merger("run", "recipe.yaml", "-o", "undisturbed", "--set", "weights=[1,2]", cwd=models)
    assert done.returncode == 2
    assert "another recipe" in done.stderr
    assert weights(models / "undisturbed") == undisturbed


def test_a_source_that_changes_during_the_work_is_noticed(models):
    child = stop_after_some_shards(models, "changed", signal.SIGSTOP)
    path = models / "b" / "model.safetensors"
    times = path.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    try:
        child.send_signal(signal.SIGCONT)
        child.communicate()
        done = merger("run", "recipe.yaml", "-o", "changed", cwd=models)
    finally:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert done.returncode == 2  # the unfinished work, or the finished result, is of the sources as they were
    assert "another recipe" in done.stderr


# ---- what a result consists of ------------------------------------------------------------------------


def small(folder: Path, values: list[np.ndarray], **options) -> None:
    for i, array in enumerate(values):
        write_model(folder / f"step-{i + 1}", {"model.norm.weight": array}, {"model_type": "llama"}, **options)
    (folder / "recipe.yaml").write_text("method: average\ncheckpoints: step-*\noutput: {path: out}\n")


def test_a_result_has_everything_that_a_model_needs_and_no_code(tmp_path):
    side_files = {
        "tokenizer.json": "{}",
        "chat_template.jinja": "x",
        "modeling.py": "",
        "optimizer.pt": "",
        "LICENSE": "y",
    }
    small(tmp_path, [np.ones(8, np.float32)] * 2, side_files=side_files)
    done = merger("run", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "distances.png",
        "merger.json",
        "model.safetensors",
        "report.html",
        "tokenizer.json",
        "weights.png",
    ]
    manifest = json.loads((tmp_path / "out" / "merger.json").read_text())
    assert [source["weight"] for source in manifest["sources"]] == [0.5, 0.5]
    assert any("optimizer.pt" in note for note in manifest["notes"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page


def test_nan_in_an_input_is_a_warning(tmp_path):
    small(tmp_path, [np.array([1, np.nan, np.inf], np.float32), np.ones(3, np.float32)])
    done = merger("run", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0
    assert "model.norm.weight: 2 values are NaN or infinite because a source's are" in done.stderr
    assert json.loads((tmp_path / "out" / "merger.json").read_text())["non_finite"] == {"model.norm.weight": 2}
    assert merger("verify", "out", cwd=tmp_path).returncode == 0


def test_nan_in_an_input_is_refused_when_strict(tmp_path):
    small(tmp_path, [np.ones(3, np.float32), np.array([1, np.nan, 1], np.float32)])
    done = merger("run", "recipe.yaml", "--strict", cwd=tmp_path)
    assert done.returncode == 2
    assert "step-2/model.safetensors: tensor 'model.norm.weight': holds NaN or infinity" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_result_too_large_for_its_dtype_fails_and_leaves_nothing(tmp_path):
    small(tmp_path, [np.full(3, 7e4, np.float32)] * 2)
    done = merger("run", "recipe.yaml", "--set", "output.dtype=float16", cwd=tmp_path)
    assert done.returncode == 1
    assert "model.norm.weight: 3 values are too large" in done.stderr
    assert "wider" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_that_averages_imports_neither_torch_nor_transformers(tmp_path):
    small(tmp_path, [np.ones(8, np.float32), np.zeros(8, np.float32)])
    program = (
        "import sys, runpy, atexit\n"
        "atexit.register(lambda: print(sorted({'torch', 'transformers', 'ray', 'mergekit'} & sys.modules.keys())))\n"
        "sys.argv = ['merger', 'run', 'recipe.yaml']\n"
        "runpy.run_module('merger', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_transformers_loads_the_average_of_a_run(llama_run, tmp_path):
    run = llama_run("bfloat16")
    done = merger("average", run / "step-*", "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    checked = merger("verify", "out", "--load", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "no key missing" in checked.stdout


def test_many_sources_fit_into_little_memory(tmp_path):
    rng = np.random.default_rng(1)
    values = [rng.standard_normal(50_000).astype(np.float32) for _ in range(60)]
    small(tmp_path, values)
    done = merger("run", "recipe.yaml", "--memory", "4MiB", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = read_raw(tmp_path / "out" / "model.safetensors")["model.norm.weight"][2]
    exact = sum(value.astype(np.float64) for value in values) / 60
    np.testing.assert_allclose(as_float64(content, "F32"), exact, rtol=2.0**-24, atol=1e-12)


def test_bfloat16_sources_can_become_float32(tmp_path):
    for i in (1, 2):
        write_model(
            tmp_path / f"step-{i}", {"x": bfloat16(np.arange(8.0) + i)}, {"model_type": "llama", "dtype": "bfloat16"}
        )
    (tmp_path / "recipe.yaml").write_text("method: average\ncheckpoints: step-*\noutput: {path: out, dtype: float32}\n")
    assert merger("run", "recipe.yaml", cwd=tmp_path).returncode == 0
    dtype, _, content = read_raw(tmp_path / "out" / "model.safetensors")["x"]
    assert (dtype, as_float64(content, dtype).tolist()) == ("F32", [1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"

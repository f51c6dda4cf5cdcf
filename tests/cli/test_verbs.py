"""The verbs that look and do not write, and the flags of `merger average`; with their JSON."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from merger.cli.main import VERBS, merger_command
from merger.methods import METHODS
from merger.recipe import parse_document
from tests.checkpoints import bfloat16, write_header, write_model


def merger(*arguments: object) -> Result:
    return CliRunner().invoke(merger_command, [str(argument) for argument in arguments])


@pytest.fixture
def run_folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for step in (9, 10, 11):
        tensors = {
            "model.layers.0.weight": rng.standard_normal(1000).astype(np.float32),
            "model.norm.weight": bfloat16(np.ones(4)),
        }
        write_model(tmp_path / f"step-{step}", tensors, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    return tmp_path


# ---- main ---------------------------------------------------------------------------------------------


def test_help_lists_the_verbs():
    shown = merger("--help").output
    assert all(verb in shown for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb):
    assert merger(verb, "--help").exit_code == 0


def test_a_misspelt_verb_is_recognised():
    result = merger("rnu")
    assert result.exit_code == 2
    assert "Did you mean 'run'?" in result.output


def test_importing_the_package_or_asking_for_help_loads_nothing_heavy():
    heavy = "{'numpy', 'numba', 'pydantic', 'torch', 'rich'}"
    for statement in ("import merger", "import merger.cli.main"):
        program = f"{statement}; import sys; print({heavy} & sys.modules.keys())"
        shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        assert shown.strip() == "set()"


# ---- methods ------------------------------------------------------------------------------------------


def test_methods_are_listed():
    listed = merger("methods").output
    assert [line.split()[0] for line in listed.splitlines()] == list(METHODS)
    assert json.loads(merger("methods", "--json").output).keys() == METHODS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_shows_its_fields_its_paper_and_an_example(name):
    shown = merger("methods", name).output
    assert METHODS[name].paper
    assert f"Source: {METHODS[name].paper}" in shown
    assert parse_document(shown.split("Example\n")[1]).recipe.method == name
    assert "description" in json.dumps(json.loads(merger("methods", name, "--json").output))


def test_an_unknown_method_is_recognised(run_folder):
    done = subprocess.run(
        [sys.executable, "-m", "merger", "methods", "lwa"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, "Did you mean 'lawa'?" in done.stderr) == (2, True)


# ---- inspect, plan ------------------------------------------------------------------------------------


def test_inspect_shows_what_a_model_is(run_folder):
    shown = merger("inspect", run_folder / "step-9").output
    assert "LlamaForCausalLM" in shown
    assert "BF16: 1 tensors" in shown
    data = json.loads(merger("inspect", run_folder / "step-9", "--json").output)
    assert (data["parameters"], data["step"]) == (1004, 9)
    assert data["tensors"]["model.norm.weight"] == {"dtype": "BF16", "shape": [4]}
    assert "model.norm.weight" in merger("inspect", run_folder / "step-9", "--tensors").output


def test_a_plan_needs_no_weight(tmp_path):
    """The data of these files was never written: they are holes."""
    for step in (1, 2):
        folder = tmp_path / f"step-{step}"
        folder.mkdir()
        write_header(
            folder / "model.safetensors", {"x": {"dtype": "F32", "shape": [1 << 28], "data_offsets": [0, 1 << 30]}}
        )
        with (folder / "model.safetensors").open("ab") as file:
            file.truncate(file.tell() + (1 << 30))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: average\ncheckpoints: {tmp_path}/step-*\noutput: {{path: {tmp_path}/out}}\n")
    data = json.loads(merger("plan", recipe, "--json").output)
    assert (data["read_bytes"], data["parameters"], len(data["shards"])) == (2 << 30, 1 << 28, 1)
    assert [source["weight"] for source in data["sources"]] == [0.5, 0.5]
    shown = merger("plan", recipe).output
    assert "2.15 GB" in shown
    assert "step 2" in shown
    assert not (tmp_path / "out").exists()


def test_a_plan_tells_the_verdict_over_licences(run_folder):
    for step, license in ((9, "llama3.1"), (10, "gemma"), (11, "mit")):
        (run_folder / f"step-{step}" / "README.md").write_text(f"---\nlicense: {license}\n---\n")
    recipe = run_folder / "recipe.yaml"
    recipe.write_text(f"method: average\ncheckpoints: {run_folder}/step-*\n")
    found = json.loads(merger("plan", recipe, "--json").output)["license"]
    assert (found["verdict"], found["accepted"]) == ("ask", False)
    assert found["fields"]["license_name"] == "llama3.1-and-gemma"
    shown = merger("plan", recipe).output
    assert "license     llama3.1-and-gemma, to be accepted with --accept-license" in shown
    assert "no one licence covers" in shown
    assert "llama3.1-and-gemma, accepted" in merger("plan", recipe, "--accept-license").output
    (run_folder / "step-11" / "README.md").write_text("---\nlicense: cc-by-nd-4.0\n---\n")
    assert "license     not to be passed on" in merger("plan", recipe).output


def test_accepted_licences_stand_in_the_recipe_that_flags_print(run_folder):
    result = merger("average", run_folder / "step-*", "--accept-license", "-o", run_folder / "out")
    assert result.exit_code == 0, result.output
    assert "accept_license: true" in result.output
    assert json.loads((run_folder / "out" / "merger.json").read_text())["recipe"]["output"]["accept_license"] is True


# ---- average, verify, diff ----------------------------------------------------------------------------


def test_average_prints_the_recipe_that_it_ran(run_folder):
    first, second = run_folder / "first", run_folder / "second"
    result = merger("average", run_folder / "step-*", "--method", "lawa", "--k", 2, "-o", first)
    assert result.exit_code == 0, result.output
    recipe = run_folder / "recipe.yaml"
    recipe.write_text(result.output.split("\n\n")[0])
    assert yaml.safe_load(recipe.read_text())["k"] == 2
    assert merger("run", recipe, "-o", second).exit_code == 0
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "merger.json").exists()


def test_average_takes_weights_and_other_fields(run_folder):
    folders = [run_folder / f"step-{step}" for step in (9, 10)]
    options = [
        "--weights",
        "3,1",
        "--field",
        "normalize=false",
        "--dtype",
        "float32",
        "-o",
        run_folder / "out",
        "--json",
    ]
    data = json.loads(merger("average", *folders, *options).output)
    assert all(check["passed"] for check in data["checks"])
    manifest = json.loads((run_folder / "out" / "merger.json").read_text())
    assert [source["weight"] for source in manifest["sources"]] == [3.0, 1.0]
    assert manifest["recipe"]["output"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--weights", "1,x", "-o", "out"], "is not a list of numbers"),
        (["--field", "k", "-o", "out"], "must look like field=value"),
        ([], "Name the folder"),
        (["--memory", "much", "-o", "out"], "is not a size"),
    ],
)
def test_wrong_flags_of_average_are_refused(run_folder, options, problem):
    command = [sys.executable, "-m", "merger", "average", "step-9", *options]
    done = subprocess.run(command, cwd=run_folder, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert problem in done.stderr
    assert not (run_folder / "out").exists()


def test_verify_tells_what_it_found(run_folder):
    assert "passed  finite" in merger("verify", run_folder / "step-9").output
    write_model(run_folder / "bad", {"x": np.array([np.nan], np.float32)}, {})
    result = merger("verify", run_folder / "bad", "--json")
    assert result.exit_code == 1
    assert [check["passed"] for check in json.loads(result.output)] == [True, False]


def test_diff_measures_layer_by_layer_and_draws(run_folder):
    picture = run_folder / "diff.png"
    a, b = run_folder / "step-9", run_folder / "step-10"
    data = json.loads(merger("diff", a, b, "--json", "--picture", picture).output)
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal(1000).astype(np.float32).astype(np.float64) for _ in range(2))
    row = data["rows"]["model.layers.0"]
    assert row["relative"] == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-12)
    assert row["cosine"] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)
    assert row["largest"] == abs(x - y).max()
    assert data["rows"]["model.norm"] == {"elements": 4, "relative": 0.0, "cosine": 1.0, "largest": 0.0}
    assert picture.read_bytes().startswith(b"\x89PNG")
    write_model(run_folder / "more", {"only.here": np.ones(1, np.float32)}, {})
    shown = merger("diff", a, run_folder / "more", "--tensors").output
    assert "only in b: only.here" in shown
    assert "total" in shown


def test_upcycle_and_expand_print_their_recipe_and_prove_it(tmp_path, llama_run):
    source = llama_run() / "step-300"
    for verb, flags in (("upcycle", ["--experts", 4]), ("expand", ["--groups", 2])):
        done = merger(verb, source, *flags, "-o", tmp_path / verb)
        assert done.exit_code == 0, done.output
        assert f"method: {verb}" in done.output
        assert "passed  parity: logits" in done.output
        checked = merger("verify", tmp_path / verb, "--load", "--parity")
        assert checked.exit_code == 0, checked.output
        assert checked.output.count("passed  parity") == 1


def test_parity_of_what_is_no_surgery_is_refused(tmp_path, llama_run):
    source = llama_run() / "step-300"
    assert "it is not a result of merger" in str(merger("verify", source, "--parity").exception)
    assert merger("average", source, "-o", tmp_path / "out").exit_code == 0
    assert "is no result of surgery" in str(merger("verify", tmp_path / "out", "--parity").exception)

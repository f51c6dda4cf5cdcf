"""The comparison of Model Ratatouille (arXiv 2212.10445, table 1) on digits, with `merger` doing all of it.

A small transformer is trained on plain digits. Auxiliary tasks are other questions about digits that look otherwise;
the target task is digits in three domains; what counts is accuracy in two domains that no training on the target has
seen. For each seed:

    single         the best of the target fine-tunes from the base, by validation in the domain
    inter-training the best of the target fine-tunes from auxiliary models
    fusing         the best of fine-tunes from random means of all of them
    soup           the mean of all fine-tunes from the base (DiWA), uniform and greedy
    ratatouille    the mean of all fine-tunes from the base and the auxiliary models, uniform and greedy

Prints a table and writes it with a picture: `python examples/ratatouille/ratatouille.py [--seeds 5] [--work FOLDER]`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
from digits import PATTERNS, write_task
from pictures import draw

HERE = Path(__file__).parent
MERGER = [sys.executable, "-m", "merger"]
TARGET, UNSEEN = ("left", "noisy", "faint"), ("right", "moved")
RUNS = 8
SETTINGS = {
    "task": "classification",
    "runs": RUNS,
    "steps": 200,
    "probe_steps": 40,
    "extra_head_steps": 20,
    "learning_rates": [3e-4, 5e-4, 8e-4],
    "probe_learning_rate": 1e-2,
}
CHOOSER = {"task": "classification", "data": "data/validation.jsonl", "batch_size": 256}
ORDER = (
    *("single", "inter-training", "fusing", "soup, uniform", "soup, greedy"),
    *("ratatouille, uniform", "ratatouille, greedy"),
)


def prepare(work: Path) -> None:
    """The data of all tasks and the base model; what is there is kept."""
    if (work / "base" / "config.json").exists():
        return
    (work / "data").mkdir(parents=True, exist_ok=True)
    tasks: list[tuple[str, slice, Sequence[str], Callable[[int], str], int]] = [
        ("base", slice(0, 500), ["plain", "moved"], str, 6),
        ("parity", slice(500, 700), ["right", "plain"], lambda digit: ("even", "odd")[digit % 2], 1),
        ("size", slice(700, 900), ["moved", "inverted"], lambda digit: ("low", "high")[digit > 4], 1),
        ("round", slice(900, 1100), ["noisy", "moved"], lambda digit: str(digit in (0, 6, 8, 9)), 1),
        ("target", slice(1100, 1250), TARGET, str, 1),
        ("validation", slice(1250, 1400), TARGET, str, 1),
        ("unseen", slice(1400, 1797), UNSEEN, str, 1),
    ]
    for seed, (name, images, domains, label, copies) in enumerate(tasks):
        write_task(work / "data" / f"{name}.jsonl", images, domains, label, seed, copies)
    pretrain(work)


def pretrain(work: Path) -> None:
    """A model of plain digits, by the same stages that fine-tune: from random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": PATTERNS + 1, "pad_token_id": PATTERNS, "max_position_embeddings": 16}
    config = BertConfig(**sizes, **tokens, num_labels=10)
    BertForSequenceClassification(config).save_pretrained(work / "random")
    training = {**SETTINGS, "target": "data/base.jsonl", "folder": "pretraining", "runs": 1, "steps": 3000}
    training |= {"probe_steps": 1, "learning_rates": [1e-3], "dropouts": [0.1], "weight_decays": [0.01]}
    run(work, "base", {"method": "ratatouille", "base": "random", "training": training})


def run(work: Path, output: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """Make a recipe's result in `output` with `merger run`; its manifest."""
    path = work / f"{output.replace('/', '-')}.yaml"
    path.write_text(yaml.safe_dump({**recipe, "output": {"path": output}}, sort_keys=False))
    subprocess.run([*MERGER, "run", path.name], cwd=work, check=True, stdout=subprocess.DEVNULL, env=environment(work))
    manifest: dict[str, Any] = json.loads((work / output / "merger.json").read_text())
    return manifest


def environment(work: Path) -> dict[str, str]:
    """Scores are remembered in the work folder."""
    return {**os.environ, "XDG_CACHE_HOME": str(work / "cache"), "TRANSFORMERS_VERBOSITY": "error"}


def accuracies(work: Path, data: str, models: Sequence[str]) -> dict[str, float]:
    """The accuracy of models, by `merger evaluate`."""
    command = [*MERGER, "evaluate", *models, "--task", "classification", "--data", f"data/{data}.jsonl", "--json"]
    command += ["--batch-size", "256"]
    done = subprocess.run(command, cwd=work, check=True, stdout=subprocess.PIPE, text=True, env=environment(work))
    return {model: row["metrics"]["accuracy"] for model, row in json.loads(done.stdout).items()}


def compare(work: Path, seed: int) -> dict[str, float]:
    """Accuracy in the unseen domains of every strategy, by its name."""
    auxiliary = {name: f"data/{name}.jsonl" for name in ("parity", "size", "round")}
    plain = {**SETTINGS, "target": "data/target.jsonl", "seed": seed, "folder": f"seed-{seed}/stages"}
    recycled = {**plain, "auxiliary": auxiliary}
    greedy = {"selection": "greedy", "select_on": CHOOSER}
    models, runs = {}, {}
    for name, training, more in (
        ("soup, uniform", plain, {}),
        ("soup, greedy", plain, greedy),
        ("ratatouille, uniform", recycled, {}),
        ("ratatouille, greedy", recycled, greedy),
        ("fused", {**recycled, "start": "fused"}, {}),
    ):
        models[name] = f"seed-{seed}/{name.replace(', ', '-')}"
        made = run(work, models[name], {"method": "ratatouille", "base": "base", "training": training, **more})
        runs[name] = made["recipe"]["targets"]
    models["single"] = best(work, runs["soup, uniform"])
    models["inter-training"] = best(work, [one for one in runs["ratatouille, uniform"] if "from-base" not in one])
    models["fusing"] = best(work, runs["fused"])
    found = accuracies(work, "unseen", list(models.values()))
    return {name: found[models[name]] for name in ORDER}


def best(work: Path, runs: Sequence[str]) -> str:
    """The run that is most accurate in validation."""
    found = accuracies(work, "validation", runs)
    return max(runs, key=lambda run: found[run])


T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}  # Student, by n - 1


def table(found: list[dict[str, float]]) -> str:
    """Means over seeds with 95 % intervals (Student), and the difference to `single` seed by seed."""
    lines = [f"| strategy | unseen domains, % | against single, {len(found)} seeds |", "|---|---|---|"]
    for name in ORDER:
        values = [100 * row[name] for row in found]
        differences = [100 * (row[name] - row["single"]) for row in found]
        beside = f"{statistics.mean(differences):+.1f} ± {interval(differences):.1f}" if name != "single" else ""
        lines.append(f"| {name} | {statistics.mean(values):.1f} ± {interval(values):.1f} | {beside} |")
    return "\n".join([*lines, ""])


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a mean."""
    n = len(values)
    return T95.get(n - 1, 2.0) * statistics.stdev(values) / n**0.5 if n > 1 else float("nan")


def lines_of(work: Path, seed: int) -> list[dict[str, Any]]:
    """The accuracy along the lines between fine-tunes that started from different models."""
    manifest = json.loads((work / f"seed-{seed}/ratatouille-uniform/merger.json").read_text())
    runs = manifest["recipe"]["targets"][:4]
    command = [*MERGER, "connect", *runs, "--points", "7", "--task", "classification", "--batch-size", "256", "--json"]
    command += ["--data", "data/unseen.jsonl"]
    done = subprocess.run(command, cwd=work, check=True, stdout=subprocess.PIPE, text=True, env=environment(work))
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=HERE / "work")
    options = parser.parse_args()
    logging.set_verbosity_error()
    began = time.monotonic()
    work = options.work.resolve()
    prepare(work)
    found = []
    for seed in range(options.seeds):
        found.append(compare(work, seed))
        print(
            f"seed {seed}: " + ", ".join(f"{name} {100 * value:.1f}" for name, value in found[-1].items()), flush=True
        )
    lines = lines_of(work, 0)
    text = table(found)
    (work / "results.json").write_text(json.dumps({"seeds": found, "lines": lines}, indent=1))
    (work / "results.md").write_text(text)
    draw(work / "results.png", [(name, [100 * row[name] for row in found]) for name in ORDER], lines)
    print(f"\n{text}\n{time.monotonic() - began:.0f} s; picture: {work / 'results.png'}")


if __name__ == "__main__":
    main()

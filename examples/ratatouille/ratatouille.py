"""The comparison of Model Ratatouille (arXiv 2212.10445, table 1) on digits and texts, with `merger` doing all of it.

A small model is pre-trained; auxiliary tasks and a target come from other domains than what it is measured on
(`digits.py`, `texts.py`). For each seed:

    single         the best of the target fine-tunes from the base, by validation in the target's domains
    inter-training the best of the target fine-tunes from auxiliary models
    fusing         the best of fine-tunes from random means of all of them
    soup           the mean of all fine-tunes from the base (DiWA), uniform and greedy
    ratatouille    the mean of all fine-tunes from the base and the auxiliary models, uniform and greedy

Prints tables and writes them with a picture: `python examples/ratatouille/ratatouille.py [--seeds 5] [--work FOLDER]`.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
import digits
import texts
from pictures import draw
from study import Study

HERE = Path(__file__).parent
RUNS = 8
ORDER = (
    *("single", "inter-training", "fusing", "soup, uniform", "soup, greedy"),
    *("ratatouille, uniform", "ratatouille, greedy"),
)
Found = dict[str, float]


def compare(study: Study, seed: int) -> Found:
    """What every strategy measures in the unseen domains, by its name."""
    auxiliary = {name: study.data(name) for name in study.auxiliary}
    plain = {**study.training, "runs": RUNS, "target": study.data("target"), "seed": seed}
    plain["folder"] = f"seed-{seed}/stages"
    recycled = {**plain, "auxiliary": auxiliary}
    greedy = {"selection": "greedy", "select_on": {**study.evaluation, "data": study.data("validation")}}
    models, runs = {}, {}
    for name, training, more in (
        ("soup, uniform", plain, {}),
        ("soup, greedy", plain, greedy),
        ("ratatouille, uniform", recycled, {}),
        ("ratatouille, greedy", recycled, greedy),
        ("fusing", {**recycled, "start": "fused"}, {}),
    ):
        models[name] = f"seed-{seed}/{name.replace(', ', '-')}"
        made = study.run(models[name], {"method": "ratatouille", "base": "base", "training": training, **more})
        runs[name] = made["recipe"]["targets"]
    runs["single"] = runs["soup, uniform"]
    runs["inter-training"] = [run for run in runs["ratatouille, uniform"] if "from-base" not in run]
    singles = ("single", "inter-training", "fusing")
    validated = study.scores("validation", sorted({run for name in singles for run in runs[name]}))
    models |= {name: study.best(validated, runs[name]) for name in singles}
    found = study.scores("unseen", sorted(set(models.values())))
    return {name: study.factor * found[models[name]] for name in ORDER}


T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}  # Student, by n - 1


def table(study: Study, found: Sequence[Found]) -> str:
    """Means over seeds with 95 % intervals (Student), and the difference to `single` seed by seed."""
    places = study.places
    better = "less is better" if study.lower_is_better else "more is better"
    lines = [
        f"| strategy | {study.name} in unseen domains, {study.unit} ({better}) | against single, {len(found)} seeds |",
        "|---|---|---|",
    ]
    for name in ORDER:
        values = [row[name] for row in found]
        against = [row[name] - row["single"] for row in found]
        beside = f"{statistics.mean(against):+.{places}f} ± {interval(against):.{places}f}" if name != "single" else ""
        lines.append(f"| {name} | {statistics.mean(values):.{places}f} ± {interval(values):.{places}f} | {beside} |")
    return "\n".join([*lines, ""])


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a mean."""
    n = len(values)
    return T95.get(n - 1, 2.0) * statistics.stdev(values) / n**0.5 if n > 1 else float("nan")


def lines_of(study: Study) -> list[dict[str, Any]]:
    """What is measured along the lines between fine-tunes that started from different models."""
    manifest = json.loads((study.work / "seed-0/ratatouille-uniform/merger.json").read_text())
    return study.lines("unseen", manifest["recipe"]["targets"][: 1 + len(study.auxiliary)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=HERE / "work")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    began = time.monotonic()
    work = options.work.resolve()
    studies = (digits.study(work / "digits"), texts.study(work / "texts"))
    processors = sorted(os.sched_getaffinity(0))
    free = iter(processors)
    # Each thread runs commands on a processor of its own, which their processes inherit.
    with ThreadPoolExecutor(len(processors), initializer=lambda: os.sched_setaffinity(0, {next(free)})) as pool:
        list(pool.map(Study.pretrain, studies))
        jobs = [(study, seed) for study in studies for seed in range(options.seeds)]
        found: dict[str, list[Found]] = {study.name: [] for study in studies}
        for (study, seed), row in zip(jobs, pool.map(lambda job: compare(*job), jobs), strict=True):
            found[study.name].append(row)
            told = ", ".join(f"{name} {value:.{study.places}f}" for name, value in row.items())
            print(f"{study.name}, seed {seed}: {told} ({time.monotonic() - began:.0f} s)", flush=True)
        results = [
            (study, found[study.name], lines) for study, lines in zip(studies, pool.map(lines_of, studies), strict=True)
        ]
    tables = [table(study, rows) for study, rows, _ in results]
    kept = {study.name: {"seeds": rows, "lines": lines} for study, rows, lines in results}
    (work / "results.json").write_text(json.dumps(kept, indent=1))
    (work / "results.md").write_text("\n".join(tables))
    draw(work / "results.png", ORDER, results)
    print("\n".join(["", *tables, f"{time.monotonic() - began:.0f} s; picture: {work / 'results.png'}"]))


if __name__ == "__main__":
    main()

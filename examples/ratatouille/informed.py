"""Do statistics help? Three fine-tunes of one small language model, each on the docstrings of another package, merged
plainly, by Fisher information and by regression (docs/statistics.md).

What counts is the loss on held-out docstrings of all three, whose mean over the packages is compared. Prints a table:
`python examples/ratatouille/informed.py [--seeds 5] [--work FOLDER]`.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import texts
from study import Study

HELD_OUT = 40_000  # characters of each package, of 200,000
KINDS = {"fisher": "fisher", "regmean": "gram"}
MERGES: dict[str, dict[str, Any]] = {
    "plain mean": {"method": "soup"},
    "task arithmetic, scale 0.4": {"method": "task_arithmetic", "base": "base", "scale": 0.4},
    "task arithmetic, scale 0.5": {"method": "task_arithmetic", "base": "base", "scale": 0.5},
    "task arithmetic, scale 0.6": {"method": "task_arithmetic", "base": "base", "scale": 0.6},
    "task arithmetic, scale 0.8": {"method": "task_arithmetic", "base": "base", "scale": 0.8},
    "fisher": {"method": "fisher"},
    "fisher, floor 0.01": {"method": "fisher", "floor": 0.01},
    "fisher, floor 1": {"method": "fisher", "floor": 1.0},
    "fisher, not normalized": {"method": "fisher", "normalize": False},
    "regmean, alpha 0.9": {"method": "regmean"},
    "regmean, alpha 0.5": {"method": "regmean", "alpha": 0.5},
    "regmean, alpha 1": {"method": "regmean", "alpha": 1.0},
}


def split(study: Study) -> None:
    """A training and a held-out text of every package."""
    for name in study.auxiliary:
        text = json.loads((study.work / study.data(name)).read_text())["text"]
        for part, content in (("train", text[:-HELD_OUT]), ("held-out", text[-HELD_OUT:])):
            (study.work / study.data(f"{part}-{name}")).write_text(json.dumps({"text": content}))


def fine_tuned(study: Study, name: str, seed: int) -> str:
    """A fine-tune of the base on a package."""
    output = f"informed/{seed}/{name}"
    training = {**study.training, "target": study.data(f"train-{name}"), "runs": 1, "seed": seed}
    training["folder"] = f"{output}-stages"
    study.run(output, {"method": "ratatouille", "base": "base", "training": training})
    for kind in KINDS.values():
        folder = f"informed/{seed}/{kind}-{name}"
        if not (study.work / folder).exists():
            options = ["--context", str(texts.CONTEXT), "--limit", "300", "-o", folder]
            study.command(["statistics", output, "--kind", kind, "--data", study.data(f"train-{name}"), *options])
    return output


def merged(study: Study, title: str, fields: dict[str, Any], models: dict[str, str], seed: int) -> str:
    """The models merged in one of the ways."""
    kind = KINDS.get(fields["method"])
    given = [
        {"source": model, **({"statistics": f"informed/{seed}/{kind}-{name}"} if kind else {})}
        for name, model in models.items()
    ]
    entries = given if kind else list(models.values())
    output = f"informed/{seed}/{title.replace(', ', '-').replace(' ', '-')}"
    study.run(output, {**fields, "models": entries})
    return output


def compare(study: Study, seed: int) -> dict[str, float]:
    """The mean of the losses on the packages: of the base, of the fine-tunes (each on its own, and on average over
    all), and of the merges.
    """
    models = {name: fine_tuned(study, name, seed) for name in study.auxiliary}
    made = {title: merged(study, title, fields, models, seed) for title, fields in MERGES.items()}
    losses = {name: study.scores(f"held-out-{name}", ["base", *models.values(), *made.values()]) for name in models}

    def mean(model: str) -> float:
        return statistics.fmean(losses[name][model] for name in models)

    own = statistics.fmean(losses[name][model] for name, model in models.items())
    single = statistics.fmean(mean(model) for model in models.values())
    found = {"the base": mean("base"), "each fine-tune on its own package": own, "one fine-tune on all": single}
    return {**found, **{title: mean(model) for title, model in made.items()}}


def table(found: list[dict[str, float]]) -> str:
    """Means over seeds, and against the plain mean seed by seed, with standard errors."""
    lines = ["| model | nats per token, mean of three packages | against the plain mean |", "|---|---|---|"]
    for title in found[0]:
        values = [row[title] for row in found]
        apart = [row[title] - row["plain mean"] for row in found]
        told = "" if title == "plain mean" else f"{statistics.fmean(apart):+.4f} ± {_error(apart):.4f}"
        lines.append(f"| {title} | {statistics.fmean(values):.4f} | {told} |")
    return "\n".join(lines)


def _error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "merger-informed")
    asked = parser.parse_args()
    study = texts.study(asked.work)
    study.pretrain()
    split(study)
    found = []
    for seed in range(asked.seeds):
        found.append(compare(study, seed))
        print(table(found), flush=True)


if __name__ == "__main__":
    main()

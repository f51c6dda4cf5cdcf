"""The whole idea on one small machine: train, average the checkpoints with `merger`, see what predicts best.

Knows the order of things. Knows nothing of how any of them is done: text, train, averages, evaluate, results and
picture stand beside it.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from averages import AVERAGES, WINDOW, make, make_along
from evaluate import HeldOut, hold_out, score
from picture import draw
from results import Results, as_json, markdown, table, verdict
from text import Corpus, collect
from train import Settings, train

ROOT = Path(__file__).resolve().parents[2]
OUT = Path("out/demo")
RUN = OUT / "run"
WINDOWS = 256  # of held-out text


def main() -> None:
    """Runs everything and fills `out/demo`."""
    settings = Settings(seed=_seed())
    os.chdir(ROOT)  # paths in recipes are relative to the folder in which the command runs
    begun = time.monotonic()
    corpus = collect()
    _train(corpus, settings)
    checkpoints = {int(path.name.removeprefix("step-")): path for path in sorted(RUN.glob("step-*"))}
    averages = {average.title: make(average, OUT) for average in AVERAGES}
    along = make_along(list(checkpoints), OUT)
    held_out = hold_out([d.text for d in corpus.held_out], checkpoints[settings.every], settings.context, WINDOWS)
    results = _evaluate(checkpoints, along, averages, held_out)
    _report(results, _facts(corpus, held_out, settings, time.monotonic() - begun))


def _seed() -> int:
    parser = argparse.ArgumentParser(description="Train a small language model and average its checkpoints.")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and the order of the text")
    seed: int = parser.parse_args().seed
    return seed


def _train(corpus: Corpus, settings: Settings) -> None:
    print(
        f"text: {len(corpus.train)} files of Python's library to train on, {len(corpus.held_out)} held out", flush=True
    )
    if not train([d.text for d in corpus.train], corpus.digest, RUN, settings):
        print(f"{RUN} holds this very run already; remove it to train again")


def _evaluate(
    checkpoints: Mapping[int, Path], along: Mapping[int, Path], averages: Mapping[str, Path], held_out: HeldOut
) -> Results:
    folders = [*checkpoints.values(), *along.values(), *averages.values()]
    print(f"evaluating {len(folders)} checkpoints on {held_out.predicted_tokens:,} held-out tokens", flush=True)
    scores = {folder: score(folder, held_out) for folder in folders}
    return Results(
        checkpoints={step: scores[folder] for step, folder in checkpoints.items()},
        curve={step: scores[folder] for step, folder in along.items()},
        averages={title: scores[folder] for title, folder in averages.items()},
    )


def _facts(corpus: Corpus, held_out: HeldOut, settings: Settings, seconds: float) -> dict[str, object]:
    return {
        "settings": asdict(settings),
        "files": {"train": len(corpus.train), "held_out": len(corpus.held_out)},
        "held_out_tokens": held_out.predicted_tokens,
        "text_digest": corpus.digest,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": round(seconds, 1),
    }


def _report(results: Results, facts: Mapping[str, object]) -> None:
    """Prints the table; writes it as `results.md`, `results.json` and `demo.png`."""
    about = f"Held-out text: {facts['held_out_tokens']:,} tokens. ± is one standard error over its windows."
    (OUT / "results.json").write_text(as_json(results, facts))
    (OUT / "results.md").write_text(markdown(results, about))
    draw(results, OUT / "demo.png", WINDOW)
    print(f"\n{table(results)}\n\n{verdict(results)}\n{about}\n")
    print(f"{facts['seconds']} seconds in all")
    print(f"picture: {OUT / 'demo.png'}")
    print(f"report:  {OUT / 'lawa-6' / 'report.html'}")


if __name__ == "__main__":
    main()

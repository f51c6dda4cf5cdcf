"""The whole idea on one small machine: train, average the checkpoints as jobs of a service, see what predicts best;
then make experts and more layers of the last one, and train on.

Knows the order of things. Knows nothing of how any of them is done: text, train, service, averages, surgery, evaluate,
results and picture stand beside it.
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
from averages import AVERAGES, WINDOW, make_all, make_along
from evaluate import HeldOut, hold_out, score
from picture import draw, draw_continued
from results import Results, as_json, continued_markdown, markdown, table, verdict
from service import serving
from surgery import SEED_SHIFT, Continued, continue_all, operate
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
    with serving(OUT / "service") as service:
        averages = make_all(AVERAGES, OUT, service)
        along = make_along(list(checkpoints), OUT, service)
    held_out = hold_out([d.text for d in corpus.held_out], checkpoints[settings.every], settings.context, WINDOWS)
    results = _evaluate(checkpoints, along, averages, held_out)
    models = operate(OUT, checkpoints[max(checkpoints)])
    continued = continue_all(models, [d.text for d in corpus.train], held_out, settings)
    _report(results, continued, _facts(corpus, held_out, settings, time.monotonic() - begun))


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


def _report(results: Results, continued: Mapping[str, Continued], facts: Mapping[str, object]) -> None:
    """Prints the tables; writes them as `results.md`, `results.json`, `surgery.md`, and draws both pictures."""
    about = f"Held-out text: {facts['held_out_tokens']:,} tokens. ± is one standard error over its windows."
    (OUT / "results.json").write_text(as_json(results, facts))
    (OUT / "results.md").write_text(markdown(results, about))
    draw(results, OUT / "demo.png", WINDOW)
    surgery = continued_markdown(continued, f"{about} Seed of the batches: {SEED_SHIFT} after that of the training.")
    (OUT / "surgery.md").write_text(surgery)
    draw_continued(continued, OUT / "surgery.png")
    print(f"\n{surgery}")
    print(f"\n{table(results)}\n\n{verdict(results)}\n{about}\n")
    print(f"{facts['seconds']} seconds in all")
    print(f"pictures: {OUT / 'demo.png'}, {OUT / 'surgery.png'}")
    print(f"report:  {OUT / 'lawa-6' / 'report.html'}")


if __name__ == "__main__":
    main()

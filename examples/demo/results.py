"""The demo's results as values, as a table for people, and as JSON for programs.

Knows scores and how to set them in rows. Knows nothing of files, training, or how an average was made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evaluate import Score
from surgery import Continued

HEADERS = ("", "loss (nats/token)", "perplexity", "bits/byte", "loss against the last checkpoint")


@dataclass(frozen=True)
class Results:
    """Scores on the held-out text: checkpoints and LAWA by their step, averages by their name."""

    checkpoints: Mapping[int, Score]
    curve: Mapping[int, Score]
    averages: Mapping[str, Score]

    @property
    def last(self) -> int:
        """The step of the last checkpoint."""
        return max(self.checkpoints)

    @property
    def best(self) -> int:
        """The step of the best single checkpoint; picked by the held-out text itself, which flatters it."""
        return min(self.checkpoints, key=lambda step: self.checkpoints[step].loss)

    def gain(self, score: Score) -> tuple[float, float]:
        """The loss minus the last checkpoint's, and the standard error of that; negative is better."""
        return score.minus(self.checkpoints[self.last])

    def named(self) -> dict[str, Score]:
        """The rows of the table: the last checkpoint, the best one, every average."""
        return {
            f"last checkpoint (step {self.last})": self.checkpoints[self.last],
            f"best single checkpoint (step {self.best})": self.checkpoints[self.best],
            **self.averages,
        }


def rows(results: Results) -> list[tuple[str, ...]]:
    """One row of text for each of `named`, in the columns of `HEADERS`."""
    return [(name, *_cells(results, score)) for name, score in results.named().items()]


def _cells(results: Results, score: Score) -> tuple[str, ...]:
    return f"{score.loss:.4f}", f"{score.perplexity:.2f}", f"{score.bits_per_byte:.4f}", _gain(results, score)


def _gain(results: Results, score: Score) -> str:
    if score is results.checkpoints[results.last]:
        return ""
    gain, error = results.gain(score)
    return f"{gain:+.4f} ± {error:.4f}"


def table(results: Results) -> str:
    """Aligned plain text: names to the left, numbers to the right."""
    lines = [HEADERS, *rows(results)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADERS))]
    aligned = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    names = [line[0].ljust(widths[0]) for line in lines]
    return "\n".join("  ".join([name, *cells[1:]]) for name, cells in zip(names, aligned, strict=True))


def markdown(results: Results, about: str) -> str:
    """A page with the table, the verdict, and what was measured."""
    lines = [HEADERS, ("---", *["---:"] * (len(HEADERS) - 1)), *rows(results)]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# Averages of checkpoints against the checkpoints\n\n{body}\n\n{verdict(results)}\n\n{about}\n"


def continued_markdown(continued: Mapping[str, Continued], about: str) -> str:
    """A page with what became of the dense, the upcycled and the expanded model."""
    dense = continued["dense"]
    last = max(dense.scores)
    lines = [
        ("", "parameters", "trained", "loss at first", f"after {last} steps", "against dense", "seconds"),
        ("---", *["---:"] * 6),
    ]
    for name, model in continued.items():
        gain, error = model.scores[last].minus(dense.scores[last])
        against = "" if model is dense else f"{gain:+.4f} ± {error:.4f}"
        sizes = f"{model.parameters / 1e6:.2f} M", f"{model.trained / 1e6:.2f} M"
        losses = f"{model.scores[0].loss:.4f}", f"{model.scores[last].loss:.4f}"
        lines.append((name, *sizes, *losses, against, f"{model.seconds:.0f}"))
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    proofs = "\n".join(f"- {name}: {model.proof}" for name, model in continued.items() if model.proof)
    title = "One checkpoint, continued in three ways"
    return f"# {title}\n\n{body}\n\nProofs of parity before training:\n\n{proofs}\n\n{about}\n"


def verdict(results: Results) -> str:
    """What came out, whichever way: a difference counts when it exceeds two standard errors."""
    parts: dict[str, list[str]] = {"Better than": [], "Worse than": [], "No different from": []}
    for name, score in results.averages.items():
        gain, error = results.gain(score)
        clear = "Better than" if gain < 0 else "Worse than"
        parts[clear if abs(gain) > 2 * error else "No different from"].append(name)
    return "\n".join(f"{what} the last checkpoint: {'; '.join(names)}." for what, names in parts.items() if names)


def as_json(results: Results, facts: Mapping[str, Any]) -> str:
    """Everything that was measured, and the facts of the run."""
    content = {
        **facts,
        "results": {name: _numbers(results, score) for name, score in results.named().items()},
        "checkpoints": {step: score.loss for step, score in results.checkpoints.items()},
        "lawa_curve": {step: score.loss for step, score in results.curve.items()},
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _numbers(results: Results, score: Score) -> dict[str, float]:
    gain, error = results.gain(score)
    return {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "against_last": gain,
        "standard_error": error,
    }

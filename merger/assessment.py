"""What a finished result measures, and whether that is what was required before it may be published.

Knows what to measure and compare; measures nothing itself.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from merger.connectivity import Line, measured_line
from merger.errors import NotGoodEnough
from merger.evaluation import Measured, Score, Verdict, verdicts
from merger.judging import key_from
from merger.methods.method import Choice, Judge
from merger.plan import Plan
from merger.unpublished import link_result
from merger.verify import Check

_MOST_LINES = 3  # between neighbouring sources, in the report


@dataclass(frozen=True)
class Assessment:
    """The score of a result, those of the models that it was compared with, and what was required of it."""

    evaluation: Measured
    score: Score
    others: Mapping[str, Score]
    verdicts: tuple[Verdict, ...]
    lines: tuple[Line, ...]

    def checks(self) -> list[Check]:
        """As lines of the report: the score, then everything that was required."""
        told = ", ".join(f"{name} {value:.4f}" for name, value in self.score.metrics.items())
        measured = Check("evaluation", True, f"{told} ({self.score.count:,} {self.score.unit})")
        return [measured, *(Check("required", verdict.passed, verdict.says) for verdict in self.verdicts)]

    def as_data(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "evaluation": self.evaluation.model_dump(mode="json"),
            "score": self.score.as_data(),
            "others": {name: score.as_data() for name, score in self.others.items()},
            "required": [{"passed": verdict.passed, "says": verdict.says} for verdict in self.verdicts],
            "lines": [line.as_data() for line in self.lines],
        }


@dataclass(frozen=True)
class Evidence:
    """What scores have said: of candidates before the plan was made, and of the result. `asked` is the recipe before
    its choices were made.
    """

    asked: Mapping[str, Any] | None = None
    choices: tuple[Choice, ...] = ()
    assessment: Assessment | None = None

    def as_data(self) -> dict[str, Any]:
        """For the manifest: what there is."""
        chosen = {"asked": dict(self.asked or {}), "choices": [asdict(choice) for choice in self.choices]}
        measured = {"evaluation": self.assessment.as_data()} if self.assessment else {}
        return {**(chosen if self.asked else {}), **measured}


def assess(plan: Plan, folder: Path, evaluation: Measured, judge: Judge, work: Path | None = None) -> Assessment:
    """Measure the result in the shards of `folder`, and what it is compared with. Raises RequestError and JobError.

    `work` (a temporary folder without) takes links to the result while it is measured.
    """
    with tempfile.TemporaryDirectory(dir=work) as place:
        result = link_result(plan, folder, Path(place) / "result")
        score = judge.score(str(result), evaluation, key_from(plan.fingerprint, evaluation))
    others = {name: judge.score(name, evaluation) for name in _compared(plan, evaluation)}
    lines = tuple(
        measured_line(a, b, evaluation.connect, evaluation, judge) for a, b in _neighbours(plan) if evaluation.connect
    )
    return Assessment(evaluation, score, others, tuple(verdicts(evaluation, score, others)), lines)


def _compared(plan: Plan, evaluation: Measured) -> list[str]:
    sources = [part.source.reference for part in plan.checkpoint.parts if not part.source.is_adapter]
    named = [sources if name in ("source", "sources") else [name] for name in evaluation.better_than]
    return list(dict.fromkeys(name for names in named for name in names))


def _neighbours(plan: Plan) -> list[tuple[str, str]]:
    """Pairs of fine-tunes that the result is made of, the first few."""
    pairs = []
    for kin in plan.checkpoint.kin:
        stored = [model.parts[0].source.reference for model in kin.models if len(model.parts) == 1]
        pairs += list(pairwise(stored))
    return list(dict.fromkeys(pairs))[:_MOST_LINES]


def require(assessment: Assessment) -> None:
    """See that everything that was required holds. Raises NotGoodEnough."""
    missed = [verdict.says for verdict in assessment.verdicts if not verdict.passed]
    if missed:
        raise NotGoodEnough(f"does not hold: {'; '.join(missed)}", where="evaluate")

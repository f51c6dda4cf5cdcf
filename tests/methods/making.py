"""Runs recipes as `merger run` does, without a report of progress."""

from pathlib import Path
from typing import Any

from merger.recipe import make_document
from merger.run import Options, Outcome, Progress, plan_of, run


class Silent(Progress):
    def begin(self, total, done):
        pass

    def advance(self, count):
        pass

    def finished(self, receipt):
        pass

    def phase(self, text):
        pass


def make(recipe: dict[str, Any], output: Path, parity: str = "off", **options: Any) -> Outcome:
    """Run a recipe into a folder; the result is compared by the tests themselves, so without a proof of its own."""
    document = make_document({**recipe, "output": {"path": str(output), **recipe.get("output", {})}})
    return run(document, Options(parity=parity, **options), Silent())


def plan(recipe: dict[str, Any]):
    """The plan of a recipe."""
    return plan_of(make_document({**recipe, "output": {"path": "unused"}}), Options())[0]

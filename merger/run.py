"""The whole flow on one machine: recipe, plan, engine, checks, result.

Knows the order of things; does none of them itself.
"""

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from merger import gallery, kernels, publish
from merger.budget import DEFAULT_MEMORY, Allotment, allot
from merger.engine import write_shards
from merger.errors import IncompatibleSources, NonFiniteInput, RecipeError, VerificationFailed
from merger.plan import Plan, make_plan
from merger.preflight import check_buffers, check_disk
from merger.receipt import Receipt
from merger.recipe import Document, resolve, size_in_bytes
from merger.report import Figures, manifest, model_card, page
from merger.verify import Check, check_written


@dataclass(frozen=True)
class Options:
    """How to run: bytes of memory for buffers, threads (None: twice the processors), and whether warnings are
    refusals.
    """

    memory: int = DEFAULT_MEMORY
    threads: int | None = None
    strict: bool = False


class Progress(ABC):
    """Somebody who watches a run. Methods may be called from any thread."""

    @abstractmethod
    def begin(self, total: int, done: int) -> None:
        """The writing pass begins: `total` bytes of output, `done` of them finished by an earlier run."""

    @abstractmethod
    def advance(self, count: int) -> None:
        """`count` bytes more were written."""

    @abstractmethod
    def finished(self, receipt: Receipt) -> None:
        """A shard is on the disk."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    `resumed` counts the shards of earlier runs; `figures` is None where nothing was left to do.
    """

    output: Path
    plan: Plan
    checks: Sequence[Check]
    figures: Figures | None
    resumed: int
    warnings: Sequence[str]


def plan_of(document: Document, options: Options) -> tuple[Plan, Allotment]:
    """Resolve a document and lay out its result; reads configs, headers and integer buffers. Raises RequestError."""
    with _without_collector():
        checkpoint = resolve(document)
        plan = make_plan(checkpoint, document.dump(), size_in_bytes(document.output.shard_size))
    if options.strict and checkpoint.warnings:
        raise IncompatibleSources(
            checkpoint.warnings[0], where="--strict", remedy="Without --strict this is a warning."
        )
    allotment = allot(plan, options.memory, options.threads)
    check_buffers(plan)
    return plan, allotment


@contextmanager
def _without_collector() -> Iterator[None]:
    """Planning a huge model makes a million objects that all stay: looking for garbage takes a third of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def output_of(document: Document) -> Path:
    """The folder of the result. Raises RecipeError where the document names none."""
    if document.output.path is None:
        raise RecipeError("is missing", where="output.path", remedy="Name a folder there or with -o.")
    return Path(document.output.path).expanduser()


def run(document: Document, options: Options, progress: Progress) -> Outcome:
    """Make the result of a document, going on after the last finished shard of an earlier run of the same plan.

    Raises RequestError with nothing written, JobError with finished shards kept.
    """
    output = output_of(document)
    plan, allotment = plan_of(document, options)
    if publish.is_complete(output, plan):
        receipts = publish.published(output)
        checks = check_written(plan, output, receipts)
        return Outcome(output, plan, checks, None, len(receipts), [*plan.checkpoint.warnings, *_inherited(receipts)])
    publish.check_free(output, plan)
    check_disk(plan, output, sum(receipt.size for receipt in publish.finished_shards(output, plan)))
    with publish.taken(output, plan):
        earlier = publish.finished_shards(output, plan)
        try:
            receipts, figures = _write(plan, output, allotment, options, progress, earlier)
            checks = _checked(plan, output, receipts)
        except (NonFiniteInput, VerificationFailed):
            publish.discard(output, plan)  # trying again would come to the same
            raise
        _complete(plan, output, receipts, checks, figures)
    return Outcome(output, plan, checks, figures, len(earlier), [*plan.checkpoint.warnings, *_inherited(receipts)])


def _write(
    plan: Plan, output: Path, allotment: Allotment, options: Options, progress: Progress, earlier: Sequence[Receipt]
) -> tuple[list[Receipt], Figures]:
    finished = {receipt.file for receipt in earlier}
    left = [shard for shard in plan.shards if shard.name not in finished]
    kernels.load()
    progress.begin(plan.size, plan.size - sum(shard.size for shard in left))
    began = time.perf_counter()
    made = write_shards(
        left,
        output,
        allotment,
        plan.fingerprint,
        strict=options.strict,
        on_bytes=progress.advance,
        on_shard=progress.finished,
    )
    seconds = time.perf_counter() - began
    read = sum(leaf.nbytes for shard in left for entry in shard.entries for leaf in entry.expression.leaves())
    figures = Figures(seconds, read, sum(shard.size for shard in left), allotment.threads, allotment.memory)
    return [*earlier, *made], figures


def _checked(plan: Plan, output: Path, receipts: Sequence[Receipt]) -> list[Check]:
    checks = check_written(plan, output, receipts)
    failed = [check for check in checks if not check.passed]
    if failed:
        remedy = "Choose a wider `output.dtype`, such as bfloat16 or float32." if failed[0].name == "finite" else ""
        raise VerificationFailed(
            f"check of {failed[0].name} failed: {failed[0].detail}", where=str(output), remedy=remedy
        )
    return checks


def _inherited(receipts: Sequence[Receipt]) -> list[str]:
    """A warning for every tensor that was not finite in a source."""
    found = [(name, count) for receipt in receipts for name, count in receipt.non_finite.items()]
    return [f"{name}: {count:,} values are NaN or infinite because a source's are" for name, count in found]


def _complete(
    plan: Plan,
    output: Path,
    receipts: Sequence[Receipt],
    checks: Sequence[Check],
    figures: Figures,
) -> None:
    pictures = {"weights": gallery.weights(plan), **gallery.distances(plan, output)}
    texts: dict[str, str | bytes] = {
        "README.md": model_card(plan),
        "report.html": page(plan, checks, figures, pictures),
        **{f"{name}.png": png for name, png in pictures.items()},
    }
    publish.complete(output, plan, texts, manifest(plan, receipts))

"""The whole flow on one machine: recipe, plan, engine, checks, result.

Knows the order of things; does none of them itself.
"""

import gc
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from merger import gallery, kernels, publish
from merger.assessment import Evidence, assess, require
from merger.budget import DEFAULT_MEMORY, Allotment, allot
from merger.checkpoint import Checkpoint
from merger.destination import Destination
from merger.engine import write_shards
from merger.errors import (
    IncompatibleSources,
    NonFiniteInput,
    RecipeError,
    SourceError,
    UnsupportedModel,
    VerificationFailed,
)
from merger.fine_tuning import LocalTrainer
from merger.judging import LocalJudge, check_installed, own_memory
from merger.methods.method import Judge, Means, Sources, is_open
from merger.parity import Mode, parity_check
from merger.plan import Plan, Shard, make_plan
from merger.preflight import check_buffers, check_disk, check_kin, check_statistics
from merger.push import Cache, cached_files, check_license, destination_of, staging_of
from merger.receipt import FOLDER, Receipt
from merger.recipe import (
    Document,
    check_evaluations,
    evaluations_of,
    make_document,
    resolve,
    settle,
    size_in_bytes,
)
from merger.report import NONE, Figures, manifest, model_card, notices, page
from merger.sources import LocalSources
from merger.spilling import check_room, device_of
from merger.storage.folder import read_json
from merger.uploads import Uploads
from merger.verify import MANIFEST, Check, check_ranks, check_written


@dataclass(frozen=True)
class Options:
    """How to run: bytes of memory for buffers, threads (None: twice the processors), whether warnings are refusals,
    how surgery is proven, which remote files are downloaded whole, and on which device whole tensors are computed with
    (`auto`: on a GPU where there is one).
    """

    memory: int = DEFAULT_MEMORY
    threads: int | None = None
    strict: bool = False
    parity: Mode = "auto"
    cache: Cache = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"


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

    @abstractmethod
    def phase(self, text: str) -> None:
        """Something else begins that may take a while."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    `resumed` counts the shards of earlier runs; `figures` is None where nothing was left to do; `published` is the
    address that the result was pushed to.
    """

    output: Path | None
    plan: Plan
    checks: Sequence[Check]
    figures: Figures | None
    resumed: int
    warnings: Sequence[str]
    published: str | None = None


def plan_of(document: Document, options: Options, sources: Sources | None = None) -> tuple[Plan, Allotment]:
    """Resolve a document and lay out its result; reads configs, headers and integer buffers. Raises RequestError."""
    sources = sources or LocalSources()
    check_evaluations(document, sources)
    with _without_collector():
        checkpoint = resolve(document, sources)
        _check_measurable(document, checkpoint)
        plan = make_plan(checkpoint, document.dump(), size_in_bytes(document.output.shard_size))
    if options.strict and checkpoint.warnings:
        raise IncompatibleSources(
            checkpoint.warnings[0], where="--strict", remedy="Without --strict this is a warning."
        )
    allotment = allot(plan, options.memory, options.threads, options.device)
    check_buffers(plan)
    check_kin(plan)
    check_statistics(plan)
    return plan, allotment


def check_machine(plan: Plan, options: Options) -> None:
    """See that this machine can make the tensors that are made as a whole: that it has the GPU that is asked for, and
    the memory. Raises NotInstalled, NotEnoughMemory and RequestError.
    """
    if plan.wholes:
        device = device_of(options.device) if options.device == "cuda" else "cpu"
        check_room(plan.wholes[0], device, options.memory)


def _check_measurable(document: Document, checkpoint: Checkpoint) -> None:
    if document.evaluate and checkpoint.is_adapter:
        raise RecipeError(
            "the result is an adapter, which computes nothing without its base",
            where="evaluate",
            remedy="Name the `base` in the recipe, or evaluate a recipe that does: `merger evaluate RECIPE`.",
        )


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
    if document.output.push is None:
        output_of(document)  # refused first where there is none
    # While configs and headers are read. No daemon: ending the process while it compiles would crash it.
    threading.Thread(target=kernels.load).start()
    sources = LocalSources()
    destination = destination_of(document.output, sources.hub)
    evaluations = evaluations_of(document)
    if evaluations or is_open(document.recipe):
        check_installed(evaluations)
    if destination and is_open(document.recipe):
        destination.admit()
        check_license(document, plan_of(document, options, sources)[0], destination)
    trainer = LocalTrainer(sources, progress.phase)
    with LocalJudge(sources, own_memory(), progress.phase) as judge:
        means = Means(sources, judge, trainer)
        settled, evidence = chosen(document, options, means)
        return _run(settled, evidence, options, progress, means, destination)


def chosen(document: Document, options: Options, means: Means) -> tuple[Document, Evidence]:
    """The document with its models trained and all choices made. What can be refused without is refused first.

    Raises RequestError and JobError.
    """
    if not is_open(document.recipe):
        return document, NONE
    plan_of(document, options, means.sources)
    settled, choices = settle(document, means)
    return settled, Evidence(document.dump(), choices)


def _run(
    document: Document,
    evidence: Evidence,
    options: Options,
    progress: Progress,
    means: Means,
    destination: Destination | None,
) -> Outcome:
    plan, allotment = plan_of(document, options, means.sources)
    check_machine(plan, options)
    if destination is None:
        return _make(document, evidence, options, progress, means, plan, allotment, output_of(document))
    check_license(document, plan, destination)
    address = destination.check(plan)
    output = output_of(document) if document.output.path else staging_of(plan, destination)
    if address and document.output.path:
        outcome = _make(document, evidence, options, progress, means, plan, allotment, output)
        return replace(outcome, published=address)
    if address:
        publish.remove_abandoned(output, plan)
        return Outcome(None, plan, [], None, len(plan.shards), warnings_of(plan, []), address)
    destination.prepare()
    with Uploads(output, destination, progress.phase) as uploads:
        outcome = _make(document, evidence, options, progress, means, plan, allotment, output, uploads)
    return outcome if document.output.path else replace(outcome, output=None)


def _make(
    document: Document,
    evidence: Evidence,
    options: Options,
    progress: Progress,
    means: Means,
    plan: Plan,
    allotment: Allotment,
    output: Path,
    uploads: Uploads | None = None,
) -> Outcome:
    """Make the result in a folder and publish it where there are `uploads`; a folder that nobody asked for goes."""
    if publish.is_complete(output, plan):
        receipts = publish.published(output)
        checks = check_written(plan, output, receipts)
        checks += measured(document, plan, output, means.judge, evidence)[0]
        address = uploads.finish(plan, receipts) if uploads else None
        return Outcome(output, plan, checks, None, len(receipts), warnings_of(plan, receipts), address)
    publish.check_free(output, plan)
    check_disk(plan, output, sum(receipt.size for receipt in publish.finished_shards(output, plan)))
    with publish.taken(output, plan):
        earlier = publish.finished_shards(output, plan)
        try:
            receipts, figures = _write(plan, output, allotment, options, progress, earlier, uploads)
            if plan.checkpoint.origin and options.parity != "off":
                progress.phase("comparing logits with the source's")
            checks = verified(plan, output, receipts, options.parity)
        except (NonFiniteInput, VerificationFailed):
            publish.discard(output, plan)  # trying again would come to the same
            raise
        found, evidence = measured(document, plan, output, means.judge, evidence)
        checks += found
        complete(plan, output, receipts, checks, figures, evidence)
        address = uploads.finish(plan, receipts) if uploads else None
        if document.output.path is None:
            publish.remove(output)
        else:
            publish.finish(output)
    return Outcome(output, plan, checks, figures, len(earlier), warnings_of(plan, receipts), address)


def _write(
    plan: Plan,
    output: Path,
    allotment: Allotment,
    options: Options,
    progress: Progress,
    earlier: Sequence[Receipt],
    uploads: Uploads | None,
) -> tuple[list[Receipt], Figures]:
    """Make the shards that are left."""
    left = left_of(plan, earlier)

    def finished(receipt: Receipt) -> None:
        progress.finished(receipt)
        if uploads:
            uploads.add(receipt)

    kernels.load()
    progress.begin(plan.size, plan.size - sum(shard.size for shard in left))
    began = time.perf_counter()
    made = write_shards(
        left,
        output,
        allotment,
        plan.fingerprint,
        strict=options.strict,
        cached=cached_files(plan, options.cache),
        on_bytes=progress.advance,
        on_shard=finished,
    )
    seconds = time.perf_counter() - began
    read, written = sum(shard.read_size for shard in left), sum(shard.size for shard in left)
    figures = Figures(seconds, read, written, allotment.threads, allotment.memory)
    return [*earlier, *made], figures


def left_of(plan: Plan, earlier: Sequence[Receipt]) -> list[Shard]:
    """The shards that have no receipt yet."""
    finished = {receipt.file for receipt in earlier}
    return [shard for shard in plan.shards if shard.name not in finished]


def measured(
    document: Document, plan: Plan, folder: Path, judge: Judge, evidence: Evidence
) -> tuple[list[Check], Evidence]:
    """What the result in the shards of `folder` measures, where the document asks for it.

    Raises NotGoodEnough where it is not what was required, RequestError and JobError where it cannot be measured.
    """
    if document.evaluate is None:
        return [], evidence
    unfinished = folder / FOLDER
    assessment = assess(plan, folder, document.evaluate, judge, unfinished if unfinished.is_dir() else None)
    require(assessment)
    return assessment.checks(), replace(evidence, assessment=assessment)


def verified(plan: Plan, output: Path, receipts: Sequence[Receipt], parity: Mode = "auto") -> list[Check]:
    """The checks of a written result, all of them passed. Raises VerificationFailed."""
    checks = check_written(plan, output, receipts)
    proof = parity_check(plan, output, parity) if all(check.passed for check in checks) else None
    checks += [proof] if proof else []
    checks += check_ranks(plan)
    failed = [check for check in checks if not check.passed]
    if failed:
        remedy = "Choose a wider `output.dtype`, such as bfloat16 or float32." if failed[0].name == "finite" else ""
        raise VerificationFailed(
            f"check of {failed[0].name} failed: {failed[0].detail}", where=str(output), remedy=remedy
        )
    return checks


def prove(folder: Path) -> Check:
    """Compare a finished result with the model that its recipe began with, which must be there still.

    Raises RequestError where it is not a result of surgery, or where the sources have changed.
    """
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
    if manifest is None:
        raise SourceError("has no merger.json: it is not a result of merger", where=str(folder))
    plan, _ = plan_of(make_document(manifest["recipe"]), Options())
    if plan.fingerprint != manifest["fingerprint"]:
        raise SourceError("was made from sources that have changed since", where=str(folder))
    check = parity_check(plan, folder)
    if check is None:
        raise UnsupportedModel("is no result of surgery: there is no model that it should equal", where=str(folder))
    return check


def warnings_of(plan: Plan, receipts: Sequence[Receipt]) -> list[str]:
    """The warnings of the plan, and one for every tensor that was not finite in a source."""
    found = [(name, count) for receipt in receipts for name, count in receipt.non_finite.items()]
    inherited = [f"{name}: {count:,} values are NaN or infinite because a source's are" for name, count in found]
    return [*plan.checkpoint.warnings, *inherited]


def complete(
    plan: Plan,
    output: Path,
    receipts: Sequence[Receipt],
    checks: Sequence[Check],
    figures: Figures,
    evidence: Evidence = NONE,
) -> None:
    """Put the side files, the card, the report and the config beside the shards."""
    main = gallery.main_picture(plan)
    pictures = {
        **main,
        **gallery.lines(evidence.assessment),
        **gallery.distances(plan, output),
    }
    texts: dict[str, str | bytes] = {
        **notices(plan),
        "README.md": model_card(plan, evidence, picture=_file_of(next(iter(main), ""))),
        "report.html": page(plan, checks, figures, pictures, evidence),
        **plan.checkpoint.texts,
        **{_file_of(title): png for title, png in pictures.items()},
    }
    publish.complete(output, plan, texts, manifest(plan, receipts, evidence))


def _file_of(title: str) -> str:
    """The file of a picture."""
    return f"{title.replace(' ', '-')}.png" if title else ""

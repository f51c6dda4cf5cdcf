"""`python -m workers.runner`: one attempt of one job, from the claim to the published result.

Knows the order of things. Its main thread plans, waits for tasks and publishes; a second thread reports. When the
API's word is to stop, or Ray ends the process, the main thread is interrupted wherever it is.
"""

import argparse
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import ray

from merger import publish
from merger.assessment import Evidence
from merger.destination import Destination
from merger.errors import JobError, MergerError, NotGoodEnough, VerificationFailed
from merger.methods.method import Means, Sources, all_of, is_open
from merger.plan import Plan, Shard
from merger.preflight import check_disk
from merger.push import cached_files, check_license, destination_of
from merger.reach import Reach
from merger.receipt import Receipt
from merger.recipe import Document, make_document
from merger.report import NONE, Figures
from merger.run import Options, chosen, complete, left_of, measured, plan_of, verified, warnings_of
from merger.sources import sources_within
from merger.staging import Staging
from merger.uploads import Uploads
from workers.judging import RayJudge
from workers.placement import bound_to_this_node
from workers.reports import Api, Order, Progress, Reporter, Superseded, Word
from workers.resources import Request, TaskSize, measuring_request, request_for, training_request
from workers.shards import ShardTasks, Work
from workers.training import RayTrainer


class _Stopped(BaseException):
    """The API's word, or a signal, ends the attempt."""


class Attempt:
    """An attempt that was claimed: its order, its folder, and what it tells."""

    def __init__(self, api: Api, order: Order, job: str, number: int) -> None:
        self._api, self._order, self._number = api, order, number
        self._staging = Staging(Path(order.output), job, number)
        self._progress = Progress("planning")
        self._word: Word | None = None
        self._hub_token = order.hub_token
        self._reporter = Reporter(api, order.heartbeat_seconds, self._heed, self._hub_token)
        self._tasks: ShardTasks | None = None
        self._judge: RayJudge | None = None
        self._reach = Reach(own_token=False)

    def run(self) -> None:
        """Make and publish the result, and tell the API how it ended. Raises Superseded."""
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGUSR1, _interrupt)
        self._reporter.start()
        try:
            try:
                result = self._make()
            finally:
                signal.signal(signal.SIGUSR1, signal.SIG_IGN)
                for left in (self._tasks, self._judge):
                    if left:
                        left.stop()
        except _Stopped:
            self._after_stop()
        except MergerError as error:
            for_good = isinstance(error, VerificationFailed | NotGoodEnough)
            self._fail(error, again=isinstance(error, JobError) and not for_good)
        except Superseded:
            raise
        except Exception as error:
            if isinstance(error.__cause__, _Stopped):  # Ray's compiled code makes a SystemError of what interrupts it
                self._after_stop()
                return
            self._say(traceback.format_exc())
            self._fail(JobError(f"{type(error).__name__}: {error}"), again=True)
        else:
            self._reporter.finish("succeeded", {"result": result})

    def _heed(self, word: Word) -> None:
        """Interrupt the main thread, wherever it is. Called from the reporter's thread."""
        if word is Word.LEAVE:  # another attempt has taken over: touch nothing more, wait for nothing
            print("this attempt no longer counts", flush=True)  # noqa: T201
            os._exit(1)
        if self._word is None:
            self._word = word
            os.kill(os.getpid(), signal.SIGUSR1)

    def _after_stop(self) -> None:
        if self._word is Word.CANCEL:
            self._staging.remove()
            self._reporter.finish("canceled", {})
        else:
            self._fail(JobError("the runner was asked to stop; what is finished is kept"), again=True, counts=False)

    def _fail(self, error: MergerError, *, again: bool, counts: bool = True) -> None:
        if not again:
            self._staging.remove()
        self._say(f"failed: {error}")
        problem = {
            "kind": type(error).__name__,
            "message": error.message,
            "where": error.where,
            "remedy": error.remedy,
        }
        self._reporter.finish("failed", {"error": problem, "again": again, "counts": counts})

    # ---- the work -------------------------------------------------------------------------------------

    def _make(self) -> dict[str, Any]:
        order = self._order
        os.chdir(order.working_folder)
        began = time.time()
        size = TaskSize(order.task_cpus, order.task_memory, order.task_device)
        document = make_document(order.recipe)
        self._reach = self._all(document)
        sources = sources_within(self._reach, self._staging.pins)
        document, evidence = self._choose(document, sources, size)
        plan, _ = plan_of(document, Options(size.memory), sources)
        destination = destination_of(document.output, sources.hub)
        request, allotment = request_for(plan, size)
        request = self._placed(request)
        self._reporter.event("planned", fingerprint=plan.fingerprint, shards=len(plan.shards), bytes=plan.size)
        self._tell("writing", total=plan.size, shards=len(plan.shards))
        if destination:
            check_license(document, plan, destination)
            address = destination.check(plan)
            if address and document.output.path is None:
                return self._already_pushed(plan, address)
            destination.prepare()
        if publish.is_complete(self._staging.output, plan):
            return self._already_published(plan, destination)
        earlier = self._adopt(plan)
        left = left_of(plan, earlier)
        folder = self._staging.folder.absolute()
        work = Work(folder, allotment, plan.fingerprint, request, cached_files(plan, "auto"), destination)
        receipts = [*earlier, *self._write(left, work)]
        self._tell("verifying")
        checks = verified(plan, self._staging.folder, receipts)
        if document.evaluate:
            self._tell("measuring")
            judge = self._judge_for(plan, size)
            found, evidence = measured(document, plan, self._staging.folder, judge, evidence)
            checks += found
        self._tell("publishing")
        read, written = sum(shard.read_size for shard in left), sum(shard.size for shard in left)
        figures = Figures(time.time() - began, read, written, allotment.threads, allotment.memory)
        complete(plan, self._staging.folder, receipts, checks, figures, evidence)
        self._reporter.flush()
        address = self._publish(self._staging.folder, plan, receipts, destination)
        publish.finish(self._staging.folder)
        if document.output.path is None:
            self._staging.remove()
        else:
            self._staging.publish(plan)
        return _result(plan, receipts, address)

    def _publish(
        self, folder: Path, plan: Plan, receipts: Sequence[Receipt], destination: Destination | None
    ) -> str | None:
        """Once the API says that this attempt may: one commit, where there is a destination; returns its address."""
        if destination is None:
            self._ask_to_publish()
            return None
        self._tell("uploading")
        with Uploads(folder, destination, self._say, self._uploading) as uploads:
            landed = uploads.land(receipts)
            self._tell("publishing")
            self._ask_to_publish()
            return destination.publish(folder, plan, landed)

    def _choose(self, document: Document, sources: Sources, size: TaskSize) -> tuple[Document, Evidence]:
        """Train what is to be trained and make the choices that scores decide, going on from earlier attempts."""
        if not is_open(document.recipe):
            return document, NONE
        plan, _ = plan_of(document, Options(size.memory), sources)
        self._tell("choosing")
        request = self._placed(training_request(plan, size))
        trainer = RayTrainer(sources, self._reach, request, _connect, self._say)
        means = Means(sources, self._judge_for(plan, size), trainer)
        document, evidence = chosen(document, Options(size.memory), means)
        for choice in evidence.choices:
            taken = [tried.name for tried in choice.taken]
            self._reporter.event("chosen", title=choice.title, metric=choice.metric, taken=taken)
        return document, evidence

    def _judge_for(self, plan: Plan, size: TaskSize) -> RayJudge:
        request = self._placed(measuring_request(plan, size))
        scores = self._staging.scores.absolute()
        self._judge = RayJudge(scores, self._reach, request, _connect, self._say)
        return self._judge

    def _placed(self, request: Request) -> Request:
        """The request, for this node alone where the others do not see its folders. Raises WorkerDied."""
        if self._order.shared_folders:
            return request
        _connect()
        return bound_to_this_node(request)

    def _all(self, document: Document) -> Reach:
        """What may be read: below the roots, what this very job makes, object stores below their roots, and the Hub
        with the job's own token.
        """
        roots = [Path(root) for root in self._order.source_roots]
        own = [folder for part in all_of(document.recipe) for folder in part.folders()]
        whole = [*roots, *own, self._staging.output.parent.absolute()] if roots else []
        stores = self._order.object_roots
        return Reach(tuple(map(str, whole)), own_token=False, token=self._hub_token, stores=stores)

    def _already_published(self, plan: Plan, destination: Destination | None) -> dict[str, Any]:
        """The result of an attempt that could not say any more that it had published."""
        self._say("the result is there already")
        receipts = publish.published(self._staging.output)
        verified(plan, self._staging.output, receipts, "off")
        address = self._publish(self._staging.output, plan, receipts, destination)
        self._staging.remove()
        return _result(plan, receipts, address)

    def _already_pushed(self, plan: Plan, address: str) -> dict[str, Any]:
        """The result of an attempt that could not say any more that it had pushed."""
        self._say(f"the result is there already: {address}")
        self._ask_to_publish()
        receipts = self._staging.take(plan)
        self._staging.remove()
        return _result(plan, receipts, address)

    def _adopt(self, plan: Plan) -> list[Receipt]:
        """Take the shards that earlier attempts finished."""
        publish.check_free(self._staging.output, plan)
        earlier = self._staging.take(plan)
        done = sum(receipt.size for receipt in earlier)
        check_disk(plan, self._staging.output, done, at_once=len(plan.shards))
        for receipt in earlier:
            self._reporter.event("shard", file=receipt.file, size=receipt.size, xxh3=receipt.xxh3, adopted=True)
        self._tell(done=done, shards_done=len(earlier))
        return earlier

    def _ask_to_publish(self) -> None:
        self._word = self._word or self._api.ask_to_publish()
        if self._word is not Word.GO_ON:
            raise _Stopped

    def _write(self, shards: list[Shard], work: Work) -> list[Receipt]:
        if not shards:
            return []
        _connect()
        self._say(f"{len(shards)} shards to make")
        self._tasks = ShardTasks(work, self._number, self._advance, self._finished, self._say, self._uploading)
        return self._tasks.run(shards)

    def _advance(self, count: int) -> None:
        self._tell(done=self._progress.done + count)

    def _uploading(self) -> None:
        self._tell(uploads=self._progress.uploads + 1)

    def _finished(self, shard: Shard, receipt: Receipt) -> None:
        self._tell(shards_done=self._progress.shards_done + 1, read=self._progress.read + shard.read_size)
        self._reporter.event("shard", file=receipt.file, size=receipt.size, xxh3=receipt.xxh3, adopted=False)
        self._say(f"finished {receipt.file}")

    def _tell(self, phase: str | None = None, **changes: int) -> None:
        self._progress = replace(self._progress, phase=phase or self._progress.phase, **changes)
        self._reporter.progress(self._progress)

    def _say(self, text: str) -> None:
        text = self._reporter.hide(text)
        print(text, flush=True)  # noqa: T201  (Ray keeps it)
        for line in text.splitlines():
            self._reporter.line(line)


def _connect() -> None:
    if not ray.is_initialized():
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        signal.signal(signal.SIGTERM, _interrupt)  # Ray has put its own in the place


def _result(plan: Plan, receipts: list[Receipt], address: str | None) -> dict[str, Any]:
    return {
        "published": address,
        "fingerprint": plan.fingerprint,
        "parameters": plan.parameters,
        "files": [{"name": r.file, "size": r.size, "xxh3": r.xxh3} for r in sorted(receipts, key=lambda r: r.file)],
        "warnings": warnings_of(plan, receipts),
    }


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise _Stopped


def arguments_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, that of this process without `words`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True)
    parser.add_argument("--job", required=True)
    parser.add_argument("--attempt", required=True, type=int)
    parser.add_argument("--claim", required=True)
    return parser.parse_args(words)


def main() -> None:
    """Claims the attempt that the arguments name and runs it; exits with 1 where it no longer counts."""
    arguments = arguments_of()
    api = Api(arguments.server, arguments.job, arguments.attempt)
    try:
        order = api.claim(arguments.claim)
        Attempt(api, order, arguments.job, arguments.attempt).run()
    except Superseded as reason:
        sys.exit(f"this attempt does not count: {reason}")


if __name__ == "__main__":
    main()

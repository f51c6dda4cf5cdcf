"""Where an attempt of a job writes: a folder of its own beside the output, which becomes the output by one rename.

Knows folders, receipts and renames; knows nothing of jobs' states or of who may publish.

Two attempts of a job never share a folder. A later attempt first renames the folders of the earlier ones: from then
on a process of an earlier attempt that still runs finds its folder gone and can neither add to it nor publish it. It
then adopts their finished shards by hard links, which keep inode and time.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from merger import publish
from merger.destination import note_of
from merger.errors import OutputOccupied, WriteFailed
from merger.plan import Plan
from merger.receipt import FOLDER, Receipt, read_receipt, write_receipt
from merger.storage.disk import sync_folder

JOBS = ".merger-jobs"  # beside the outputs, on the same disk


class Staging:
    """The folder of attempt `number` of a job whose result goes to `output`."""

    def __init__(self, output: Path, job: str, number: int) -> None:
        self.output, self._number = output, number
        self._job = output.parent / JOBS / job
        self.folder = self._job / f"attempt-{number}"
        self.scores = self._job / "scores"  # of all attempts: what was measured is not measured again
        self.pins = self._job / "pins.json"  # of all attempts: a branch that moves meanwhile makes no other job

    def take(self, plan: Plan) -> list[Receipt]:
        """Make the folder, fence every earlier attempt and adopt its finished shards; returns their receipts.

        Raises WriteFailed.
        """
        try:
            (self.folder / FOLDER).mkdir(parents=True, exist_ok=True)
            for folder in self._earlier():
                folder.rename(folder.with_name(f"fenced-{self._number}-{folder.name}"))
            fenced = sorted(self._job.glob("fenced-*"))
            receipts = [receipt for shard in plan.shards if (receipt := self._adopt(fenced, shard.name, plan))]
            for folder in fenced:
                shutil.rmtree(folder, ignore_errors=True)  # what its processes still hold open goes with them
        except OSError as error:
            raise WriteFailed(f"cannot be made: {error.strerror}", where=str(error.filename or self.folder)) from error
        return receipts

    def _earlier(self) -> Iterator[Path]:
        for folder in self._job.glob("attempt-*"):
            if int(folder.name.removeprefix("attempt-")) < self._number:
                yield folder

    def _adopt(self, fenced: list[Path], name: str, plan: Plan) -> Receipt | None:
        """The receipt of a shard that this attempt or an earlier one has finished, the file in this folder."""
        own = read_receipt(self.folder, name, plan.fingerprint)
        if own:
            return own
        for folder in fenced:
            receipt = read_receipt(folder, name, plan.fingerprint)
            if receipt:
                _link(folder / name, self.folder / name)
                if note_of(folder, name).exists():
                    _link(note_of(folder, name), note_of(self.folder, name))
                sync_folder(self.folder)
                write_receipt(self.folder, receipt)
                return receipt
        return None

    def publish(self, plan: Plan) -> None:
        """Make the completed folder the output, whole or not at all.

        Raises OutputOccupied where something else is there by now, WriteFailed where this attempt was fenced.
        """
        publish.check_free(self.output, plan)
        try:
            self.folder.rename(self.output)  # replaces an empty folder, refuses any other
        except OSError as error:
            if self.output.exists() and self.folder.exists():
                raise OutputOccupied("holds something else by now", where=str(self.output)) from error
            raise WriteFailed(f"cannot be published: {error.strerror}", where=str(self.folder)) from error
        sync_folder(self.output.parent)
        self.remove()

    def remove(self) -> None:
        """Take away everything that the attempts of this job have left beside the output."""
        remove_staging(self.output, self._job.name)


def remove_staging(output: Path, job: str) -> None:
    """Take away the folders of all attempts of a job; renamed first, so that no attempt can publish meanwhile."""
    folder = output.parent / JOBS / job
    gone = folder.with_name(f"{job}.removed")
    try:
        folder.replace(gone)
    except FileNotFoundError:
        pass
    except OSError:  # an earlier removal was interrupted
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(gone, ignore_errors=True)
    try:
        folder.parent.rmdir()
    except OSError:
        return  # other jobs are at work


def _link(source: Path, target: Path) -> None:
    """The file under a second name, or moved where the file system has no hard links."""
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:
        source.rename(target)

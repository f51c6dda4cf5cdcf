"""A job in the middle of its work, for tests of what may happen then."""

import contextlib
from pathlib import Path

import psutil

from merger.staging import JOBS
from tests.service.processes import Service, recipe, until

SHARDS = 12


class Halfway:
    """A job in the middle: some shards are finished, and everything that works on the others stands still."""

    def __init__(self, service: Service, expected: Path) -> None:
        self.service, self.expected = service, expected
        self.output = service.folder / "out"
        self.job = service.submit(recipe(expected / "run", "out"))
        until(lambda: len(self.receipts()) >= 3, 60, 0.002)
        self.stopped = self.stop_work()
        self.finished = {path.name.removesuffix(".json"): self.identity(path) for path in self.receipts()}
        assert 3 <= len(self.finished) < SHARDS, "the machine was too fast to stop the job in the middle"

    def stop_work(self) -> list[psutil.Process]:
        """Stop what has a shard in the making: before and after it, a worker's title is the same for a moment."""
        return until(lambda: [process for process in self.service.processes("write_shard") if self._stop(process)])

    @staticmethod
    def _stop(process: psutil.Process) -> bool:
        """Stop a process; whether it has an unfinished shard open."""
        with contextlib.suppress(psutil.Error):
            process.suspend()
            if any(".safetensors." in file.path for file in process.open_files()):
                return True
            process.resume()
        return False

    def go_on(self) -> None:
        for process in self.stopped:
            with contextlib.suppress(psutil.Error):
                process.resume()

    def receipts(self) -> list[Path]:
        staging = self.service.folder / JOBS
        return [path for path in staging.glob("*/attempt-*/.merger/*.json") if path.name != "plan.json"]

    @staticmethod
    def identity(receipt: Path) -> tuple[int, int]:
        status = (receipt.parents[1] / receipt.name.removesuffix(".json")).stat()
        return status.st_ino, status.st_mtime_ns

    def check(self) -> None:
        """The job succeeds; bytes, finished shards, events and staging are as they must be."""
        job = self.service.ended(self.job)
        assert job["state"] == "succeeded", (job["error"], self.service.http.get(f"/v1/jobs/{self.job}/logs").text)
        for path in sorted((self.expected / "expected").glob("*.safetensors")):
            assert (self.output / path.name).read_bytes() == path.read_bytes(), path.name
        for name, identity in self.finished.items():
            status = (self.output / name).stat()
            assert (status.st_ino, status.st_mtime_ns) == identity, f"{name} was made twice"
        events = self.service.events(self.job)
        assert [event["id"] for event in events] == list(range(1, len(events) + 1))
        told = [event["data"] for event in events if event["kind"] == "shard"]
        made = [data["file"] for data in told if not data["adopted"]]
        assert len(made) == len(set(made)), "a shard was finished twice"
        assert {data["file"] for data in told} == {file["name"] for file in job["result"]["files"]}
        assert events[-1]["kind"] == "succeeded"
        assert not (self.service.folder / JOBS).exists()

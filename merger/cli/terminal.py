"""What verbs share on a terminal: progress bars, sizes, options. Knows rich and click; knows nothing of models."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

from merger.receipt import Receipt
from merger.recipe import size_in_bytes
from merger.run import Progress

F = TypeVar("F", bound=Callable[..., Any])


class Size(click.ParamType[int]):
    """A number of bytes such as 512MiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return size_in_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
accept_license = click.option(
    "--accept-license",
    is_flag=True,
    help="The sources' licences were read: the result may be passed on.",
)


def _sign_in(_ctx: click.Context, _param: click.Parameter, token: str | None) -> None:
    """For this process and those that it starts, before the Hub's library looks."""
    if token:
        os.environ["HF_TOKEN"] = token


token = click.option(
    "--token",
    callback=_sign_in,
    expose_value=False,
    help="The token for the Hub; without, HF_TOKEN or that of `hf auth login`.",
)


def running_options(command: F) -> F:
    """The options of every verb that makes or plans a result."""
    for option in reversed(
        [
            click.option(
                "-o", "--output", metavar="PLACE", help="The folder to make, or hf://me/name; overrides the recipe."
            ),
            click.option("--memory", type=Size(), default="1GiB", show_default=True, help="Memory for buffers."),
            click.option("--threads", type=click.IntRange(1, 256), help="Threads; twice the processors without."),
            click.option(
                "--device",
                type=click.Choice(["auto", "cpu", "cuda"]),
                default="auto",
                show_default=True,
                help="Where matrices are decomposed, by methods that do: auto takes a GPU that torch sees.",
            ),
            click.option(
                "--parity",
                type=click.Choice(["auto", "full", "layers", "off"]),
                default="auto",
                show_default=True,
                help="How surgery is proven by logits: on whole models, on some layers, or as memory allows.",
            ),
            click.option(
                "--cache",
                type=click.Choice(["auto", "full"]),
                default="auto",
                show_default=True,
                help="Which remote files to download whole: those that are read more than once, or all.",
            ),
            token,
            click.option("--strict", is_flag=True, help="Refuse what would otherwise be a warning."),
            accept_license,
            as_json,
        ]
    ):
        command = option(command)
    return command


def gigabytes(count: float) -> str:
    """A number of bytes for people: 2.20 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} bytes"


def byte_bar(*, disable: bool = False) -> RichProgress:
    """A bar with bytes, speed and the time that is left, on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    more = (TransferSpeedColumn(), TimeRemainingColumn())
    return RichProgress(*columns, *more, console=Console(stderr=True), disable=disable)


def watching(*, quiet: bool) -> "Bar | Lines | Silent":
    """A bar on a terminal, plain lines in a log, nothing where the output is JSON."""
    if quiet:
        return Silent()
    return Bar() if sys.stderr.isatty() else Lines()


@contextlib.contextmanager
def phases(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Somewhere to say what is being done: a spinner on a terminal, plain lines in a log, nowhere for JSON."""
    if quiet:
        yield lambda _text: None
    elif sys.stderr.isatty():
        with Console(stderr=True).status("starting") as status:
            yield status.update
    else:
        yield _tell


class Silent(Progress):
    """Says nothing."""

    def begin(self, total: int, done: int) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def finished(self, receipt: Receipt) -> None:
        pass

    def phase(self, text: str) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        pass


class Bar(Silent):
    """A bar with bytes, speed and the time that is left, on standard error."""

    def __init__(self) -> None:
        self._bar = byte_bar()
        self._task = self._bar.add_task("planning", total=None)
        self._bar.start()

    def begin(self, total: int, done: int) -> None:
        self._bar.update(self._task, description="writing", total=total, completed=done)

    def advance(self, count: int) -> None:
        self._bar.advance(self._task, count)

    def phase(self, text: str) -> None:
        self._bar.update(self._task, description=text)

    def __exit__(self, *raised: Any) -> None:
        self._bar.stop()


class Lines(Silent):
    """A line every few seconds and one a shard, on standard error."""

    EVERY = 5.0  # seconds

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total = self._done = 0
        self._next = 0.0

    def begin(self, total: int, done: int) -> None:
        self._total, self._done = total, done
        self._began, self._first, self._next = time.monotonic(), done, time.monotonic() + self.EVERY
        resumed = f", {gigabytes(done)} are there from an earlier run" if done else ""
        _tell(f"writing {gigabytes(total)}{resumed}")

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now < self._next:
                return
            self._next = now + self.EVERY
            speed = (self._done - self._first) / (now - self._began)
        left = (self._total - self._done) / speed
        _tell(f"{gigabytes(self._done)} of {gigabytes(self._total)}, {speed / 1e9:.2f} GB/s, {left:.0f} s left")

    def finished(self, receipt: Receipt) -> None:
        _tell(f"finished {receipt.file}")

    def phase(self, text: str) -> None:
        _tell(text)


def _tell(line: str) -> None:
    """A line on standard error; work goes on where nobody reads it any more."""
    with contextlib.suppress(OSError):
        click.echo(line, err=True)

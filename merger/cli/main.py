"""The `merger` command. Knows its verbs and how errors reach a person; each verb is in a file of its own.

Verbs of higher floors join through the entry-point group `merger.verbs`.
"""

import atexit
import gc
import signal
import sys
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from types import FrameType
from typing import NoReturn

import click

import merger
from merger.errors import Interrupted, MergerError, exit_code

VERBS = {
    "run": "make the result of a recipe, going on where an earlier run stopped",
    "plan": "what a recipe would read, compute and write; no weight is read",
    "average": "average checkpoints without writing a recipe",
    "upcycle": "make a mixture of experts out of a dense model",
    "expand": "add layers that change nothing yet, to train them",
    "extract-lora": "the difference between two models as a LoRA adapter",
    "evaluate": "how well models predict held-out data; recipes too, without writing their results",
    "statistics": "what a model does on text, as files for merges that are informed by it",
    "connect": "the loss on the straight line between models",
    "stages": "the fine-tunings that a recipe asks for: what each starts from, on which data",
    "ratatouille": "the fine-tunings of Model Ratatouille, listed or done",
    "inspect": "tensors, dtypes and sizes of a model, from its headers",
    "diff": "how far two checkpoints are apart, layer by layer",
    "verify": "check a checkpoint: files, checksums, finite values",
    "methods": "the methods, their fields, papers and examples",
    "submit": "send a recipe to a job service",
    "secret": "tokens that jobs of a service use by name",
    "jobs": "list the jobs of a service",
    "job": "one job: state, progress, result, error",
    "watch": "follow a job until it has ended",
    "logs": "what the runners of a job wrote",
    "cancel": "stop a job",
    "retry": "try an ended job again, after its finished shards",
}
# What the help says of verbs that other packages bring.
HIGHER_VERBS = {"serve": "take jobs over HTTP: the API and a Ray cluster on this machine"}


class _Verbs(click.Group):
    """Verbs by name, each imported when it is used: `merger --help` loads none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*VERBS, *sorted(entry.name for entry in entry_points(group="merger.verbs"))]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in VERBS:
            return _command(import_module(f"merger.cli.{name.replace('-', '_')}").command)
        return next((_command(entry.load()) for entry in entry_points(group="merger.verbs", name=name)), None)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        close = get_close_matches(args[0], self.list_commands(ctx), 1)
        if close and close != args[:1]:
            ctx.fail(f"There is no verb {args[0]!r}. Did you mean {close[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        others = [(entry.name, HIGHER_VERBS.get(entry.name, "")) for entry in entry_points(group="merger.verbs")]
        with formatter.section("Verbs"):
            formatter.write_dl([*VERBS.items(), *others])


def _command(value: object) -> click.Command:
    if not isinstance(value, click.Command):
        raise TypeError(f"{value} is not a command")
    return value


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(merger.__version__, prog_name="merger")
def merger_command() -> None:
    """Make new model checkpoints out of old ones."""


def main() -> NoReturn:
    """Run the command and exit: 0 done, 1 the job failed, 2 the request was wrong, 130 interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)
    atexit.register(gc.freeze)  # a process that ends looks through a million objects for garbage: half a second
    try:
        merger_command(prog_name="merger", standalone_mode=False)
    except MergerError as error:
        _say(error)
        sys.exit(exit_code(error))
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        stopped = Interrupted("interrupted")
        _say(stopped)
        sys.exit(exit_code(stopped))
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    sys.exit(0)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _say(error: MergerError) -> None:
    click.echo(f"{click.style('error:', fg='red', bold=True)} {error}", err=True)

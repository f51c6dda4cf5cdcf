"""`merger statistics`: what a model does on text, as files for merges that are informed by it."""

from pathlib import Path
from typing import Any

import click

from merger.cli.terminal import F, Size, as_json, phases, token
from merger.errors import FormatError, RecipeError
from merger.judging import check_installed
from merger.sources import LocalSources
from merger.statistics import KINDS, MANIFEST, Kind, Manifest, manifest_in


def _options(command: F) -> F:
    for option in reversed(
        [
            click.option("--kind", type=click.Choice(KINDS), help="For `method: fisher`, or gram for `regmean`."),
            click.option("--data", multiple=True, metavar="FILE", help="Text, or JSONL; may be given several times."),
            click.option("-o", "--output", metavar="FOLDER", help="The folder to make."),
            click.option("--context", type=click.IntRange(2), help="Tokens of a window of text.  [default: 512]"),
            click.option("--limit", type=click.IntRange(1), help="The most windows to look at; all without."),
            click.option("--batch-size", type=click.IntRange(1), help="Windows at a time, for gram.  [default: 4]"),
            click.option(
                "--labels",
                type=click.Choice(["model", "data"]),
                help="fisher: of labels drawn from what the model predicts, or of the text itself.  [default: model]",
            ),
            click.option("--seed", type=click.IntRange(0), help="Of labels that are drawn.  [default: 0]"),
            click.option("--memory", type=Size(), help="gram: for matrices; the text is run again for more.  [4GiB]"),
            click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where.  [default: auto]"),
            token,
        ]
    ):
        command = option(command)
    return command


@click.command(name="statistics")
@click.argument("model")
@_options
@click.option("--check", is_flag=True, help="MODEL is a folder of statistics: see that its files are whole.")
@as_json
def command(model: str, kind: Kind | None, check: bool, as_json: bool, **options: Any) -> None:
    """Run MODEL, a causal language model, on text and keep statistics of it for `method: fisher` and `regmean`.

    They are files like a model's: keep them beside it, or publish them.
    """
    manifest = _checked(Path(model)) if check else _made(model, kind, options, quiet=as_json)
    if as_json:
        click.echo(manifest.model_dump_json(indent=2))
        return
    data, size = manifest.data, sum(file.size for file in manifest.files.values())
    click.echo(f"{manifest.kind} of {manifest.model.reference}: {data.tokens:,} tokens in {data.windows:,} windows")
    click.echo(f"{len(manifest.files)} files, {size:,} bytes; {len(manifest.without)} tensors have no statistics")


def _made(model: str, kind: Kind | None, options: dict[str, Any], *, quiet: bool) -> Manifest:
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if kind is None or "data" not in given or "output" not in given:
        name = "--kind" if kind is None else "--data" if "data" not in given else "-o"
        raise RecipeError("is missing", where=name, remedy="`merger statistics --help` has the options.")
    check_installed()
    from merger.gauging import Order, make_statistics

    output = Path(given.pop("output")).expanduser()
    files = tuple(Path(path).expanduser() for path in given.pop("data"))
    sources = LocalSources()
    [member] = sources.members([model])
    with phases(quiet=quiet) as tell:
        return make_statistics(sources.open(member), Order(kind=kind, data=files, **given), output, tell)


def _checked(folder: Path) -> Manifest:
    """The manifest of a folder whose files have the digests that it tells. Raises SourceError and FormatError."""
    from merger.gauging import sha256_of

    manifest = manifest_in(folder / MANIFEST)
    for name, file in manifest.files.items():
        if sha256_of(folder / name) != file.sha256:
            raise FormatError(f"is not the file that {MANIFEST} tells of", where=str(folder / name))
    return manifest

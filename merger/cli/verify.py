"""`merger verify`: whether a checkpoint is sound."""

import json
import sys
from pathlib import Path

import click

from merger.cli.terminal import as_json
from merger.run import prove
from merger.verify import check_folder


@click.command(name="verify")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--load", is_flag=True, help="Also load it with transformers, without memory for its weights.")
@click.option(
    "--parity", is_flag=True, help="Also compare its logits with those of the model that surgery made it from."
)
@as_json
def command(folder: Path, load: bool, parity: bool, as_json: bool) -> None:
    """Check the checkpoint in FOLDER, reading all of it: files, values and, where merger made it, checksums."""
    checks = check_folder(folder, load=load)
    if parity:
        checks.append(prove(folder))
    if as_json:
        click.echo(json.dumps([vars(check) for check in checks], indent=2))
    else:
        for check in checks:
            click.echo(f"{'passed' if check.passed else 'FAILED'}  {check.name}: {check.detail}")
    if not all(check.passed for check in checks):
        sys.exit(1)

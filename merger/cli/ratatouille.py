"""`merger ratatouille`: the fine-tunings that a recipe asks for, listed or done."""

import click

from merger.cli.run import command as run_command
from merger.cli.stages import command as stages_command


@click.group(name="ratatouille")
def command() -> None:
    """Model Ratatouille with its fine-tunings: which model every run starts from, and the runs themselves."""


command.add_command(stages_command, "plan")
command.add_command(run_command, "run")

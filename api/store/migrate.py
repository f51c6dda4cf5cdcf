"""Brings a database to the tables of this version: `python -m api.store.migrate`, before a new version starts.

Knows migrations; what they lead to, `api.store.tables` knows. It takes its time for a database that is not up yet, and
leaves one alone that a newer version has migrated already.
"""

import logging
import sys
import time
from pathlib import Path

import click
from alembic import command
from alembic.util import CommandError
from sqlalchemy import delete, exc, insert, text
from sqlalchemy.engine import Connection, Engine

from api.process import begin
from api.store.connections import WRITING, open_engine
from api.store.tables import CompatibilityRow
from api.store.versions import MIGRATIONS, config_of, head_of, is_newer, oldest_of, revision_of

_LOG = logging.getLogger(__name__)
_LOCK = 0x6D657267  # any number: one process migrates at a time


class TooNew(Exception):
    """The database has tables of a newer version, which this one cannot work with."""

    def __init__(self, revision: str) -> None:
        super().__init__(
            f"the database is at migration {revision}, which this version does not know and cannot work with; "
            "install the newer version again, or restore a backup of this one's tables"
        )


def migrate(engine: Engine, migrations: Path = MIGRATIONS) -> tuple[str | None, str | None]:
    """Make or change the tables; nothing is done where they are current, or newer. The migration before, and after.

    Raises TooNew.
    """
    with engine.execution_options(**{WRITING: True}).begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        before = revision_of(connection)
        if before == head_of(migrations) or (before and is_newer(connection, before, migrations)):
            return before, before
        _upgrade(connection, before, migrations)
        return before, revision_of(connection)


def _upgrade(connection: Connection, before: str | None, migrations: Path) -> None:
    config = config_of(migrations)
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:  # the revision is none of ours
        raise TooNew(str(before)) from error
    connection.execute(delete(CompatibilityRow))
    connection.execute(insert(CompatibilityRow).values(id=1, oldest=oldest_of(migrations)))


def _waiting(engine: Engine, seconds: float) -> tuple[str | None, str | None]:
    """Migrate as soon as the database answers. Raises OperationalError where it does not in time."""
    until, told = time.monotonic() + seconds, False
    while True:
        try:
            return migrate(engine)
        except exc.OperationalError as error:
            if time.monotonic() > until:
                raise
            if not told:
                _LOG.info("waiting for the database: %s", str(error).splitlines()[0])
            told = True
            time.sleep(1)


@click.command()
@click.option("--wait", type=float, default=60.0, show_default=True, help="Seconds for the database to come up.")
def main(wait: float) -> None:
    """Make or change the tables of the database in MERGER_DATABASE_URL; ends with 1 where that cannot be done."""
    engine = open_engine(begin().database_url)
    try:
        before, after = _waiting(engine, wait)
    except (exc.OperationalError, TooNew) as error:
        _LOG.error(str(error).splitlines()[0])
        sys.exit(1)
    finally:
        engine.dispose()
    if before == after:
        _LOG.info("nothing to do: the tables are at %s", after)
    else:
        _LOG.info("the tables went from %s to %s", before or "nothing", after)


if __name__ == "__main__":
    main()

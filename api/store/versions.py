"""Which tables a database has, and whether this version works on them. Knows migrations; changes nothing.

A database may be newer than this process: while the pods of a new version start, those of the old one still serve. Each
migration says which is the oldest one whose code still works (`oldest`), and the database keeps that word in the table
`compatibility`. So a process works on its own tables, and on newer ones whose `oldest` it knows.
"""

from functools import cache
from pathlib import Path

from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, select
from sqlalchemy.engine import Connection

from api.store.tables import CompatibilityRow

MIGRATIONS = Path(__file__).parent / "migrations"


def config_of(migrations: Path = MIGRATIONS) -> Config:
    """Alembic's configuration for a folder of migrations."""
    config = Config()
    config.set_main_option("script_location", str(migrations))
    return config


def revision_of(connection: Connection) -> str | None:
    """The migration that the database has reached, None for an empty one."""
    return MigrationContext.configure(connection).get_current_revision()


def head_of(migrations: Path = MIGRATIONS) -> str:
    """The last migration of a folder: the tables that this version knows."""
    return _scripts(migrations).get_current_head() or ""


def oldest_of(migrations: Path = MIGRATIONS) -> str:
    """The oldest migration whose code works on the tables of the last one."""
    return str(_scripts(migrations).get_revision(head_of(migrations)).module.oldest)


def works_on(connection: Connection, migrations: Path = MIGRATIONS) -> bool:
    """Whether the tables are those of this version, or newer ones that it can work with."""
    revision = revision_of(connection)
    return revision == head_of(migrations) or (revision is not None and is_newer(connection, revision, migrations))


def is_newer(connection: Connection, revision: str, migrations: Path = MIGRATIONS) -> bool:
    """Whether the tables are newer than this version, and say that it can work with them."""
    if revision in _known(migrations) or not inspect(connection).has_table(CompatibilityRow.__tablename__):
        return False
    return connection.scalar(select(CompatibilityRow.oldest)) in _known(migrations)


@cache
def _scripts(migrations: Path) -> ScriptDirectory:
    return ScriptDirectory.from_config(config_of(migrations))


@cache
def _known(migrations: Path) -> frozenset[str]:
    return frozenset(script.revision for script in _scripts(migrations).walk_revisions())

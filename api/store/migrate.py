"""Brings a database to the tables of this version. `python -m api.store.migrate URL` does it before new pods start."""

import sys
from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection, Engine

from api.store.connections import open_engine


def migrate(engine: Engine) -> None:
    """Make or change the tables; nothing is done where they are current."""
    config = _config()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def is_current(connection: Connection) -> bool:
    """Whether the tables are those of this version."""
    return MigrationContext.configure(connection).get_current_revision() == _head()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


@cache
def _head() -> str | None:
    return ScriptDirectory.from_config(_config()).get_current_head()


if __name__ == "__main__":
    migrate(open_engine(sys.argv[1]))

"""Migrations: they lead to the tables of the models, and back."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from api.store.migrate import _config, migrate
from api.store.sql import SqlStore
from api.store.store import Unavailable
from api.store.tables import Base


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'jobs.db'}"


@pytest.fixture
def store(url: str) -> Iterator[SqlStore]:
    store = SqlStore(url)
    yield store
    store.close()


def test_migrating_gives_the_tables_of_the_models_and_again_nothing(store: SqlStore) -> None:
    for _ in range(2):
        migrate(store.engine)
        with store.engine.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_a_database_without_the_tables_is_not_ready(store: SqlStore) -> None:
    with pytest.raises(Unavailable, match="another version"):
        store.check()
    migrate(store.engine)
    store.check()


def test_every_migration_goes_back(store: SqlStore) -> None:
    migrate(store.engine)
    config = _config()
    with store.engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    migrate(store.engine)
    store.check()


def test_the_command_migrates(url: str, store: SqlStore) -> None:
    subprocess.run([sys.executable, "-m", "api.store.migrate", url], check=True, capture_output=True)
    store.check()


def test_a_database_that_is_away_is_unavailable() -> None:
    store = SqlStore("postgresql://nobody@127.0.0.1:9/nothing")
    with pytest.raises(Unavailable):
        store.check()
    store.close()

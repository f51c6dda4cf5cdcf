"""Migrations: they lead to the tables of the models, and back; an older version works on the tables of a newer one."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text
from sqlalchemy.engine import Engine

from api.jobs import State
from api.machine import CancelAsked, Dispatched
from api.store.migrate import TooNew, migrate
from api.store.sql import SqlStore
from api.store.store import Unavailable
from api.store.tables import Base
from api.store.versions import MIGRATIONS, config_of, head_of, works_on
from tests.api.store.databases import database
from tests.api.store.test_store import job

HEAD = head_of()
LATER = '''
"""A later version: more tables, more columns."""

import sqlalchemy as sa
from alembic import op

revision = "9999"
down_revision = "{head}"
oldest = "{oldest}"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("region", sa.String(16), nullable=False, server_default="here"))
    op.add_column("attempts", sa.Column("node", sa.String(16), nullable=True))
    op.create_table("regions", sa.Column("name", sa.String(16), primary_key=True))


def downgrade() -> None:
    op.drop_table("regions")
'''


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with database(request.param, tmp_path) as url:
        yield url


@pytest.fixture
def store(url: str) -> Iterator[SqlStore]:
    store = SqlStore(url)
    yield store
    store.close()


def later(folder: Path, oldest: str) -> Path:
    """The migrations of a later version, with which that of `oldest` still works."""
    copy = folder / "migrations"
    shutil.copytree(MIGRATIONS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "versions" / "9999_later.py").write_text(LATER.format(head=HEAD, oldest=oldest).lstrip())
    return copy


def goes_to(engine: Engine, revision: str, migrations: Path = MIGRATIONS) -> None:
    config = config_of(migrations)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        (command.downgrade if revision == "base" else command.upgrade)(config, revision)


def test_migrating_gives_the_tables_of_the_models_and_again_nothing(store: SqlStore) -> None:
    for expected in ((None, HEAD), (HEAD, HEAD)):
        assert migrate(store.engine) == expected
        with store.engine.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_a_database_without_the_tables_is_not_ready_and_not_an_error(store: SqlStore) -> None:
    with pytest.raises(Unavailable, match="another version"):
        store.check()
    for ask in (store.active, store.counts, lambda: store.add(job())):
        with pytest.raises(Unavailable):
            ask()
    migrate(store.engine)
    store.check()
    assert store.active() == []


def test_a_database_without_a_column_is_not_ready_and_not_an_error(store: SqlStore) -> None:
    goes_to(store.engine, "0002")
    with pytest.raises(Unavailable, match="another version"):
        store.check()
    with pytest.raises(Unavailable):
        store.add_key("digest", "default", 1.0)


def test_every_migration_goes_back(store: SqlStore) -> None:
    migrate(store.engine)
    goes_to(store.engine, "base")
    migrate(store.engine)
    store.check()


def test_migrations_at_the_same_moment_take_turns(store: SqlStore) -> None:
    barrier = Barrier(4)

    def go(_: int) -> tuple[str | None, str | None]:
        barrier.wait()
        return migrate(store.engine)

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(go, range(4)), key=str) == [(HEAD, HEAD)] * 3 + [(None, HEAD)]


# ---- two versions at once -----------------------------------------------------------------------------


@pytest.mark.parametrize("oldest", [HEAD, "0002"])
def test_this_version_works_on_newer_tables_that_say_so(store: SqlStore, tmp_path: Path, oldest: str) -> None:
    migrate(store.engine)
    before, _ = store.add(job())
    newer = later(tmp_path, oldest)
    assert migrate(store.engine, newer) == (HEAD, "9999")
    store.check()
    after, _ = store.add(job())
    for one in (before, after):
        started = store.change(one.id, Dispatched(2.0, "code"))
        assert store.get(one.id) == started
        assert store.change(one.id, CancelAsked(3.0)).state is State.CANCELING
    assert len(store.events(after.id)) == 3
    store.add_key("digest", "p", 1.0)
    assert store.project_of("digest") == "p"
    with store.engine.connect() as connection:
        assert set(connection.scalars(text("SELECT region FROM jobs"))) == {"here"}


def test_newer_tables_that_are_too_new_are_not_ready(store: SqlStore, tmp_path: Path) -> None:
    migrate(store.engine)
    migrate(store.engine, later(tmp_path, "9999"))
    with pytest.raises(Unavailable, match="another version"):
        store.check()
    with pytest.raises(TooNew, match="9999"):
        migrate(store.engine)


def test_a_newer_version_is_not_ready_before_its_migration(store: SqlStore, tmp_path: Path) -> None:
    migrate(store.engine)
    with store.engine.connect() as connection:
        assert works_on(connection)
        assert not works_on(connection, later(tmp_path, HEAD))


def test_migrating_back_leaves_newer_tables_alone(store: SqlStore, tmp_path: Path) -> None:
    """As a rollback does, which runs the migrations of the version before."""
    migrate(store.engine)
    migrate(store.engine, later(tmp_path, HEAD))
    assert migrate(store.engine) == ("9999", "9999")
    assert inspect(store.engine).has_table("regions")
    store.check()


def test_a_foreign_revision_is_refused(store: SqlStore) -> None:
    migrate(store.engine)
    with store.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'another'"))
        connection.execute(text("DELETE FROM compatibility"))
    with pytest.raises(Unavailable):
        store.check()
    with pytest.raises(TooNew):
        migrate(store.engine)


def columns(engine: Engine) -> dict[tuple[str, str], tuple[str, bool]]:
    """Type and nullability of each column; whether a new row may leave it out."""
    seen = inspect(engine)
    return {
        (table, column["name"]): (str(column["type"]), bool(column["nullable"] or column["default"]))
        for table in seen.get_table_names()
        if table != "alembic_version"
        for column in seen.get_columns(table)
    }


def broken(engine: Engine, migrations: Path) -> list[str]:
    """What migrations take away from versions that, they say, still work."""
    found, seen = [], dict[str, dict[tuple[str, str], tuple[str, bool]]]()
    for script in list(ScriptDirectory.from_config(config_of(migrations)).walk_revisions())[::-1]:
        goes_to(engine, script.revision, migrations)
        after = seen[script.revision] = columns(engine)
        known = seen[script.module.oldest]
        found += [f"{script.revision} changes {key}" for key in known if after.get(key) != known[key]]
        tables = {table for table, _ in known}
        needed = [key for key in after.keys() - known.keys() if key[0] in tables and not after[key][1]]
        found += [f"{script.revision} needs {key}" for key in needed]
    return found


def test_migrations_only_add_to_what_the_versions_that_still_work_know(store: SqlStore) -> None:
    assert broken(store.engine, MIGRATIONS) == []
    scripts = ScriptDirectory.from_config(config_of()).walk_revisions()
    assert all(script.module.oldest <= (script.down_revision or script.revision) for script in scripts)


def test_one_that_takes_away_would_be_found(store: SqlStore, tmp_path: Path) -> None:
    copy = later(tmp_path, HEAD)
    path = copy / "versions" / "9999_later.py"
    text_ = path.read_text().replace('nullable=False, server_default="here"', "nullable=False")
    path.write_text(text_.replace("    op.create_table", '    op.drop_column("api_keys", "name")\n    op.create_table'))
    assert broken(store.engine, copy) == ["9999 changes ('api_keys', 'name')", "9999 needs ('jobs', 'region')"]


# ---- the command --------------------------------------------------------------------------------------


def run(url: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MERGER_DATABASE_URL": url}
    command = [sys.executable, "-m", "api.store.migrate", *words]
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True)


def test_the_command_migrates_the_database_of_the_settings(url: str, store: SqlStore) -> None:
    for told in (f"from nothing to {HEAD}", "nothing to do"):
        done = run(url)
        assert done.returncode == 0, done.stderr
        assert told in done.stderr
        store.check()


def test_the_command_says_that_the_database_is_away() -> None:
    done = run("postgresql://nobody:hidden@127.0.0.1:9/nothing", "--wait", "0")
    assert done.returncode == 1
    assert "refused" in done.stderr
    assert "Traceback" not in done.stderr
    assert "hidden" not in done.stderr


def test_the_command_refuses_a_url_as_an_argument(url: str) -> None:
    assert run(url, url).returncode == 2


def test_a_database_that_is_away_is_unavailable() -> None:
    store = SqlStore("postgresql://nobody@127.0.0.1:9/nothing")
    with pytest.raises(Unavailable):
        store.check()
    store.close()

"""Connections to a SQL database. Knows how SQLite and PostgreSQL want to be opened; knows no tables."""

from typing import Any

from sqlalchemy import create_engine, event
from sqlalchemy.engine import Engine, make_url

WRITING = "merger_writing"  # the execution option of transactions that will write


def open_engine(url: str) -> Engine:
    """Connections to the database at `url`, such as sqlite:///jobs.db or postgresql://user@host/name."""
    address = make_url(url)
    if address.drivername in ("postgres", "postgresql"):
        address = address.set(drivername="postgresql+psycopg")
    if address.get_backend_name() != "sqlite":
        return create_engine(
            address,
            pool_pre_ping=True,
            pool_size=10,
            max_overflow=10,
            pool_timeout=10,
            connect_args={"connect_timeout": 5},
        )
    engine = create_engine(address, pool_size=10, max_overflow=10, connect_args={"timeout": 30})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin where `_begin_sqlite` says
    for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {setting}").close()


def _begin_sqlite(connection: Any) -> None:
    """Writers queue up at once: two readers that turn to writing would fail instead of waiting."""
    writing = connection.get_execution_options().get(WRITING, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

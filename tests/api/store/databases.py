"""Empty databases for tests: SQLite in a file, and a schema of its own in a PostgreSQL that somebody has named."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text

from api.store.connections import open_engine


@contextmanager
def database(kind: str, folder: Path) -> Iterator[str]:
    """The URL of an empty database. The test is skipped where MERGER_TEST_DATABASE_URL names no PostgreSQL."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'jobs.db'}"
        return
    url = os.environ.get("MERGER_TEST_DATABASE_URL")
    if not url:
        pytest.skip("MERGER_TEST_DATABASE_URL names no PostgreSQL")
    schema = f"test_{uuid.uuid4().hex}"
    server = open_engine(url)
    with server.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
    try:
        yield f"{url}{'&' if '?' in url else '?'}options=-csearch_path%3D{schema}"
    finally:
        with server.begin() as connection:
            connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
        server.dispose()

"""`python -m api.keys`: the keys of clients, from inside a pod of the API. Knows the store; knows no HTTP."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import click

from api.context import new_key
from api.dispatcher import digest
from api.process import begin
from api.store.sql import SqlStore
from api.store.store import ClientKey, Store, Unavailable


@contextmanager
def _store() -> Iterator[Store]:
    store = SqlStore(begin().database_url)
    try:
        yield store
    except Unavailable as error:
        raise click.ClickException(f"the database does not answer: {error}") from error
    finally:
        store.close()


@click.group()
def main() -> None:
    """Admit clients, list them, and admit them no longer. The database is that of MERGER_DATABASE_URL."""


@main.command()
@click.argument("name")
@click.option("--project", default="default", show_default=True, help="Whose jobs and secrets it opens.")
def add(name: str, project: str) -> None:
    """Make a key that a person calls NAME, and print it: this once, because only its digest is kept."""
    if not 0 < len(name) <= 63:
        raise click.BadParameter("has 1 to 63 characters", param_hint="NAME")
    key = new_key()
    with _store() as store:
        store.add_key(digest(key), project, time.time(), name)
    click.echo(key)


@main.command("list")
def list_() -> None:
    """The keys that are admitted: id, project, day, name. MERGER_API_KEY is none of them."""
    with _store() as store:
        for key in store.client_keys():
            day = datetime.fromtimestamp(key.created_at, UTC).date().isoformat()
            click.echo("\t".join((key.id, key.project, day, key.name or "-")))


@main.command()
@click.argument("id")
def revoke(id: str) -> None:
    """Admit a key no longer: from now on, on every replica. ID is what `list` shows."""
    with _store() as store:
        found = [key for key in store.client_keys() if len(id) >= 6 and key.digest.startswith(id.lower())]
        if len(found) != 1:
            raise click.ClickException(f"{id} is the id of {len(found) or 'no'} keys; `list` shows them")
        store.remove_key(found[0].digest)
    click.echo(f"revoked {_told(found[0])}")


def _told(key: ClientKey) -> str:
    return f"{key.id} ({key.name or 'without a name'}, {key.project})"


if __name__ == "__main__":
    main()

"""`merger serve`: the whole service on one machine. Knows the order in which its parts start and stop."""

import fcntl
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import httpx2
from cryptography.fernet import Fernet
from pydantic import SecretStr

from api import keeper
from api.app import create_app
from api.context import new_key
from api.dispatcher import digest
from api.process import warn_of_unknown
from api.ray_jobs import RayJobs, RayUnreachable, connect
from api.server import Server, listening
from api.settings import Settings, read_settings
from api.store.migrate import migrate
from api.store.sql import SqlStore
from merger.errors import OutputOccupied, RequestError

_LONG = 20.0  # seconds
_SECRET_KEY = "secret.key"


@click.command(name="serve")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 for any free one.")
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("merger-data"),
    show_default=True,
    help="The folder of the database and of Ray's files.",
)
def command(host: str, port: int, data: Path) -> None:
    """Take jobs over HTTP: the API, its database, and a Ray of its own, on this machine.

    Prints `ready http://...` when it takes jobs. The first start makes an API key and prints it once; MERGER_API_KEY
    admits another. Named secrets are encrypted with a key that is made and kept in --data, or with MERGER_SECRET_KEYS.
    Recipes may read and write below the folder in which this was started and below --data; MERGER_SOURCE_ROOTS and
    MERGER_OUTPUT_ROOTS say otherwise.
    """
    data = data.absolute()
    data.mkdir(parents=True, exist_ok=True)
    with _alone_in(data), listening(host, port) as listener:
        _serve(data, host, listener)


@contextmanager
def _alone_in(data: Path) -> Iterator[None]:
    """Hold the data folder. Raises OutputOccupied where another server does."""
    with (data / keeper.LOCK).open("a") as file:
        until = time.monotonic() + 2
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:  # a keeper looks for a moment at a time
                if time.monotonic() > until:
                    remedy = "Stop that one, or give another --data."
                    raise OutputOccupied("is used by another `merger serve`", where=str(data), remedy=remedy) from error
                time.sleep(0.05)
        yield


def _serve(data: Path, host: str, listener: socket.socket) -> None:
    reachable = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    url = f"http://{reachable}:{listener.getsockname()[1]}"
    settings = _settings(data, url)
    cluster = None if os.environ.get("MERGER_RAY_URL") else keeper.ensure(data)
    if cluster:
        settings = settings.model_copy(update={"ray_url": cluster.url, "ray_token": SecretStr(cluster.token)})
    store = SqlStore(settings.database_url)
    try:
        migrate(store.engine)
        _admit_first_client(store, settings)
        with connect(settings) as ray:
            app = create_app(settings, store, ray)
            server = Server(app, settings.grace_seconds, app.state.context.stopping, "warning")
            threading.Thread(target=_announce, args=(server, ray, url), daemon=True).start()
            with suppress(KeyboardInterrupt):  # raised again by uvicorn after it has shut down in order
                server.run(sockets=[listener])
    finally:
        store.close()
        if cluster:
            keeper.end(data)


def _settings(data: Path, url: str) -> Settings:
    """What the environment says, and the rest as one machine needs it."""
    here = Path.cwd()
    own: dict[str, Any] = {
        "database_url": f"sqlite:///{data / 'jobs.db'}",
        "url": url,
        "python": sys.executable,
        "working_folder": here,
        "source_roots": (here, data),
        "output_roots": (here, data),
        "grace_seconds": 3.0,
    }
    if not {"MERGER_DATABASE_URL", "MERGER_SECRET_KEYS"} & os.environ.keys():
        own["secret_keys"] = (_secret_key(data),)  # a database that others use needs a key that they all have
    warn_of_unknown()
    return read_settings(**{name: value for name, value in own.items() if f"MERGER_{name.upper()}" not in os.environ})


def _secret_key(data: Path) -> str:
    """The key of this machine's secrets, made at the first start: beside the database, readable for its owner."""
    path = data / _SECRET_KEY
    if not path.exists():
        keeper.write_secret(path, Fernet.generate_key().decode())
    key = path.read_text().strip()
    try:
        Fernet(key)
    except ValueError:
        remedy = "Put the right one there, or remove the file and store all secrets again."
        raise RequestError("is no Fernet key", where=str(path), remedy=remedy) from None
    return key


def _admit_first_client(store: SqlStore, settings: Settings) -> None:
    if settings.api_key is None and not store.has_keys():
        key = new_key()
        store.add_key(digest(key), "default", time.time())
        click.echo(f"A key for your clients, shown this once:\n  export MERGER_API_KEY={key}", err=True)


def _announce(server: Server, ray: RayJobs, url: str) -> None:
    """Say that jobs are taken, once they are; and what is missing, where that takes long."""
    began, told = time.monotonic(), False
    while not (server.started and _answers(ray, url)):
        if not told and time.monotonic() - began > _LONG:
            click.echo(f"still waiting for Ray at {ray.url}", err=True)
            told = True
        time.sleep(0.05)
    click.echo(f"ready {url}")


def _answers(ray: RayJobs, url: str) -> bool:
    try:
        return bool(ray.nodes()) and httpx2.get(f"{url}/readyz", trust_env=False).is_success
    except (RayUnreachable, httpx2.HTTPError):
        return False

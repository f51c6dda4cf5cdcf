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
from types import FrameType
from typing import Any

import click
import httpx2
import uvicorn
from cryptography.fernet import Fernet
from pydantic import SecretStr, ValidationError

from api import keeper
from api.app import create_app
from api.context import new_key
from api.dispatcher import digest
from api.ray_jobs import RayJobs, RayUnreachable
from api.settings import Settings
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
    with _alone_in(data), _listening(host, port) as listener:
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


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket that says it is TCP: only then does asyncio send small answers without delay."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        remedy = "Choose another --host or --port."
        raise RequestError(f"cannot listen: {error.strerror}", where=f"{host}:{port}", remedy=remedy) from error
    with listener:
        yield listener


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
        token = settings.ray_token.get_secret_value() if settings.ray_token else None
        with RayJobs(settings.ray_url, token) as ray:
            app = create_app(settings, store, ray)
            server = _Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3))
            threading.Thread(target=_announce, args=(server, ray, url), daemon=True).start()
            with suppress(KeyboardInterrupt):  # raised again by uvicorn after it has shut down in order
                server.run(sockets=[listener])
    finally:
        store.close()
        if cluster:
            keeper.end(data)


class _Server(uvicorn.Server):
    """Tells streams to end before it waits for them."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.config.app.state.context.stopping.set()  # type: ignore[union-attr]
        super().handle_exit(sig, frame)


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
    }
    if not {"MERGER_DATABASE_URL", "MERGER_SECRET_KEYS"} & os.environ.keys():
        own["secret_keys"] = (_secret_key(data),)  # a database that others use needs a key that they all have
    try:
        return Settings(**{name: value for name, value in own.items() if f"MERGER_{name.upper()}" not in os.environ})
    except ValidationError as error:
        first = error.errors()[0]
        raise RequestError(first["msg"], where=f"MERGER_{str(first['loc'][0]).upper()}") from error


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


def _announce(server: uvicorn.Server, ray: RayJobs, url: str) -> None:
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

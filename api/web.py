"""`python -m api.web`: the API alone, over HTTP. Knows what it is made of; another process dispatches."""

import os

import click

from api.app import create_app
from api.process import begin, refusals
from api.ray_jobs import connect
from api.server import Server, listening
from api.store.sql import SqlStore


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 for any free one.")
def main(host: str, port: int) -> None:
    """Take jobs over HTTP; `python -m api.dispatching` runs them. Settings are MERGER_ variables."""
    settings = begin()
    # Sources are looked up as they are written, here as in a runner.
    os.chdir(settings.working_folder)
    store = SqlStore(settings.database_url)
    with refusals(), listening(host, port) as listener, connect(settings) as ray:
        app = create_app(settings, store, ray, dispatching=False)
        Server(app, settings.grace_seconds, app.state.context.stopping).run(sockets=[listener])


if __name__ == "__main__":
    main()

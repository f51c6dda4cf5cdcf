"""How a process of the service begins: its settings, its log, and what is wrong with its environment.

Knows the environment; knows nothing of what the process does.
"""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from api.logs import log_as_json
from api.settings import Settings, read_settings, unknown_in
from merger.errors import RequestError

_LOG = logging.getLogger(__name__)


def begin() -> Settings:
    """The settings of this process, whose log is JSON from here on. Ends it with 2 where the environment is wrong."""
    signal.signal(signal.SIGTERM, _end)
    with refusals():
        settings = read_settings()
    log_as_json(settings.log_level)
    warn_of_unknown()
    return settings


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    """To be asked to end is no failure. As the first process of a container nothing else would even be heard."""
    sys.exit(0)


def warn_of_unknown() -> None:
    """Tell of variables that look like settings and are none."""
    for text in unknown_in(os.environ):
        _LOG.warning(text)


@contextmanager
def refusals() -> Iterator[None]:
    """A wrong request ends the process with 2 and its message."""
    try:
        yield
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  (there is no log yet)
        sys.exit(2)

"""How long a server that fails is asked again. Knows delays and answers that may pass, not what is asked."""

import random
import re
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from merger.errors import JobError, ReadFailed

T = TypeVar("T")
TRIES = 8  # in a row that bring nothing
_FIRST, _LONGEST = 0.5, 20.0  # seconds; doubled each time
_LONGEST_ASKED = 310.0  # seconds that a server may ask for: the Hub counts requests in windows of five minutes
PASSING = {408, 425, 429, 500, 502, 503, 504}  # answers that another try may change


class Again(Exception):
    """A failure that may pass. `delay` is how many seconds the server asked to wait; `tries` after how many such
    failures in a row it is given up.
    """

    def __init__(self, reason: str, delay: float | None = None, tries: int = TRIES) -> None:
        super().__init__(reason)
        self.delay, self.tries = delay, tries


class Patience:
    """Counts the tries of one task and waits between them; bytes that arrive make it new."""

    def __init__(self, where: str, failure: type[JobError] = ReadFailed) -> None:
        self._where, self._failure, self._failed = where, failure, 0

    def renew(self) -> None:
        """Something arrived: the task gets on."""
        self._failed = 0

    def spend(self, failure: Again) -> None:
        """Wait before the next try. Raises ReadFailed, or what else it was made with, where that was the last."""
        self._failed += 1
        if self._failed >= failure.tries:
            times = f"failed {self._failed} times, the last time: " if failure.tries == TRIES else ""
            raise self._failure(
                f"{times}{failure}",
                where=self._where,
                remedy="Run the same command again later: it goes on after the last finished shard.",
            ) from failure
        own = min(_LONGEST, _FIRST * 2 ** (self._failed - 1)) * random.uniform(0.5, 1.0)
        time.sleep(own if failure.delay is None else min(failure.delay + own / 4, _LONGEST_ASKED))


def persist(ask: Callable[[], T], where: str, failure: type[JobError] = ReadFailed) -> T:
    """What `ask` returns, asked again while it raises Again. Raises ReadFailed, or what is given, in the end."""
    patience = Patience(where, failure)
    while True:
        try:
            return ask()
        except Again as passing:
            patience.spend(passing)


def asked_delay(headers: Mapping[str, str]) -> float | None:
    """The seconds that an answer asks to wait: `Retry-After`, or `t` of the Hub's `RateLimit: "api";r=0;t=42`, which
    means only where no request remains (`r`): other answers have that header too.
    """
    limits = headers.get("ratelimit", "").replace(" ", "").split(",")
    spent = (re.fullmatch(r".*;r=0;t=(\d+)", limit) for limit in limits)
    asked = [headers.get("retry-after", ""), *(found[1] for found in spent if found)]
    return next((float(seconds) for seconds in asked if seconds.isdecimal()), None)

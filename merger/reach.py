"""What may be read on somebody's behalf. Knows folders and a token; opens nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merger.secret import Token


@dataclass(frozen=True)
class Reach:
    """Folders below `roots` (everywhere without), and the Hub with the process's own token or, unless `own_token`, with
    the given one or none. It can be pickled, and sent to a process that reads for this one.
    """

    roots: tuple[str, ...] = ()
    own_token: bool = True
    token: Token | None = None

    def as_data(self) -> dict[str, Any]:
        """For another process's standard input, its token in plain text."""
        return {**vars(self), "token": self.token.reveal() if self.token else None}


OWN = Reach()  # of a person on this machine


def reach_of(data: Mapping[str, Any]) -> Reach:
    """The reach that was sent so."""
    token = data["token"]
    return Reach(tuple(data["roots"]), data["own_token"], Token(token) if token else None)

"""Ranges of files in Xet storage, by the Hub's own client. Knows `hf_xet`; knows nothing of models.

The client asks again what fails and renews its own tokens: one request to the Hub for each repository and process. It
does not check the bytes of a range by their hashes (hf_xet 1.8): they are as good as the connection.
"""

import os
import threading
from dataclasses import dataclass
from typing import Any

from merger.secret import Token
from merger.storage.patience import Again, Patience

# Bytes that the client may hold for all its streams together: what they give is copied out at once.
_BUFFER = 64 << 20
_SETTINGS = {
    "reconstruction.min_reconstruction_fetch_size": 32 << 20,
    "reconstruction.min_prefetch_buffer": 32 << 20,
    "reconstruction.download_buffer_size": _BUFFER,
    "reconstruction.download_buffer_perfile_size": _BUFFER // 4,
    "reconstruction.download_buffer_limit": 2 * _BUFFER,
    "client.read_timeout": "60s",
    "client.connect_timeout": "15s",
    "telemetry.enabled": False,
}


@dataclass(frozen=True)
class XetRepository:
    """Where a repository's read tokens come from, at one commit, and the token that they are asked for with."""

    refresh_url: str
    token: Token | None


class _Groups:
    """The streams' groups of this process: each costs a request to the Hub. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = 0
        self._session: Any = None
        self._groups: dict[XetRepository, Any] = {}

    def of(self, repository: XetRepository) -> Any:
        with self._lock:
            if self._process != os.getpid():
                self._process, self._session, self._groups = os.getpid(), _session(), {}
            if repository not in self._groups:
                token = repository.token
                headers = {"Authorization": f"Bearer {token.reveal()}"} if token else {}
                self._groups[repository] = self._session.new_download_stream_group(
                    token_refresh_url=repository.refresh_url, token_refresh_headers=headers
                )
            return self._groups[repository]

    def drop(self, repository: XetRepository) -> None:
        """Forget a group that failed."""
        with self._lock:
            self._groups.pop(repository, None)


_GROUPS = _Groups()


def _session() -> Any:
    import hf_xet  # a large library that starts threads

    config = hf_xet.XetConfig()
    for key, value in _SETTINGS.items():
        config = config.with_config(key, value)
    return hf_xet.XetSession(config)


def fetch(repository: XetRepository, xet_hash: str, where: str, size: int, start: int, into: memoryview) -> None:
    """Fill `into` with the bytes from `start` on of a file, named by its hash. Raises ReadFailed."""
    import hf_xet

    patience, done = Patience(where), 0
    while done < len(into):
        try:
            file = hf_xet.XetFileInfo(xet_hash, size)
            for piece in _GROUPS.of(repository).download_stream(file, start + done, start + len(into)):
                into[done : done + len(piece)] = piece
                done += len(piece)
                patience.renew()
            if done < len(into):
                raise Again(f"the stream ended after {done:,} of {len(into):,} bytes")
        except (RuntimeError, OSError, ValueError, hf_xet.XetAuthenticationError) as error:
            _GROUPS.drop(repository)
            patience.spend(Again(f"{type(error).__name__}: {error}"))
        except Again as failure:
            patience.spend(failure)

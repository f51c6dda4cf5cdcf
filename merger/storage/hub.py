"""Models on the Hugging Face Hub, or on a server that speaks as it does. Knows repositories, commits and trees.

A revision is pinned to a commit when it is opened; everything is read at that commit. The token goes to the endpoint
and nowhere else.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from merger.errors import FormatError, JobError, MergerError, ReadFailed, SourceError
from merger.remote import Remote
from merger.secret import Token
from merger.storage import xet
from merger.storage.disk import write_atomically
from merger.storage.patience import PASSING, Again, asked_delay, persist
from merger.storage.place import Place, WeightFile, beginning_of
from merger.storage.reference import Reference
from merger.storage.safetensors import header_of

if TYPE_CHECKING:
    import httpx2

    from merger.storage import ranges

T = TypeVar("T")
_CHUNK = 8 << 20
_LARGEST_INDEX = 64 << 20  # bytes
_HOW = "--token or HF_TOKEN; with `merger submit` --hub-token-secret"  # a token is given
_TIMEOUT = {"connect": 15.0, "read": 60.0, "write": 60.0, "pool": 60.0}  # seconds


def _ranges() -> Any:
    """`merger.storage.ranges`, imported where something is on the Hub."""
    from merger.storage import ranges  # urllib3

    return ranges


@cache
def library() -> Any:
    """`huggingface_hub`, its requests bounded in time, without progress bars and telemetry."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_UPDATE_CHECK"):
        os.environ.setdefault(name, "1")
    import httpx2  # a third of a second, with the next
    import huggingface_hub
    from huggingface_hub.utils._http import hf_request_event_hook

    def bound(request: Any) -> None:
        limits = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {key: limits.get(key) or value for key, value in _TIMEOUT.items()}

    huggingface_hub.set_client_factory(
        lambda: httpx2.Client(event_hooks={"request": [hf_request_event_hook, bound]}, follow_redirects=True)
    )
    return huggingface_hub


@dataclass(frozen=True)
class Access:
    """A Hub, and with which token it is asked."""

    endpoint: str
    token: Token | None = None

    def api(self) -> Any:
        """The library's client for it."""
        token = self.token.reveal() if self.token else False
        return library().HfApi(endpoint=self.endpoint, token=token, library_name="merger")


def own_access() -> Access:
    """The Hub that the environment names, with the token of the environment or of a login."""
    found = library().get_token()
    return Access(library().constants.ENDPOINT, Token(found) if found else None)


def access_for(token: Token | None) -> Access:
    """The Hub that the environment names, with this token or none: never with the process's own."""
    return Access(library().constants.ENDPOINT, token)


# ---- asking -------------------------------------------------------------------------------------------


def asked(ask: Callable[[], T], where: str, failure: type[JobError] = ReadFailed) -> T:
    """What a call of the library returns, tried again where that may help.

    Raises SourceError where the Hub refuses, ReadFailed (or what is given) where it fails.
    """

    def once() -> T:
        with explained(where):
            return ask()

    return persist(once, where, failure)


@contextmanager
def explained(where: str) -> Iterator[None]:
    """The library's exceptions as our own. Raises SourceError, ReadFailed and Again."""
    import httpx2
    from huggingface_hub import errors

    failure: BaseException | None = None
    try:
        yield
    except errors.GatedRepoError as error:
        raise SourceError(
            "is gated, and the token may not read it",
            where=where,
            remedy=f"Accept its terms on its page, and give the token of that account ({_HOW}).",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            "is not on the Hub, or is private",
            where=where,
            remedy=f"Check the name; for a private repository give a token that may read it ({_HOW}).",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError("has no such revision", where=where, remedy="Check the branch, tag or commit.") from error
    except errors.LocalEntryNotFoundError as error:  # it was looked for in the cache because the Hub gave no answer
        failure = error.__cause__ or ConnectionError(str(error))
    except errors.EntryNotFoundError as error:
        raise SourceError("has no such file or folder", where=where) from error
    except errors.HfHubHTTPError as error:
        raise _of_answer(error.response, where, str(error)) from error
    except errors.OfflineModeIsEnabled as error:
        remedy = "Unset HF_HUB_OFFLINE."
        raise SourceError("may not be asked for: huggingface_hub is offline", where=where, remedy=remedy) from error
    except httpx2.ConnectError as error:
        raise Again(f"the Hub cannot be reached ({error})", tries=2) from error
    except (httpx2.HTTPError, errors.FileMetadataError, ConnectionError) as error:
        raise Again(f"{type(error).__name__}: {error}") from error
    except OSError as error:
        raise ReadFailed(f"cannot be stored: {error.strerror}", where=str(error.filename or where)) from error
    if failure:
        with explained(where):
            raise failure


def _of_answer(answer: "httpx2.Response | None", where: str, says: str) -> MergerError | Again:
    if answer is None or answer.status_code in PASSING:
        return Again(says, asked_delay(answer.headers) if answer is not None else None)
    if answer.status_code in (401, 403):
        message = answer.headers.get("x-error-message") or "the token may not do that"
        remedy = "Give another token (--token or HF_TOKEN), or log in again: hf auth login."
        return SourceError(f"HTTP {answer.status_code}: {message}", where=where, remedy=remedy)
    return ReadFailed(f"HTTP {answer.status_code}: {says}", where=where)


# ---- files --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HubFile(Remote):
    """A file of a repository at a commit, as the tree at that commit describes it: bytes, sha256 (of a large file) or
    git's sha1, and its hash in Xet storage where it has one.
    """

    repository: str
    commit: str
    path: str
    size: int
    git_sha1: str
    sha256: str | None
    xet_hash: str | None
    access: Access = field(repr=False)
    resolved: "ranges.Address | None" = field(default=None, repr=False)  # what another process has asked for already

    @property
    def address(self) -> str:
        return f"hf://{self.repository}@{self.commit}/{self.path}"

    @property
    def url(self) -> str:
        """What it is resolved from."""
        return f"{self.access.endpoint}/{self.repository}/resolve/{self.commit}/{quote(self.path)}"

    def fetch(self, start: int, into: memoryview) -> None:
        if self.xet_hash and _uses_xet():
            refresh = f"{self.access.endpoint}/api/models/{self.repository}/xet-read-token/{self.commit}"
            repository = xet.XetRepository(refresh, self.access.token)
            xet.fetch(repository, self.xet_hash, self.address, self.size, start, into)
            return
        if self.resolved:
            _ranges().ADDRESSES.learn(self.url, self.access.token, self.resolved)
        _ranges().fetch(self.url, self.access.token, self.size, start, into)

    def download(self) -> Path:
        """The whole file in the cache of `huggingface_hub`; its content is compared with the tree's hash once."""
        token = self.access.token.reveal() if self.access.token else False

        def load() -> str:
            try:
                return str(
                    library().hf_hub_download(
                        self.repository, self.path, revision=self.commit, endpoint=self.access.endpoint, token=token
                    )
                )
            except RuntimeError as error:  # of hf_xet
                raise Again(str(error)) from error

        path = Path(asked(load, self.address))
        _check_once(path, self)
        return path

    def __getstate__(self) -> dict[str, Any]:
        """With the address that this process knows, so that the next one need not ask for it."""
        known = _ranges().ADDRESSES.known(self.url, self.access.token) or self.resolved
        shared = known if known and known.token is None else None
        return {**self.__dict__, "resolved": shared}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)


def _uses_xet() -> bool:
    return not library().constants.HF_HUB_DISABLE_XET


def _check_once(path: Path, file: HubFile) -> None:
    """Compare a cached file with the tree's hash, and note that it was done beside the cache.

    Raises ReadFailed where it is another file.
    """
    stat = path.stat()
    seen = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
    note = Path(library().constants.HF_HUB_CACHE) / ".merger-checked" / (file.sha256 or file.git_sha1)
    if note.is_file() and note.read_text() == seen:
        return
    found = _sha256(path) if file.sha256 else _git_sha1(path)
    if found != (file.sha256 or file.git_sha1):
        raise ReadFailed(
            f"is not the file that the Hub has at {file.address}",
            where=str(path.resolve()),  # a link to it would lead there again
            remedy="The cache is damaged: remove that file and run again.",
        )
    with suppress(OSError):  # a cache that may only be read
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(seen)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_sha1(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# ---- folders ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Repository:
    """A repository at a commit."""

    name: str
    commit: str
    gated: bool
    access: Access = field(repr=False)


def pinned(reference: Reference, access: Access) -> Repository:
    """The repository of a reference at the commit that its revision names now.

    Raises SourceError where there is none, where it was renamed or needs another token.
    """
    info = asked(lambda: access.api().model_info(reference.repository, revision=reference.revision), str(reference))
    if info.id != reference.repository:
        raise SourceError(
            f"was renamed to {info.id}",
            where=str(reference),
            remedy="Write the new name, if that is the model you mean: old names can be taken over by others.",
        )
    if info.gated:
        asked(lambda: access.api().auth_check(reference.repository), str(reference))
    return Repository(info.id, info.sha, bool(info.gated), access)


Pin = Callable[[Reference, Access], Repository]


def pin_once(kept: Path | None = None) -> Pin:
    """`pinned`, asked once for each revision: all references to it mean the same commit. Revisions in the file `kept`,
    which this writes, still mean what they meant when it was written.
    """
    known: dict[str, Repository] = {}
    commits: dict[str, str] = json.loads(kept.read_text()) if kept and kept.exists() else {}

    def pin(reference: Reference, access: Access) -> Repository:
        key = f"{reference.repository}@{reference.revision}"
        if key not in known:
            known[key] = pinned(replace(reference, revision=commits.get(key, reference.revision)), access)
        if kept and key not in commits:
            commits[key] = known[key].commit
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, json.dumps(commits).encode())
        return known[key]

    return pin


class HubFolder(Place):
    """A folder of a repository at a commit."""

    def __init__(self, repository: Repository, folder: str, label: str) -> None:
        self.repository = repository
        self._label = label
        entries = _tree(repository, folder, label)
        self._files = {Path(entry.path).name: entry for entry in entries if hasattr(entry, "blob_id")}
        self._names = frozenset(Path(entry.path).name for entry in entries)

    def __str__(self) -> str:
        return self._label

    @property
    def names(self) -> frozenset[str]:
        return self._names

    def size(self, name: str) -> int | None:
        return self._files[name].size if name in self._files else None

    def file(self, name: str) -> HubFile:
        """A file as the tree describes it."""
        entry, repository = self._files[name], self.repository
        sha256 = entry.lfs.sha256 if entry.lfs else None
        return HubFile(
            repository.name,
            repository.commit,
            entry.path,
            entry.size,
            entry.blob_id,
            sha256,
            getattr(entry, "xet_hash", None),
            repository.access,
        )

    def path(self, name: str) -> Path:
        if name.endswith(".index.json") and self._files[name].size > _LARGEST_INDEX:
            raise FormatError(f"is an index of {self._files[name].size:,} bytes", where=self.where(name))
        return self.file(name).download()

    def weights(self, name: str) -> WeightFile:
        file = self.file(name)
        return WeightFile(file, 0, header_of(file.address, file.size, beginning_of(file, file.size)))


def _tree(repository: Repository, folder: str, label: str) -> list[Any]:
    api = repository.access.api()
    return asked(
        lambda: list(api.list_repo_tree(repository.name, path_in_repo=folder or None, revision=repository.commit)),
        label,
    )


def branches(reference: Reference, access: Access) -> list[str]:
    """The names of a repository's branches and tags. Raises SourceError."""
    refs = asked(lambda: access.api().list_repo_refs(reference.repository), str(reference))
    return sorted({ref.name for ref in [*refs.branches, *refs.tags]})

"""Object stores: S3 and what speaks as it does, Google Cloud Storage, Azure. Knows addresses, stores and refusals.

Where a store is and what opens it comes from the environment, as the stores' own tools take it (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_NAME, ...), anew in each process: our own values hold
nothing secret, and nothing secret reaches a message.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from merger.errors import JobError, NotInstalled, ReadFailed, SourceError
from merger.storage.patience import PASSING, Again, persist

T = TypeVar("T")
SCHEMES = ("s3://", "gs://", "az://")
_LOCATION = re.compile(r"(?P<scheme>s3|gs|az)://(?P<bucket>[A-Za-z0-9][\w.-]*)(/(?P<key>.*))?")
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_CREDENTIALS = {
    "s3": "Set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, and AWS_ENDPOINT_URL for a server of your own.\n"
    'A profile of the aws command: eval "$(aws configure export-credentials --format env)"',
    "gs": "Set GOOGLE_SERVICE_ACCOUNT to the file of a service account's key, or log in: gcloud auth "
    "application-default login.",
    "az": "Set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN.",
}
# Where machines of the clouds are told who they are; asked where the environment says nothing.
_METADATA = re.compile(r"//(169\.254\.\d+\.\d+|metadata\.google\.internal|metadata)[:/]")
_STATUS = re.compile(r"status code: (\d{3})")


@dataclass(frozen=True)
class Location:
    """A bucket (of Azure a container), and a key in it or the beginning of keys, without slashes around it."""

    scheme: str
    bucket: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.root}{'/' if self.key else ''}{self.key}"

    @property
    def root(self) -> str:
        """The address of the bucket."""
        return f"{self.scheme}://{self.bucket}"

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    def at(self, name: str) -> "Location":
        """What lies below by this name."""
        return Location(self.scheme, self.bucket, f"{self.key}/{name}" if self.key else name)

    @property
    def above(self) -> "Location":
        """The folder that it lies in."""
        return Location(self.scheme, self.bucket, self.key.rpartition("/")[0])


def in_store(text: str) -> bool:
    """Whether a text names something in an object store."""
    return text.startswith(SCHEMES)


def location_of(text: str) -> Location:
    """The location in a text. Raises SourceError."""
    found = _LOCATION.fullmatch(text)
    key = (found["key"] or "").removesuffix("/") if found else ""
    if not found or any(part in ("", ".", "..") for part in key.split("/") if key) or not key.isprintable():
        raise SourceError("is not an address in an object store", where=text, remedy="Write s3://bucket/folder.")
    return Location(found["scheme"], found["bucket"], key)


# ---- stores -------------------------------------------------------------------------------------------


def library() -> Any:
    """`obstore`. Raises NotInstalled."""
    try:
        import obstore  # not installed with merger alone
        import obstore.store
    except ImportError as error:
        raise NotInstalled(
            "object stores need the package obstore",
            where="s3://, gs://, az://",
            remedy="pip install 'merger[objects]'",
        ) from error
    return obstore


@cache
def store_for(root: str, *, writing: bool = False) -> Any:
    """This process's client of a bucket, its requests bounded in time. Raises NotInstalled and SourceError.

    A read that fails is asked again by our own patience, once by the library: a connection that was kept may be gone. A
    part of an upload is sent again by the library, which alone can; a part may take its time.
    """
    scheme = root.partition(":")[0]
    options = {"connect_timeout": "15s", "timeout": "900s" if writing else "300s", "user_agent": "merger"}
    if not writing:
        options["read_timeout"] = "60s"  # of silence; for an upload it would count the time of sending
    retry = {
        "max_retries": 7 if writing else 1,
        "retry_timeout": timedelta(minutes=30 if writing else 5),
        "backoff": {"max_backoff": timedelta(seconds=20)},
    }
    try:
        return library().store.from_url(
            root, client_options={**options, "allow_http": _allows_http(scheme)}, retry_config=retry
        )
    except (ValueError, library().exceptions.BaseError) as error:
        reason = _first_line(str(error))
        raise SourceError(f"cannot be opened: {reason}", where=root, remedy=_CREDENTIALS[scheme]) from None


def _allows_http(scheme: str) -> bool:
    """Whether the environment itself names a server without encryption."""
    named = (os.environ.get(name, "") for name in _ENDPOINTS[scheme])
    return any(endpoint.startswith("http://") for endpoint in named)


# ---- asking -------------------------------------------------------------------------------------------


def asked(ask: Callable[[], T], where: Location, failure: type[JobError] = ReadFailed) -> T:
    """What a call of the library returns, tried again where that may help.

    Raises SourceError where the store refuses, ReadFailed (or what is given) where it fails.
    """

    def once() -> T:
        with explained(where, failure):
            return ask()

    return persist(once, str(where), failure)


@contextmanager
def explained(where: Location, failure: type[JobError] = ReadFailed) -> Iterator[None]:
    """The library's exceptions as our own. Raises SourceError, Again and ReadFailed (or what is given).

    They are not kept as causes: their texts may hold signed addresses. FileNotFoundError becomes SourceError;
    AlreadyExistsError and PreconditionError pass, for whoever made the condition.
    """
    exceptions = library().exceptions
    try:
        yield
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
        raise
    except FileNotFoundError as error:
        raise _missing(where, str(error)) from None
    except exceptions.NotSupportedError:
        raise failure("the store cannot do what this needs: conditional writes", where=str(where)) from None
    except exceptions.BaseError as error:
        raise _failure(where, str(error), failure) from None


def _missing(where: Location, text: str) -> SourceError:
    if "NoSuchBucket" in text or "ContainerNotFound" in text:
        remedy = "Check its name, and the endpoint and region in the environment."
        return SourceError("there is no such bucket", where=where.root, remedy=remedy)
    return SourceError("is not there", where=str(where))


def _failure(where: Location, text: str, failure: type[JobError]) -> Exception:
    found = _STATUS.search(text)
    if _METADATA.search(text.partition("Debug source")[0]):
        return SourceError("there are no credentials for it", where=where.root, remedy=_CREDENTIALS[where.scheme])
    if found:
        return _refusal(where, int(found[1]), text, failure)
    if "kind: Connect" in text:
        return Again("the store cannot be reached", tries=2)
    if "builder error" in text:
        return SourceError("the endpoint in the environment is no usable URL", where=where.root)
    return Again(_first_line(text))


def _refusal(where: Location, status: int, text: str, failure: type[JobError]) -> Exception:
    reason = f"HTTP {status}{_said(text)}"
    if status in PASSING or status == 409:  # 409: another conditional write was under way
        return Again(reason)
    if status == 404:
        return _missing(where, text)
    if status in (301, 400) and re.search("region|redirect", text, re.IGNORECASE):
        return SourceError(f"{reason}: the bucket is in another region", where=where.root, remedy="Set AWS_REGION.")
    if status in (401, 403):
        return SourceError(reason, where=str(where), remedy=_CREDENTIALS[where.scheme])
    return failure(reason, where=str(where))


def _said(text: str) -> str:
    """The code and the message that a store put into its answer; nothing else of it is shown."""
    parts = [re.search(rf"<{tag}>([^<]*)</{tag}>", text) for tag in ("Code", "Message")]
    said = ": ".join(part[1].strip().splitlines()[0][:200] for part in parts if part and part[1].strip())
    return f" {said}" if said else ""


def _first_line(text: str) -> str:
    """What the library says went wrong, without addresses."""
    line = next(iter(text.splitlines()), "")
    reason = line.rpartition(" - ")[2] if " - " in line else line
    return re.sub(r"\S+://\S+", "...", reason)[:200] or "it failed"

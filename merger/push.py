"""Where a document's result is published, and where it is made meanwhile. Knows outputs and destinations."""

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

from merger.checkpoint import parents_of
from merger.destination import Destination
from merger.errors import RecipeError
from merger.hub_destination import hub_destination
from merger.licenses import Verdict, require_license, verdict
from merger.object_destination import object_destination
from merger.plan import Plan, read_again, remote_files
from merger.recipe import Document, Output
from merger.remote import Remote
from merger.storage.hub import Access
from merger.storage.stores import in_store

Cache = Literal["auto", "full"]


def is_destination(text: str) -> bool:
    """Whether a place for a result is one that is pushed to, not a folder."""
    return "://" in text


def destination_of(output: Output, access: Callable[[], Access]) -> Destination | None:
    """Where the result is published beside its folder, or instead of one; None where nowhere.

    Raises SourceError and RecipeError.
    """
    if output.push is None:
        if output.branch or output.create_pr:
            raise RecipeError("is missing: where to push to", where="output.push")
        return None
    if in_store(output.push):
        if output.branch or output.create_pr:
            raise RecipeError("is of the Hub: object stores have no branches", where="output.push")
        return object_destination(output.push)
    return hub_destination(
        output.push, access(), branch=output.branch, create_pr=output.create_pr, private=output.private
    )


def judged(plan: Plan, destination: Destination | None) -> Verdict:
    """On what terms the result may be passed on, to where the document says."""
    name = destination.name.partition("://")[2].partition("@")[0] if destination else None
    return verdict(parents_of(plan.checkpoint), name, public=destination is None or destination.is_public())


def check_license(document: Document, plan: Plan, destination: Destination) -> None:
    """See that the result may be passed on. Raises LicenseRefused."""
    require_license(judged(plan, destination), document.output.accept_license)


def staging_of(plan: Plan, destination: Destination) -> Path:
    """The folder of a result that is only pushed, until it is: the same for the same plan."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    slug = "".join(c if c.isalnum() or c in "-_." else "-" for c in destination.name.partition("://")[2])
    return cache / "merger" / "staging" / f"{slug}-{plan.fingerprint[:16]}"


def cached_files(plan: Plan, cache: Cache) -> Collection[str]:
    """The addresses of the remote files that are downloaded whole: all, or those that are read more than once."""
    if not plan.is_remote:
        return ()
    if cache == "full":
        return {remote.address for remote in remote_files(plan.shards)}
    return {file.path.address for file in read_again(plan.shards) if isinstance(file.path, Remote)}

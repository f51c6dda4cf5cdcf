"""Where a recipe's checkpoints are: references and patterns to folders here, on the Hub or in object stores, and which
may be read.

Reads headers only.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache, partial
from glob import glob, has_magic
from pathlib import Path

from merger.checkpoint import Checkpoint, open_checkpoint, step_of
from merger.errors import ReadFailed, RecipeError, SourceError
from merger.methods.method import Member, Method, Sources
from merger.reach import Reach
from merger.remote_models import hub_matches, hub_step, open_on_hub
from merger.storage.hub import Access, access_for, own_access, pin_once
from merger.storage.place import natural
from merger.storage.reference import SCHEME, looks_remote, reference_of
from merger.storage.stores import in_store
from merger.stored_objects import admit_location, open_in_store, store_matches, store_step


class Roots:
    """The folders below which a service reads or writes; none given: everywhere, as on a person's own machine."""

    def __init__(self, folders: Iterable[Path] = ()) -> None:
        self._folders = tuple(folder.expanduser().resolve() for folder in folders)

    def holds(self, path: Path) -> bool:
        """Whether `path`, its links followed, lies below a root."""
        return not self._folders or any(path.resolve().is_relative_to(folder) for folder in self._folders)

    def admit(self, path: Path, where: str) -> None:
        """See that `path`, its links followed, lies below a root.

        Raises SourceError, which does not tell whether the path exists.
        """
        if not self.holds(path):
            allowed = ", ".join(map(str, self._folders))
            raise SourceError(
                "is outside of the folders that this service may use",
                where=where,
                remedy=f"It may use what is below {allowed}.",
            )


class LocalSources(Sources):
    """Models in local folders below `roots`, models on the Hub, models in object stores below one of the addresses in
    `stores` (None: in any), and recipes within the recipe. `access` says which Hub, with which token, when it is first
    needed (the environment's without); the file `pins` keeps the commits that revisions meant.
    """

    def __init__(
        self,
        roots: Roots | None = None,
        access: Callable[[], Access] | None = None,
        stores: Collection[str] | None = None,
        pins: Path | None = None,
    ) -> None:
        self._roots = roots or Roots()
        self._stores = stores
        self.hub = cache(access or own_access)
        self._pin = pin_once(pins)
        self._opened: dict[str, Checkpoint] = {}  # so that a model that is named twice is read once

    def members(self, checkpoints: str | Sequence[str | Method]) -> tuple[Member, ...]:
        if not isinstance(checkpoints, str):
            members = tuple(self._member(source) for source in checkpoints)
        elif has_magic(checkpoints) and in_store(checkpoints):
            admit_location(checkpoints, self._stores)
            members = tuple(Member(address, store_step(address)) for address in store_matches(checkpoints))
        elif has_magic(checkpoints) and self._is_remote(checkpoints):
            found = hub_matches(checkpoints, self.hub(), self._pin)
            members = tuple(Member(name, hub_step(reference_of(name))) for name in found)
        elif has_magic(checkpoints):
            self._roots.admit(_fixed_part(checkpoints), checkpoints)
            members = tuple(Member(path, step_of(Path(path))) for path in _matches(checkpoints))
        else:
            members = (self._member(checkpoints),)
        if not members:
            raise SourceError("names no checkpoint", where="checkpoints")
        return members

    def _member(self, source: str | Method) -> Member:
        if not isinstance(source, str):
            return Member(source, None)
        if in_store(source):
            admit_location(source, self._stores)
            return Member(source, store_step(source))
        if self._is_remote(source):
            return Member(source, hub_step(reference_of(source)))
        self._roots.admit(Path(source).expanduser(), source)
        return Member(source, step_of(Path(source)))

    def open(self, member: Member) -> Checkpoint:
        if isinstance(member.origin, Method):
            try:
                made = member.origin.build(self)
            except RecipeError as error:
                error.within = error.within or member.origin
                raise
            return made.named(str(member))
        if member.origin not in self._opened:
            self._opened[member.origin] = self._open(member.origin)
        return self._opened[member.origin]

    def admit(self, path: Path) -> None:
        self._roots.admit(path.expanduser(), str(path))

    def _is_remote(self, source: str) -> bool:
        """Whether a reference means the Hub: it says so, or looks like a name there and is no folder here."""
        if source.startswith(SCHEME) or not looks_remote(source):
            return source.startswith(SCHEME)
        path = Path(source).expanduser()
        return not (self._roots.holds(path) and path.exists())

    def _open(self, reference: str) -> Checkpoint:
        if in_store(reference):
            admit_location(reference, self._stores)
            return open_in_store(reference)
        if self._is_remote(reference):
            return self._open_on_hub(reference)
        folder = Path(reference).expanduser()
        self._roots.admit(folder, reference)
        for path in folder.iterdir() if folder.is_dir() else ():
            self._roots.admit(path, str(path))  # a link out of the root
        return open_checkpoint(folder, reference)

    def _open_on_hub(self, reference: str) -> Checkpoint:
        try:
            return open_on_hub(reference, self.hub(), self._pin)
        except (SourceError, ReadFailed) as error:
            if reference.startswith(SCHEME) or type(error) not in (SourceError, ReadFailed):
                raise
            remedy = "Check the path, which is relative to where the command runs, or the name on the Hub."
            message = f"is not a folder here; of the Hub's models: {error.message}"
            raise SourceError(message, where=reference, remedy=remedy) from error


def _matches(pattern: str) -> list[str]:
    """The folders and safetensors files that a pattern matches, in natural order: step-9 before step-10."""
    found = glob(str(Path(pattern).expanduser()), recursive=True)  # noqa: PTH207  (keeps the path as it was written)
    models = [path for path in found if Path(path).is_dir() or path.endswith(".safetensors")]
    if not models:
        raise SourceError("matches no folder", where=f"checkpoints: {pattern}", remedy=_nearest(pattern))
    return sorted(models, key=natural)


def _nearest(pattern: str) -> str:
    """How far the pattern gets: the deepest folder of it that exists, and what is in there."""
    folder = _fixed_part(pattern)
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(path.name for path in folder.iterdir())[:5]
    return f"{folder.resolve()} holds {', '.join(names) or 'nothing'}. Paths are relative to where the command runs."


def _fixed_part(pattern: str) -> Path:
    """The deepest folder of a pattern that has no wildcard in it."""
    folder = Path(pattern).expanduser()
    while has_magic(str(folder)):
        folder = folder.parent
    return folder


def sources_within(reach: Reach, pins: Path | None = None) -> LocalSources:
    """The models within reach; the file `pins` keeps the commits that revisions on the Hub meant."""
    access = own_access if reach.own_token else partial(access_for, reach.token)
    return LocalSources(Roots(map(Path, reach.roots)), access, reach.stores, pins)

"""Where a recipe's checkpoints are: references and patterns to folders, and which folders may be read.

Knows local paths; reads headers only.
"""

import re
from collections.abc import Iterable, Sequence
from glob import glob, has_magic
from pathlib import Path

from merger.checkpoint import Checkpoint, open_checkpoint, step_of
from merger.errors import SourceError
from merger.methods.method import Member, Method, Sources


class Roots:
    """The folders below which a service reads or writes; none given: everywhere, as on a person's own machine."""

    def __init__(self, folders: Iterable[Path] = ()) -> None:
        self._folders = tuple(folder.expanduser().resolve() for folder in folders)

    def admit(self, path: Path, where: str) -> None:
        """See that `path`, its links followed, lies below a root.

        Raises SourceError, which does not tell whether the path exists.
        """
        if self._folders and not any(path.resolve().is_relative_to(folder) for folder in self._folders):
            allowed = ", ".join(map(str, self._folders))
            raise SourceError(
                "is outside of the folders that this service may use",
                where=where,
                remedy=f"It may use what is below {allowed}.",
            )


class LocalSources(Sources):
    """Models in local folders below `roots`, and recipes within the recipe."""

    def __init__(self, roots: Roots | None = None) -> None:
        self._roots = roots or Roots()
        self._opened: dict[str, Checkpoint] = {}  # so that a model that is named twice is read once

    def members(self, checkpoints: str | Sequence[str | Method]) -> tuple[Member, ...]:
        if not isinstance(checkpoints, str):
            members = tuple(self._member(source) for source in checkpoints)
        elif has_magic(checkpoints):
            self._roots.admit(_fixed_part(checkpoints), checkpoints)
            members = tuple(Member(path, step_of(Path(path))) for path in _matches(checkpoints))
        else:
            members = (self._member(checkpoints),)
        if not members:
            raise SourceError("names no checkpoint", where="checkpoints")
        return members

    def _member(self, source: str | Method) -> Member:
        if isinstance(source, str):
            self._roots.admit(Path(source).expanduser(), source)
        return Member(source, step_of(Path(source)) if isinstance(source, str) else None)

    def open(self, member: Member) -> Checkpoint:
        if isinstance(member.origin, Method):
            made = member.origin.build(self)
            return made.named(str(member))
        if member.origin not in self._opened:
            self._opened[member.origin] = self._open(member.origin)
        return self._opened[member.origin]

    def admit(self, path: Path) -> None:
        self._roots.admit(path.expanduser(), str(path))

    def _open(self, reference: str) -> Checkpoint:
        folder = local_folder(reference)
        self._roots.admit(folder, reference)
        for path in folder.iterdir() if folder.is_dir() else ():
            self._roots.admit(path, str(path))  # a link out of the root
        return open_checkpoint(folder, reference)


def _matches(pattern: str) -> list[str]:
    """The folders and safetensors files that a pattern matches, in natural order: step-9 before step-10."""
    found = glob(str(Path(pattern).expanduser()), recursive=True)  # noqa: PTH207  (keeps the path as it was written)
    models = [path for path in found if Path(path).is_dir() or path.endswith(".safetensors")]
    if not models:
        raise SourceError("matches no folder", where=f"checkpoints: {pattern}", remedy=_nearest(pattern))
    return sorted(models, key=_natural)


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


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


def local_folder(reference: str) -> Path:
    """The folder of a reference. Raises SourceError for one on the Hub, which is not read yet."""
    path = Path(reference).expanduser()
    if reference.startswith("hf://") or (
        not path.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w.-]+)?", reference)
    ):
        raise SourceError(
            "is not a folder here, and models on the Hub are not read yet",
            where=reference,
            remedy=f"Download it first: hf download {reference.removeprefix('hf://')} --local-dir FOLDER",
        )
    return path

"""Where a recipe's checkpoints are: references and patterns to folders. Knows local paths; reads headers only."""

import re
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path

from merger.checkpoint import Checkpoint, open_checkpoint, step_of
from merger.errors import SourceError
from merger.methods.method import Member, Method, Sources


class LocalSources(Sources):
    """Models in local folders, and recipes within the recipe."""

    def members(self, checkpoints: str | Sequence[str | Method]) -> tuple[Member, ...]:
        if not isinstance(checkpoints, str):
            members = tuple(self._member(source) for source in checkpoints)
        elif has_magic(checkpoints):
            members = tuple(Member(path, step_of(Path(path))) for path in _matches(checkpoints))
        else:
            members = (self._member(checkpoints),)
        if not members:
            raise SourceError("names no checkpoint", where="checkpoints")
        return members

    def _member(self, source: str | Method) -> Member:
        return Member(source, step_of(Path(source)) if isinstance(source, str) else None)

    def open(self, member: Member) -> Checkpoint:
        if isinstance(member.origin, Method):
            made = member.origin.build(self)
            return made.named(str(member))
        return open_checkpoint(local_folder(member.origin), member.origin)


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
    folder = Path(pattern).expanduser()
    while has_magic(str(folder)) or not folder.is_dir():
        folder = folder.parent
    names = sorted(path.name for path in folder.iterdir())[:5]
    return f"{folder.resolve()} holds {', '.join(names) or 'nothing'}. Paths are relative to where the command runs."


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

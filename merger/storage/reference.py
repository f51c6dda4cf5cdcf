"""What people write for a model on the Hub: `hf://org/name@revision/folder`, or `org/name`. Pure text."""

import re
from dataclasses import dataclass
from urllib.parse import unquote

from merger.errors import SourceError

SCHEME = "hf://"
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
_REFS = r"refs/[a-z]+/[A-Za-z0-9_]+"
_PLAIN = re.compile(rf"{_NAME}/{_NAME}(@[^@]+)?")
_WHOLE = re.compile(rf"(?P<repository>{_NAME}/{_NAME})(@(?P<revision>{_REFS}|[^/@]+))?(/(?P<folder>[^@]*))?")
_LONGEST = 96  # characters of a repository's name


@dataclass(frozen=True)
class Reference:
    """A folder of a repository: `main` and its root where nothing else is said; either may be a pattern."""

    repository: str
    revision: str = "main"
    folder: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{_quoted(self.revision)}"
        return f"{SCHEME}{self.repository}{revision}{'/' if self.folder else ''}{self.folder}"


def _quoted(revision: str) -> str:
    """A revision as it is written: a branch may have a slash in its name."""
    if re.fullmatch(_REFS, revision):
        return revision
    return revision.replace("%", "%25").replace("/", "%2F").replace("@", "%40")


def looks_remote(text: str) -> bool:
    """Whether a text can only mean the Hub, or could where no folder of that name is here."""
    return text.startswith(SCHEME) or _PLAIN.fullmatch(text) is not None


def reference_of(text: str) -> Reference:
    """The reference in a text. Raises SourceError."""
    found = _WHOLE.fullmatch(text.removeprefix(SCHEME))
    folder = (found["folder"] or "").strip("/") if found else ""
    revision = unquote(found["revision"] or "main") if found else ""
    if not found or {"", ".", ".."} & {revision, *(folder or "-").split("/")}:
        raise SourceError(
            "is not a model on the Hub",
            where=text,
            remedy="Write hf://org/name, hf://org/name@revision/folder; a slash in a branch's name as %2F.",
        )
    repository = found["repository"]
    forbidden = ".." in repository or "--" in repository or len(repository) > _LONGEST
    if forbidden or any(part.endswith((".git", ".", "-")) for part in repository.split("/")):
        raise SourceError("is not the name of a repository", where=text)
    return Reference(repository, revision, folder)

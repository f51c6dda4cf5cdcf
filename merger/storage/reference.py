"""What people write for a model on the Hub: `hf://org/name@revision/folder`, or `org/name`. Pure text."""

import re
from dataclasses import dataclass

from merger.errors import SourceError

SCHEME = "hf://"
_NAME = r"[A-Za-z0-9][\w.-]{0,95}"
_PLAIN = re.compile(rf"{_NAME}/{_NAME}(@[^@]+)?")
_WHOLE = re.compile(rf"(?P<repository>{_NAME}/{_NAME})(@(?P<revision>refs/[a-z]+/\w+|[^/@]+))?(/(?P<folder>[^@]*))?")


@dataclass(frozen=True)
class Reference:
    """A folder of a repository: `main` and its root where nothing else is said; either may be a pattern."""

    repository: str
    revision: str = "main"
    folder: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"{SCHEME}{self.repository}{revision}{'/' if self.folder else ''}{self.folder}"


def looks_remote(text: str) -> bool:
    """Whether a text can only mean the Hub, or could where no folder of that name is here."""
    return text.startswith(SCHEME) or _PLAIN.fullmatch(text) is not None


def reference_of(text: str) -> Reference:
    """The reference in a text. Raises SourceError."""
    found = _WHOLE.fullmatch(text.removeprefix(SCHEME))
    folder = (found["folder"] or "").strip("/") if found else ""
    if not found or any(part in ("", ".", "..") for part in folder.split("/") if folder):
        raise SourceError(
            "is not a model on the Hub", where=text, remedy="Write hf://org/name, hf://org/name@revision/folder."
        )
    repository = found["repository"]
    if ".." in repository or "--" in repository:
        raise SourceError("is not the name of a repository", where=text)
    return Reference(repository, found["revision"] or "main", folder)

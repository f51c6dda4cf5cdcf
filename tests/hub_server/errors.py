"""What the Hub answers when it refuses. Knows the codes that the client makes typed exceptions of."""

import json

from tests.hub_server.wire import Answer


class HubError(Exception):
    """A refusal: a status, a message and for some a code (`RepoNotFound`, `GatedRepo`...) in the headers."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.commit = status, message, code, commit

    def answer(self) -> Answer:
        headers = {"Content-Type": "application/json; charset=utf-8", "X-Error-Message": self.message}
        if self.code:
            headers["X-Error-Code"] = self.code
        if self.commit:
            headers["X-Repo-Commit"] = self.commit
        return Answer(self.status, headers, (json.dumps({"error": self.message}).encode(),))


def no_repo() -> HubError:
    return HubError(404, "Repository not found", "RepoNotFound")


def no_revision(revision: str) -> HubError:
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def no_entry(path: str, commit: str | None = None) -> HubError:
    return HubError(404, f"{path} does not exist", "EntryNotFound", commit)


class Moved(Exception):
    """A repository that has another name now."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(f"{old} is {new} now")
        self.old, self.new = old, new

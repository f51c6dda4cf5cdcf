"""Results that become one commit of a repository on the Hub. Knows commits and trees; knows nothing of how a result is
made.

Shards are uploaded by whoever made them and are seen by nobody; one commit on a known parent makes all of it visible.
Whether that commit happened is never guessed: the branch is looked at, before it and after everything that failed.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from merger.destination import Destination, Landed
from merger.errors import OutputOccupied, ReadFailed, RecipeError, SourceError, WriteFailed
from merger.plan import Plan
from merger.storage.hub import Access, HubFolder, Repository, asked, explained, library
from merger.storage.patience import Again, Patience, persist
from merger.storage.reference import reference_of
from merger.verify import MANIFEST

# What may stand in a repository before the result comes: what the Hub puts there, and a card.
_HARMLESS = (".gitattributes", "README.md", "LICENSE*", "NOTICE*")
# What makes a model: of another one it would be loaded beside the new one, or instead of it.
_MODEL = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.index.json"),
    *("config.json", "adapter_config.json", "*.py"),
)
_MAIN = "main"
_TOKEN = "Give a token that may write there, with --token or HF_TOKEN, or log in with one: hf auth login."


@dataclass(frozen=True)
class HubDestination(Destination):
    """A branch of a repository, or a pull request to it."""

    repository: str
    access: Access
    branch: str = _MAIN
    create_pr: bool = False
    private: bool = True

    @property
    def name(self) -> str:
        return f"hf://{self.repository}{'' if self.branch == _MAIN else f'@{self.branch}'}"

    def admit(self) -> None:
        self._check_rights(self._head(_MAIN) is not None)

    def check(self, plan: Plan) -> str | None:
        exists = self._head(_MAIN) is not None
        found = self._published(plan, self._head(self.branch)) if exists else None
        if found is None:
            self._check_rights(exists)
        return found

    def is_public(self) -> bool:
        info = self._info(_MAIN)
        return not (info.private if info else self.private)

    def prepare(self) -> None:
        api = self.access.api()
        if self._head(_MAIN) is None:  # asking to make one that is there takes rights that a pull request needs not
            asked(lambda: api.create_repo(self.repository, private=self.private, exist_ok=True), self.name, WriteFailed)
        if self._head(self.branch) is None:
            asked(lambda: api.create_branch(self.repository, branch=self.branch, exist_ok=True), self.name, WriteFailed)

    def upload(self, path: Path) -> Landed:
        addition = library().CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=str(path))
        api = self.access.api()

        where = f"{self.name}: {path.name}"

        def send() -> None:
            with _sending(where):
                api.preupload_lfs_files(
                    self.repository,
                    [addition],
                    revision=self.branch,
                    create_pr=self.create_pr,
                    free_memory=False,
                    num_threads=1,
                )

        persist(send, where, WriteFailed)
        info = addition.upload_info
        return Landed(path.name, info.size, info.sha256.hex(), self.name, addition._upload_mode)

    def publish(self, folder: Path, plan: Plan, landed: Mapping[str, Landed]) -> str:
        patience = Patience(self.name, WriteFailed)
        while True:
            try:
                head = asked(lambda: self._head(self.branch), self.name, WriteFailed)
                found = self._published(plan, head)
                if found:
                    return found
                with _sending(self.name):
                    return self._commit(folder, plan, landed, head)
            except _Forgotten:
                landed = {}
            except Again as failure:
                patience.spend(failure)
            except ReadFailed as error:
                raise WriteFailed(error.message, where=self.name) from error

    def _commit(self, folder: Path, plan: Plan, landed: Mapping[str, Landed], head: str | None) -> str:
        from huggingface_hub.errors import HfHubHTTPError

        additions = [_addition(folder, path, landed.get(path.name)) for path in _files(folder)]
        names = {addition.path_in_repo for addition in additions}
        try:
            info = self.access.api().create_commit(
                self.repository,
                operations=[*additions, *self._deletions(head, names)],
                commit_message=_title(plan),
                commit_description=f"Plan {plan.fingerprint}",
                revision=self.branch,
                create_pr=self.create_pr,
                parent_commit=head,
            )
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            if status == 412:
                raise Again("somebody else has committed") from error
            if status == 400 and landed:
                raise _Forgotten from error
            raise
        return str(info.pr_url or info.commit_url)

    # ---- what is there ------------------------------------------------------------------------------------

    def _head(self, branch: str) -> str | None:
        """The commit that a branch points to; None where there is no such repository or branch."""
        info = self._info(branch)
        return str(info.sha) if info else None

    def _info(self, branch: str) -> Any:
        """What the Hub tells of the repository at a branch; None where there is no such repository or branch."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        def look() -> Any:
            try:
                info = self.access.api().model_info(self.repository, revision=branch)
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return None
            if info.id != self.repository:
                raise SourceError(f"was renamed to {info.id}", where=self.name, remedy="Write the new name.")
            return info

        return asked(look, self.name)

    def _check_rights(self, exists: bool) -> None:
        """See that the token may write there, as far as its account tells. Raises SourceError."""
        if self.access.token is None:
            raise SourceError("needs a token that may write there", where=self.name, remedy=_TOKEN)
        who = asked(self.access.api().whoami, self.name)
        if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise SourceError(f"the token of {who['name']} may only read", where=self.name, remedy=_TOKEN)
        namespaces = [who["name"], *(group["name"] for group in who.get("orgs", []))]
        anybody = exists and self.create_pr  # whoever may read a repository may open a pull request
        if self.repository.partition("/")[0] not in namespaces and not anybody:
            raise SourceError(
                f"is outside of what the token of {who['name']} may write to: {', '.join(namespaces)}",
                where=self.name,
                remedy=f"Push to one of these. {_TOKEN}",
            )

    def _published(self, plan: Plan, head: str | None) -> str | None:
        """The address of this plan's result where it is there. Raises OutputOccupied where something else is."""
        if self.create_pr:
            return self._pull_request(plan)
        if head is None:
            return None
        place = self._folder(head)
        others = [name for name in sorted(place.names) if not any(fnmatchcase(name, h) for h in _HARMLESS)]
        if place.has(MANIFEST) and _fingerprint(place) == plan.fingerprint:
            return f"{self.access.endpoint}/{self.repository}/commit/{head}"
        if others and not self._is_fresh_branch(head):
            raise OutputOccupied(
                f"holds something else: {', '.join(others[:4])}; {self._last_commit()}",
                where=self.name,
                remedy="merger never replaces what is there. Push to another name, to a new branch "
                "(`output.branch`), or open a pull request (`output.create_pr: true`).",
            )
        return None

    def _is_fresh_branch(self, head: str) -> bool:
        """Whether the branch has nothing of its own yet: then its commit may replace what main holds."""
        return self.branch != _MAIN and head == self._head(_MAIN)

    def _folder(self, commit: str) -> HubFolder:
        return HubFolder(Repository(self.repository, commit, False, self.access), "", self.name)

    def _last_commit(self) -> str:
        commits = asked(
            lambda: self.access.api().list_repo_commits(self.repository, revision=self.branch), self.name, WriteFailed
        )
        last = commits[0]
        return (
            f"last commit by {', '.join(last.authors) or 'unknown'} at {last.created_at:%Y-%m-%d %H:%M}: {last.title}"
        )

    def _pull_request(self, plan: Plan) -> str | None:
        api = self.access.api()
        found = asked(
            lambda: [
                request
                for request in api.get_repo_discussions(self.repository, discussion_type="pull_request")
                if request.title == _title(plan) and request.status in ("open", "draft", "merged")
            ],
            self.name,
            WriteFailed,
        )
        return f"{self.access.endpoint}/{self.repository}/discussions/{found[0].num}" if found else None

    def _deletions(self, head: str | None, names: set[str]) -> list[Any]:
        """What is left of the model that a pull request or a branch replaces."""
        if head is None or (self.branch == _MAIN and not self.create_pr):
            return []
        stale = [n for n in self._folder(head).names - names if any(fnmatchcase(n, pattern) for pattern in _MODEL)]
        return [library().CommitOperationDelete(path_in_repo=name) for name in sorted(stale)]


class _Forgotten(Exception):
    """The Hub refuses a commit of uploads that landed: it removes those that no commit holds after some hours."""


@contextmanager
def _sending(where: str) -> Iterator[None]:
    """What the library raises while it sends as our own. Raises Again, SourceError, ReadFailed and WriteFailed."""
    try:
        with explained(where):
            yield
    except json.JSONDecodeError as error:  # a page of whatever stands before the Hub
        raise Again(f"an answer that is not JSON: {error}") from error
    except ValueError as error:
        raise WriteFailed(str(error), where=where) from error
    except (RuntimeError, PermissionError, FileNotFoundError) as error:  # of uploads by LFS, and of hf_xet
        raise Again(f"{error} {error.__cause__ or ''}".strip()) from error


def _title(plan: Plan) -> str:
    return f"Add {plan.recipe['method']} by merger (plan {plan.fingerprint[:16]})"


def _fingerprint(place: HubFolder) -> str | None:
    try:
        value = json.loads(place.path(MANIFEST).read_text()).get("fingerprint")
    except (ValueError, AttributeError):
        return None
    return value if isinstance(value, str) else None


def _files(folder: Path) -> list[Path]:
    """The files of a finished result, without the traces of the work."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _addition(folder: Path, path: Path, landed: Landed | None) -> Any:
    """A file of the commit; of one that has landed only its hash is sent."""
    name = str(path.relative_to(folder))
    if landed is None or landed.proof != "lfs":
        return library().CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path))
    from huggingface_hub.lfs import UploadInfo

    addition = library().CommitOperationAdd(path_in_repo=name, path_or_fileobj=b"")
    addition.upload_info = UploadInfo(sha256=bytes.fromhex(landed.sha256), size=landed.size, sample=b"")
    addition._upload_mode, addition._is_uploaded, addition._should_ignore = landed.proof, True, False
    return addition


def hub_destination(text: str, access: Access, *, branch: str | None, create_pr: bool, private: bool) -> HubDestination:
    """The destination that `output.push` names. Raises SourceError and RecipeError."""
    reference = reference_of(text)
    if reference.folder:
        raise RecipeError("names a folder: a result takes a whole repository", where="output.push")
    if re.fullmatch("[0-9a-f]{40}", reference.revision):
        raise RecipeError("names a commit: a result goes onto a branch", where="output.push")
    if reference.revision != _MAIN and branch and branch != reference.revision:
        raise RecipeError(f"says another branch than `output.push`: {reference.revision}", where="output.branch")
    return HubDestination(reference.repository, access, branch or reference.revision, create_pr, private)

"""Repositories: their commits, branches, tags and pull requests, in memory. Knows nothing of HTTP and users' rights."""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from tests.hub_server import git
from tests.hub_server.errors import HubError, Moved, no_repo, no_revision

_ATTRIBUTES = b"".join(
    b"*.%b filter=lfs diff=lfs merge=lfs -text\n" % kind for kind in (b"safetensors", b"bin", b"model", b"png")
)


@dataclass
class Discussion:
    num: int
    title: str
    description: str
    author: str
    created: datetime
    base: str | None = None  # the branch that a pull request is for; None: only words
    status: str = "open"
    merged: str | None = None

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"


@dataclass
class Repo:
    name: str
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)  # users that may read it while it is private or gated
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    commits: dict[str, git.Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)
    discussions: dict[int, Discussion] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)  # sha256 of what was uploaded to this repository
    sizes: dict[str, int] = field(default_factory=dict)  # lies about sizes
    detours: dict[str, str] = field(default_factory=dict)  # files that are redirected to some address
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def namespace(self) -> str:
        return self.name.partition("/")[0]

    def head(self, revision: str) -> git.Commit:
        for refs in (self.branches, self.tags, self.pulls):
            if revision in refs:
                return self.commits[refs[revision]]
        if revision.startswith("refs/heads/"):
            return self.head(revision.removeprefix("refs/heads/"))
        if revision in self.commits:
            return self.commits[revision]
        raise no_revision(revision)

    def history(self, commit: git.Commit) -> Iterator[git.Commit]:
        """The commit and its first parents, newest first."""
        yield commit
        while commit.parents:
            commit = self.commits[commit.parents[0]]
            yield commit

    def refs(self, revision: str) -> dict[str, str]:
        """The refs that a commit to this revision moves."""
        for refs in (self.branches, self.pulls):
            if revision in refs:
                return refs
        if revision in self.tags or revision in self.commits:
            raise HubError(400, f"{revision} is not a branch")
        raise no_revision(revision)

    def commit(
        self,
        revision: str,
        changes: Mapping[str, git.File | None],
        author: str,
        title: str,
        message: str = "",
        parent: str | None = None,
    ) -> git.Commit:
        """Write a commit onto a branch or a pull request. None in `changes` is a file that goes."""
        with self.lock:
            refs, head = self.refs(revision), self.head(revision)
            if parent is not None and head.oid != parent:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = {path: file for path, file in {**head.files, **changes}.items() if file is not None}
            # Git's time has seconds: two commits with equal contents within one would have one name.
            date = max(datetime.now(UTC).replace(microsecond=0), head.date + timedelta(seconds=1))
            new = git.commit(files, (head.oid,), title, message, author, date)
            self.commits[new.oid] = new
            refs[revision] = new.oid
            return new

    def discuss(self, title: str, description: str, author: str, base: git.Commit | None = None) -> Discussion:
        """Open a discussion, or a pull request that begins at a commit."""
        with self.lock:
            branch = None if base is None else "refs/heads/main"
            opened = Discussion(len(self.discussions) + 1, title, description, author, datetime.now(UTC), branch)
            self.discussions[opened.num] = opened
            if base is not None:
                self.pulls[opened.ref] = base.oid
            return opened


class Store:
    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self._renamed: dict[str, str] = {}
        self._lock = threading.RLock()

    def find(self, name: str) -> Repo:
        if name in self._renamed:
            raise Moved(name, self._renamed[name])
        if name not in self.repos:
            raise no_repo()
        return self.repos[name]

    def create(self, name: str, author: str, private: bool = False) -> Repo:
        """A repository with its first commit."""
        with self._lock:
            if name in self.repos:
                raise HubError(409, "You already created this model repo")
            self._renamed.pop(name, None)
            repo = self.repos[name] = Repo(name, private)
            files = {".gitattributes": git.small(_ATTRIBUTES)}
            first = git.commit(files, (), "initial commit", name, author, datetime.now(UTC).replace(microsecond=0))
            repo.commits[first.oid] = first
            repo.branches["main"] = first.oid
            return repo

    def delete(self, name: str) -> None:
        with self._lock:
            self.find(name)
            del self.repos[name]

    def rename(self, old: str, new: str) -> None:
        with self._lock:
            repo = self.find(old)
            if new in self.repos:
                raise HubError(409, f"{new} exists")
            self.repos[new] = self.repos.pop(old)
            repo.name = new
            self._renamed = {name: (new if to == old else to) for name, to in self._renamed.items()}
            self._renamed[old] = new
            self._renamed.pop(new, None)

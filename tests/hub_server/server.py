"""The server as a test holds it: starts the origins, puts models into it, asks what happened.

Wiring and the test's own view only; endpoints are in the modules of their topics.
"""

import hashlib
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal

from tests.hub_server import admin, cas, cdn, commits, discussions, files, git, lfs, repos
from tests.hub_server.blobs import Blob, Blobs
from tests.hub_server.errors import HubError, Moved
from tests.hub_server.faults import Faults
from tests.hub_server.log import Entry, Log
from tests.hub_server.site import Account, Routes, Site
from tests.hub_server.store import Repo
from tests.hub_server.wire import Answer, Listener, Request
from tests.hub_server.xet import Xet

Mode = Literal["lfs", "xet"]
_API = Routes(repos.routes, files.routes, commits.routes, discussions.routes, lfs.routes, cas.tokens)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class HubServer:
    """A Hub on loopback. `folder` holds what is uploaded; models that are put in lie where they are.

    A token `token` of the user `user` is there from the beginning, who may also write to the namespace `org`.
    """

    user, token = "me", "hf_test_me"

    def __init__(self, folder: Path, mode: Mode = "lfs", port: int = 0, log: Log | None = None) -> None:
        self.folder = folder
        self.site = Site(Blobs(folder / "blobs"), Xet(folder / "xorbs") if mode == "xet" else None)
        self._log, self.faults = log or Log(), Faults()
        self._api = self._listen("api", self._answer_api, port)
        self._cdn = self._listen("cdn", cdn.answer)
        self._cas = self._listen("cas", cas.routes.answer)
        self._listeners = [self._api, self._cdn, self._cas]
        self.site.api = self.endpoint = f"http://127.0.0.1:{self._api.port}"
        # Another host name as well: clients keep a token only for the same origin.
        self.site.cdn = f"http://localhost:{self._cdn.port}"
        self.site.cas = f"http://127.0.0.1:{self._cas.port}"
        self.add_token(self.token, self.user, orgs=("org",))

    def start(self) -> "HubServer":
        for listener in self._listeners:
            listener.start()
        return self

    def close(self) -> None:
        for listener in self._listeners:
            listener.close()

    def __enter__(self) -> "HubServer":
        return self.start()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # What is in it.

    def add_token(self, token: str, user: str, orgs: tuple[str, ...] = (), role: str = "write") -> None:
        self.site.tokens[token] = Account(user, tuple(orgs), role)

    def add_model(
        self,
        name: str,
        folder: Path | str,
        *,
        private: bool = False,
        gated: bool = False,
        revision: str = "main",
        hashes: Mapping[str, str] | None = None,
        message: str = "Upload model",
    ) -> str:
        """Publish a folder's files, the large ones without copying them, and give the commit.

        `hashes` are the sha256 of some files by path, if they are known already. A link in the folder that leads
        nowhere becomes git's symlink.
        """
        changes: dict[str, git.File | None] = {}
        repo = self._repo_for(name, private, gated)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() or (path.is_symlink() and not path.exists()):
                inside = path.relative_to(folder).as_posix()
                changes[inside] = self._taken(repo, inside, path, (hashes or {}).get(inside))
        return self._written(repo, changes, revision, message)

    def write(
        self, name: str, contents: Mapping[str, bytes | None], revision: str = "main", message: str = "Write"
    ) -> str:
        """Commit bytes under any paths, also such as the Hub would refuse; None deletes."""
        repo = self._repo_for(name)
        changes = {path: None if data is None else self._given(repo, path, data) for path, data in contents.items()}
        return self._written(repo, changes, revision, message)

    def add_link(self, name: str, path: str, target: str, revision: str = "main") -> str:
        """Commit a symlink as git has it: its text is the target."""
        repo = self._repo_for(name)
        return self._written(repo, {path: git.small(target.encode(), git.SYMLINK)}, revision, "Link")

    def protect(self, name: str, private: bool | None = None, gated: bool | None = None) -> None:
        """Make a repository private or gated, or neither; None leaves it."""
        repo = self.site.store.find(name)
        repo.private = repo.private if private is None else private
        repo.gated = repo.gated if gated is None else gated

    def allow(self, name: str, user: str) -> None:
        """Let a user read a private or gated repository."""
        self.site.store.find(name).readers.add(user)

    def rename(self, old: str, new: str) -> None:
        self.site.store.rename(old, new)

    def delete(self, name: str) -> None:
        self.site.store.delete(name)

    # What it does wrong.

    def redirect_elsewhere(self, name: str, path: str, url: str) -> None:
        """Let `resolve` of a file lead to another address."""
        self.site.store.find(name).detours[path] = url

    def lie_about_size(self, name: str, path: str, size: int) -> None:
        """Give a wrong size of a file in trees and redirects."""
        self.site.store.find(name).sizes[path] = size

    def expire_urls(self) -> None:
        """Make every signed address that was given out so far worthless."""
        self.site.expire_all()

    def url_lifetime(self, seconds: float) -> None:
        self.site.lifetime = seconds

    def xet_lifetime(self, seconds: float) -> None:
        """How long tokens for the content-addressed store are good; clients ask anew a minute before their end."""
        self.site.xet_lifetime = seconds

    def part_size(self, size: int) -> None:
        """Uploads by LFS that are larger come in parts of this size."""
        self.site.part_size = size

    def page_size(self, entries: int) -> None:
        """How many entries of a tree come at once."""
        self.site.page_size = entries

    def forget_uncommitted(self) -> None:
        """Collect large contents that no commit holds, as the Hub does about daily."""
        for repo in self.site.store.repos.values():
            held = {file.sha256 for commit in repo.commits.values() for file in commit.files.values()}
            repo.large &= {sha256 for sha256 in held if sha256}

    # What happened.

    def log(self, origin: str | None = None, method: str | None = None, path: str = "") -> list[Entry]:
        return self._log.entries(origin, method, path)

    def clear_log(self) -> None:
        self._log.clear()

    def violations(self) -> list[str]:
        return [f"{entry.method} {entry.path}: {entry.violation}" for entry in self.log() if entry.violation]

    def repos(self) -> list[str]:
        return sorted(self.site.store.repos)

    def refs(self, name: str) -> dict[str, str]:
        """The commits of branches, of tags (`refs/tags/...`) and pull requests (`refs/pr/...`)."""
        repo = self.site.store.find(name)
        return {**repo.branches, **{f"refs/tags/{tag}": oid for tag, oid in repo.tags.items()}, **repo.pulls}

    def commits(self, name: str, revision: str = "main") -> list[dict[str, str]]:
        """The commits of a revision, newest first: oid, title, message, author."""
        repo = self.site.store.find(name)
        return [
            {"oid": one.oid, "title": one.title, "message": one.message, "author": one.author}
            for one in repo.history(repo.head(revision))
        ]

    def files(self, name: str, revision: str = "main") -> dict[str, str]:
        """The sha256 of every file."""
        found = self.site.store.find(name).head(revision).files
        return {path: file.sha256 or _sha256(file.data or b"") for path, file in sorted(found.items())}

    def content(self, name: str, path: str, revision: str = "main") -> bytes:
        file = self.site.store.find(name).head(revision).files[path]
        return self.site.blobs[file.sha256].path.read_bytes() if file.sha256 else file.data or b""

    # How it answers.

    def _listen(self, origin: str, answer: Callable[[Site, Request], Answer], port: int = 0) -> Listener:
        return Listener(origin, lambda request: self._safely(answer, request), self.faults, self._log, port)

    def _safely(self, answer: Callable[[Site, Request], Answer], request: Request) -> Answer:
        try:
            return answer(self.site, request)
        except HubError as error:
            return error.answer()
        except Moved as moved:
            return Answer(307, {"Location": request.target.replace(moved.old, moved.new, 1)})
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            return HubError(500, f"this test server is wrong: {error!r}").answer()

    def _answer_api(self, site: Site, request: Request) -> Answer:
        if request.path.startswith("/__"):
            return admin.answer(self, request)
        return _API.answer(site, request)

    # How contents come into it.

    def _repo_for(self, name: str, private: bool = False, gated: bool = False) -> Repo:
        if name not in self.site.store.repos:
            self.site.store.create(name, name.partition("/")[0], private)
        repo = self.site.store.find(name)
        repo.private, repo.gated = repo.private or private, repo.gated or gated
        return repo

    def _written(self, repo: Repo, changes: Mapping[str, git.File | None], revision: str, message: str) -> str:
        if revision not in {**repo.branches, **repo.pulls}:
            repo.branches[revision] = repo.head("main").oid
        return repo.commit(revision, changes, repo.namespace, message).oid

    def _taken(self, repo: Repo, inside: str, path: Path, sha256: str | None) -> git.File:
        if not path.exists():
            return git.small(str(path.readlink()).encode(), git.SYMLINK)
        if not commits.is_large(inside, path.stat().st_size):
            return git.small(path.read_bytes())
        blob = self.site.blobs.refer(path, sha256)
        return self._large(repo, blob)

    def _given(self, repo: Repo, path: str, data: bytes) -> git.File:
        if not commits.is_large(path, len(data)):
            return git.small(data)
        sha256 = _sha256(data)
        if sha256 not in self.site.blobs:
            self.site.blobs.receive([data], sha256)
        return self._large(repo, self.site.blobs[sha256])

    def _large(self, repo: Repo, blob: Blob) -> git.File:
        repo.large.add(blob.sha256)
        if self.site.xet is not None and blob.sha256 not in self.site.xet_hashes:
            self.site.xet_hashes[blob.sha256] = self.site.xet.view(blob.path, blob.sha256).hash
        return git.large(blob.sha256, blob.size)

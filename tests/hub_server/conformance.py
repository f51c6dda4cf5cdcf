"""The same checks through the real client against any endpoint: is this test server like the Hub where we use it?

    HF_ENDPOINT=https://... HF_TOKEN=... python -m tests.hub_server.conformance --namespace me

makes a private repository of a random name there, works with it, deletes it, and prints what passed. With
HF_HUB_DISABLE_XET=1 contents go by LFS, else by Xet. The server is our reading of the API; this script is the proof.
"""

import argparse
import contextlib
import hashlib
import os
import pickle
import secrets
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


@dataclass
class Case:
    api: HfApi
    repo: str
    folder: Path
    large: bytes = field(default_factory=lambda: os.urandom(3 << 20))
    small: bytes = b'{"model_type": "test"}'

    @property
    def head(self) -> str:
        return str(self.api.model_info(self.repo).sha)

    def token(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api.token or get_token()}"}

    def url(self, path: str) -> str:
        return f"{self.api.endpoint}/{self.repo}/resolve/main/{path}"


Check = Callable[[Case], None]
CHECKS: list[Check] = []


def check(function: Check) -> Check:
    CHECKS.append(function)
    return function


@contextlib.contextmanager
def refused(kind: type[Exception], status: int | None = None) -> Iterator[None]:
    try:
        yield
    except kind as error:
        found = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        assert status in (None, found), f"status {found} instead of {status}"
        return
    raise AssertionError(f"no {kind.__name__}")


@check
def a_private_repository(case: Case) -> None:
    case.api.create_repo(case.repo, private=True)
    info = case.api.model_info(case.repo)
    assert info.private
    assert [one.rfilename for one in info.siblings or []] == [".gitattributes"]
    case.api.create_repo(case.repo, private=True, exist_ok=True)
    with refused(HfHubHTTPError, 409):
        case.api.create_repo(case.repo, private=True)


@check
def nobody_else_sees_it(case: Case) -> None:
    with refused(HfHubHTTPError):  # the Hub says 401, which the client takes for "not found" with https only
        HfApi(endpoint=case.api.endpoint, token=False).model_info(case.repo)
    with refused(RepositoryNotFoundError):
        case.api.model_info(case.repo + "-that-is-not-there")


@check
def large_and_small_files_in_one_commit(case: Case) -> None:
    adds = [CommitOperationAdd("model.safetensors", case.large), CommitOperationAdd("config.json", case.small)]
    before = case.head
    done = case.api.create_commit(case.repo, adds, commit_message="both", parent_commit=before)
    assert done.oid == case.head != before


@check
def the_tree_names_sizes_and_hashes(case: Case) -> None:
    entries = {one.path: one for one in case.api.list_repo_tree(case.repo, recursive=True)}
    large, small = entries["model.safetensors"], entries["config.json"]
    assert large.lfs.sha256 == hashlib.sha256(case.large).hexdigest()
    assert (large.size, large.lfs.size) == (len(case.large), len(case.large))
    assert large.xet_hash or constants.HF_HUB_DISABLE_XET
    assert small.lfs is None
    assert small.blob_id == hashlib.sha1(f"blob {len(case.small)}\0".encode() + case.small).hexdigest()


@check
def paths_and_folders(case: Case) -> None:
    adds = [CommitOperationAdd("a/b/c.txt", b"c"), CommitOperationAdd("a/d.txt", b"d")]
    case.api.create_commit(case.repo, adds, commit_message="folders")
    assert {one.path for one in case.api.list_repo_tree(case.repo, "a")} == {"a/b", "a/d.txt"}
    found = case.api.get_paths_info(case.repo, ["a", "a/d.txt", "nothing"])
    assert sorted(one.path for one in found) == ["a", "a/d.txt"]
    with refused(EntryNotFoundError):
        list(case.api.list_repo_tree(case.repo, "nothing"))
    with refused(RevisionNotFoundError):
        case.api.model_info(case.repo, revision="nothing")


@check
def downloads_are_what_was_uploaded(case: Case) -> None:
    folder = Path(case.api.snapshot_download(case.repo, cache_dir=case.folder / "cache"))
    assert (folder / "model.safetensors").read_bytes() == case.large
    assert (folder / "config.json").read_bytes() == case.small
    with refused(EntryNotFoundError):
        case.api.hf_hub_download(case.repo, "nothing", cache_dir=case.folder / "cache")


@check
def resolve_leads_to_another_origin(case: Case) -> None:
    with httpx2.Client() as http:
        answer = http.head(case.url("model.safetensors"), headers=case.token())
        assert answer.status_code == 302
        sha256 = hashlib.sha256(case.large).hexdigest()
        assert answer.headers["x-linked-etag"].strip('"') == sha256
        assert answer.headers["x-linked-size"] == str(len(case.large))
        assert answer.headers["x-repo-commit"] == case.head
        location = answer.headers["location"]
        assert urlsplit(location).netloc != urlsplit(case.api.endpoint).netloc
        part = http.get(location, headers={"Range": "bytes=1000-1999"})
        assert (part.status_code, part.content) == (206, case.large[1000:2000])
        assert part.headers["content-range"] == f"bytes 1000-1999/{len(case.large)}"
        tail = http.get(location, headers={"Range": "bytes=-5"})
        assert (tail.status_code, tail.content) == (206, case.large[-5:])
        assert http.get(location, headers={"Range": f"bytes={len(case.large)}-"}).status_code == 416


@check
def small_files_come_from_the_hub_itself(case: Case) -> None:
    # Where an answer is compressed its length tells nothing.
    headers = {**case.token(), "Accept-Encoding": "identity"}
    with httpx2.Client(follow_redirects=True) as http:
        answer = http.get(case.url("config.json"), headers=headers)
        assert (answer.status_code, answer.content) == (200, case.small)
        assert answer.headers["x-repo-commit"] == case.head
        assert http.get(case.url("nothing"), headers=headers).headers["x-error-code"] == "EntryNotFound"


@check
def a_commit_on_an_old_parent_is_refused(case: Case) -> None:
    old = case.head
    case.api.create_commit(case.repo, [CommitOperationAdd("x.txt", b"1")], commit_message="one", parent_commit=old)
    with refused(HfHubHTTPError, 412):
        again = [CommitOperationAdd("x.txt", b"2")]
        case.api.create_commit(case.repo, again, commit_message="two", parent_commit=old)


@check
def uploaded_by_one_and_committed_by_another(case: Case) -> None:
    data = os.urandom(1 << 20)
    operation = CommitOperationAdd("later.safetensors", data)
    case.api.preupload_lfs_files(case.repo, [operation], free_memory=True)
    # Pickled as between processes: the second knows the hash and no bytes.
    other = pickle.loads(pickle.dumps(operation))
    HfApi(endpoint=case.api.endpoint, token=case.api.token).create_commit(case.repo, [other], commit_message="later")
    path = case.api.hf_hub_download(case.repo, "later.safetensors", cache_dir=case.folder / "cache")
    assert Path(path).read_bytes() == data


@check
def a_large_file_that_was_never_uploaded(case: Case) -> None:
    url = f"{case.api.endpoint}/api/models/{case.repo}/commit/main"
    file = f'{{"path": "no.bin", "algo": "sha256", "oid": "{"0" * 64}", "size": 1}}'
    lines = f'{{"key": "header", "value": {{"summary": "no"}}}}\n{{"key": "lfsFile", "value": {file}}}\n'
    headers = {**case.token(), "Content-Type": "application/x-ndjson"}
    assert httpx2.post(url, content=lines.encode(), headers=headers).status_code == 400


@check
def a_pull_request(case: Case) -> None:
    before = case.head
    add = [CommitOperationAdd("pull.txt", b"pull")]
    done = case.api.create_commit(case.repo, add, commit_message="pull", create_pr=True)
    assert done.pr_revision
    assert case.head == before
    assert case.api.model_info(case.repo, revision=done.pr_revision).sha == done.oid
    details = case.api.get_discussion_details(case.repo, int(done.pr_num or 0))
    assert details.is_pull_request
    assert details.target_branch == "refs/heads/main"
    case.api.merge_pull_request(case.repo, int(done.pr_num or 0))
    assert case.api.file_exists(case.repo, "pull.txt")


@check
def branches_and_tags(case: Case) -> None:
    head = case.head
    case.api.create_branch(case.repo, branch="side/one")
    add = [CommitOperationAdd("side.txt", b"side")]
    side = case.api.create_commit(case.repo, add, commit_message="side", revision="side/one")
    assert case.head == head
    case.api.create_tag(case.repo, tag="v1", revision="side/one")
    refs = case.api.list_repo_refs(case.repo)
    assert {one.name: one.target_commit for one in refs.branches}["side/one"] == side.oid
    assert {one.name: one.target_commit for one in refs.tags} == {"v1": side.oid}
    with refused(HfHubHTTPError, 409):
        case.api.create_branch(case.repo, branch="side/one")
    case.api.delete_branch(case.repo, branch="side/one")
    case.api.delete_tag(case.repo, tag="v1")
    with refused(RevisionNotFoundError):
        case.api.model_info(case.repo, revision="side/one")


@check
def commits_have_authors_and_titles(case: Case) -> None:
    user = case.api.whoami()["name"]
    commits = case.api.list_repo_commits(case.repo)
    assert commits[-1].title == "initial commit"
    assert commits[0].commit_id == case.head
    assert all(one.authors == [user] for one in commits)


@check
def files_are_deleted(case: Case) -> None:
    gone = [CommitOperationDelete("a/", is_folder=True), CommitOperationDelete("x.txt")]
    case.api.create_commit(case.repo, gone, commit_message="less")
    paths = set(case.api.list_repo_files(case.repo))
    assert "config.json" in paths
    assert not {"x.txt", "a/d.txt", "a/b/c.txt"} & paths


@check
def a_moved_repository_answers_to_its_old_name(case: Case) -> None:
    old, case.repo = case.repo, f"{case.repo}-moved"
    case.api.move_repo(old, case.repo)
    assert case.api.model_info(old).id == case.repo
    path = case.api.hf_hub_download(old, "model.safetensors", cache_dir=case.folder / "cache")
    assert Path(path).read_bytes() == case.large


@check
def a_deleted_repository_is_gone(case: Case) -> None:
    case.api.delete_repo(case.repo)
    with refused(RepositoryNotFoundError):
        case.api.model_info(case.repo)


def run(api: HfApi, namespace: str, folder: Path) -> dict[str, str | None]:
    """The failure of every check, None where there was none. The repository is deleted also after failures."""
    case, results = Case(api, f"{namespace}/conformance-{secrets.token_hex(4)}", folder), {}
    try:
        for one in CHECKS:
            try:
                one(case)
            except Exception:
                results[one.__name__] = traceback.format_exc()
            else:
                results[one.__name__] = None
    finally:
        api.delete_repo(case.repo, missing_ok=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--namespace", required=True, help="user or organisation that the repository is made for")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = run(HfApi(), options.namespace, Path(folder))
    lines = [f"{'FAILED' if failure else 'passed'}  {name}" for name, failure in results.items()]
    failures = [f"\n{name}\n{failure}" for name, failure in results.items() if failure]
    sys.stdout.write("\n".join([*lines, *failures, ""]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

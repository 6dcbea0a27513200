"""One upload to the Hub as one commit, that can be interrupted and repeated.

A repository is as it was or complete, since nothing refers to uploaded files before the one commit that brings them
all. `HfApi.upload_large_folder`, and with Xet `upload_folder` too, commit in several steps: a reader in between would
find a configuration without all weights, or new weights under old code. This needs neither torch nor the package.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_KEPT = {"README.md", "LICENSE"}  # never deleted


class ConflictError(OSError):
    """Someone else committed to the branch, or the tag exists."""


class UploadError(OSError):
    """An upload broke off before its commit: nothing of it is visible."""


@dataclass(frozen=True)
class Published:
    """What `push` did."""

    files: tuple[Path, ...]  # names, as relative paths
    commit: str | None = None  # its hash; None after a dry run
    url: str | None = None  # of the commit
    pull_request: str | None = None  # its address
    deleted: tuple[str, ...] = ()  # what an earlier push had put there and this checkpoint has not


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError unless the Hub could have a repository ``user/name`` of this name."""
    from huggingface_hub.utils import validate_repo_id

    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id is {repo_id!r}: give user/name or organisation/name")
    validate_repo_id(repo_id)


def show(files: Sequence[Path], checkpoint: Path) -> None:
    """Print sizes and names of files, their sum, and what of the checkpoint's folder stays behind."""
    for file in files:
        print(f"{file.stat().st_size:>15,}  {file.name}")
    print(f"{sum(file.stat().st_size for file in files):>15,}  bytes in {len(files)} files")
    names = {file.name for file in files}
    if left := sorted(path.name for path in checkpoint.iterdir() if path.name not in names):
        print(f"left out: {', '.join(map(ascii, left[:12]))}{f' and {len(left) - 12} more' if left[12:] else ''}")


def hub_api(token: str | None = None) -> Any:
    """Return the Hub's client, of the endpoint that ``HF_ENDPOINT`` names."""
    from huggingface_hub import HfApi

    return HfApi(token=token)


def commit(
    files: Sequence[Path],
    repo_id: str,
    *,
    api: Any,
    owned: Collection[str] = (),
    private: bool = True,
    revision: str | None = None,
    create_pr: bool = False,
    message: str = "Upload model and code",
    parent_commit: str | None = None,
    tag: str | None = None,
    replace_card: bool = False,
) -> Published:
    """Put files at the root of a repository, in one commit on top of the head that was seen before the upload.

    Large files go up first and stay unreferenced until the commit; a call after an interruption skips those that have
    arrived. What an earlier push put there and this one lacks (a shard, a template) is deleted by the same commit.

    Args:
        files: all in one folder.
        repo_id: ``user/name``; created if it does not exist.
        api: an ``HfApi``.
        owned: names, beside those of weights, that the commit deletes where they are not among `files`.
        private: for a new repository; an existing one keeps its visibility.
        revision: branch to commit to, created if it does not exist.
        create_pr: open a pull request instead of committing to the branch.
        message: of the commit.
        parent_commit: hash that the branch's head must have; by default the head at the time of the call.
        tag: name for the new commit; must not exist.
        replace_card: replace the ``README.md`` that the repository already has, which is kept otherwise.

    Raises:
        ConflictError: the branch is not, or no longer, at `parent_commit`, or the tag exists.
        UploadError: the connection broke; calling again completes the upload.
    """
    if tag and create_pr:
        raise ValueError("tag and create_pr exclude one another: tag the commit after merging")
    with _clear_errors(repo_id):
        head = _prepare(api, repo_id, private, revision, create_pr, parent_commit, tag)
        there = set(api.list_repo_files(repo_id, revision=head))
        if "README.md" in there and not replace_card:
            print("The repository keeps its README.md; --replace-card replaces it.")
            files = [file for file in files if file.name != "README.md"]
        missing = there - {file.name for file in files} - _KEPT
        stale = tuple(sorted(name for name in missing if name in owned or _WEIGHTS.fullmatch(name)))
        for name in stale:
            print(f"deleted there, as this checkpoint has none: {name}")
        info = _send(api, repo_id, files, stale, revision, create_pr, message, head)
        if tag:
            api.create_tag(repo_id, tag=tag, revision=info.oid)
    names = tuple(Path(file.name) for file in files)
    return Published(names, info.oid, str(info.commit_url), getattr(info, "pr_url", None), stale)


@contextmanager
def _clear_errors(repo_id: str) -> Iterator[None]:
    """Broken connections as `UploadError`; those of the Hub's client are RuntimeError (LFS) or its HTTP library's."""
    try:
        yield
    except Exception as error:
        if type(error) is not RuntimeError and not type(error).__module__.startswith("httpx"):
            raise
        raise UploadError(
            f"the upload to {repo_id} broke off: {error} ({error.__cause__ or type(error).__name__}). Nothing of it "
            "is visible; the same command goes on, without the large files that have arrived"
        ) from error


def _prepare(
    api: Any, repo_id: str, private: bool, revision: str | None, create_pr: bool, parent: str | None, tag: str | None
) -> str:
    """Create what is missing and return the head to commit on."""
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    info = api.repo_info(repo_id, revision=revision)
    head = info.sha
    if private and not info.private:
        print(f"{repo_id} is public and stays so.")
    if parent is not None and not (re.fullmatch("[0-9a-f]{7,40}", parent) and head.startswith(parent)):
        raise ConflictError(_conflict(repo_id, revision, parent, head))
    if tag and any(ref.name == tag for ref in api.list_repo_refs(repo_id).tags):
        raise ConflictError(f"{repo_id} already has a tag {tag!r}: choose another")
    return head


def _send(
    api: Any,
    repo_id: str,
    files: Sequence[Path],
    stale: Sequence[str],
    revision: str | None,
    create_pr: bool,
    message: str,
    head: str,
) -> Any:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    additions = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in files]
    where: dict[str, Any] = {"revision": revision, "create_pr": create_pr}
    try:
        api.preupload_lfs_files(repo_id, additions, **where)
        operations = [*additions, *(CommitOperationDelete(path_in_repo=name) for name in stale)]
        return api.create_commit(repo_id, operations, commit_message=message, parent_commit=head, **where)
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code != 412:
            raise
        now = api.repo_info(repo_id, revision=revision).sha
        raise ConflictError(_conflict(repo_id, revision, head, now)) from error


def _conflict(repo_id: str, revision: str | None, expected: str, head: str) -> str:
    return (
        f"{repo_id} has changed: {revision or 'its main branch'} is at {head[:12]}, not at {expected[:12]}. Nothing "
        "was committed. Look at what is there, then push again on top of it, or with --create-pr"
    )

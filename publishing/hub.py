"""One upload to the Hub as one commit, that can be interrupted and repeated.

A repository is as it was or complete, since nothing refers to uploaded files before the one commit that brings them
all. `HfApi.upload_large_folder`, and with Xet `upload_folder` too, commit in several steps: a reader in between would
find a configuration without all weights, or new weights under old code. This needs neither torch nor the package.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_KEPT = {"README.md", "LICENSE"}  # never deleted


class ConflictError(OSError):
    """Someone else committed to the branch, or the tag exists."""


class UploadError(OSError):
    """The connection broke; the message says what of the upload is visible."""


@dataclass(frozen=True)
class Published:
    """What `push` did."""

    files: tuple[Path, ...]  # names, as relative paths
    commit: str | None = None  # its hash; None after a dry run
    url: str | None = None  # of the commit
    pull_request: str | None = None  # its address
    deleted: tuple[str, ...] = ()  # what an earlier push had put there and this checkpoint has not
    changed: bool = True  # False where everything was there already: `commit` is then the head

    @property
    def summary(self) -> str:
        """One line for the terminal."""
        if self.commit is None:
            return "dry run: nothing was sent"
        if not self.changed:
            return f"nothing to commit: all of it is there already, at {self.url}"
        return f"committed: {self.pull_request or self.url}"


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
    complete_card: Callable[[Path], None] | None = None,
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
        complete_card: called with a copy of a card that is kept, to add to its metadata; the result is committed.

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
            files = _keep_card(api, repo_id, head, files, complete_card)
        missing = there - {file.name for file in files} - _KEPT
        stale = tuple(sorted(name for name in missing if name in owned or _WEIGHTS.fullmatch(name)))
        for name in stale:
            print(f"deleted there, as this checkpoint has none: {name}")
        send = _prepare_sending(api, repo_id, files, stale, revision, create_pr, message, head)
    info = send()
    if tag:
        _create_tag(api, repo_id, tag, info.oid)
    names, proposal = tuple(Path(file.name) for file in files), getattr(info, "pr_url", None)
    return Published(names, info.oid, str(info.commit_url), proposal, stale, changed=info.oid != head)


def _keep_card(
    api: Any, repo_id: str, head: str, files: Sequence[Path], complete: Callable[[Path], None] | None
) -> list[Path]:
    """The files without a model card, or with the repository's own after `complete` has added to it."""
    others = [file for file in files if file.name != "README.md"]
    if complete is None or len(others) == len(files):
        print("The repository keeps its README.md; --replace-card replaces it.")
        return others
    (card,) = set(files) - set(others)
    with tempfile.TemporaryDirectory() as cache:
        shutil.copyfile(api.hf_hub_download(repo_id, card.name, revision=head, cache_dir=cache), card)
    complete(card)
    print("The repository keeps the text of its README.md, with the new metadata; --replace-card replaces it.")
    return [*others, card]


def _create_tag(api: Any, repo_id: str, tag: str, commit: str) -> None:
    try:
        api.create_tag(repo_id, tag=tag, revision=commit)
    except Exception as error:
        if not (isinstance(error, OSError) or _is_broken_connection(error)):
            raise
        with suppress(Exception):  # the answer may have been lost, and not the tag
            if _has_tag(api, repo_id, tag):
                return
        raise UploadError(
            f"the commit {commit[:12]} is on {repo_id}, complete, but the tag {tag!r} could not be set: {error}. The "
            "same command tries that again and uploads nothing twice"
        ) from error


def _has_tag(api: Any, repo_id: str, tag: str) -> bool:
    return any(ref.name == tag for ref in api.list_repo_refs(repo_id).tags)


def _is_broken_connection(error: Exception) -> bool:
    """Errors of the Hub's client that are no answers: RuntimeError (LFS) or its HTTP library's."""
    return type(error) is RuntimeError or type(error).__module__.startswith("httpx")


@contextmanager
def _clear_errors(repo_id: str) -> Iterator[None]:
    """Broken connections before the commit as `UploadError`."""
    try:
        yield
    except Exception as error:
        if not _is_broken_connection(error):
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
    if tag and _has_tag(api, repo_id, tag):
        raise ConflictError(f"{repo_id} already has a tag {tag!r}: choose another")
    return head


def _prepare_sending(
    api: Any,
    repo_id: str,
    files: Sequence[Path],
    stale: Sequence[str],
    revision: str | None,
    create_pr: bool,
    message: str,
    head: str,
) -> Callable[[], Any]:
    """Upload the large files; return what commits."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    additions = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in files]
    where: dict[str, Any] = {"revision": revision, "create_pr": create_pr}
    api.preupload_lfs_files(repo_id, additions, **where)
    operations = [*additions, *(CommitOperationDelete(path_in_repo=name) for name in stale)]

    def send() -> Any:
        try:
            return api.create_commit(repo_id, operations, commit_message=message, parent_commit=head, **where)
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code != 412:
                raise
            now = api.repo_info(repo_id, revision=revision).sha
            raise ConflictError(_conflict(repo_id, revision, head, now)) from error
        except Exception as error:
            if not _is_broken_connection(error):
                raise
            seen = _seen_after(api, repo_id, revision, create_pr, head)
            raise UploadError(f"the connection broke while committing to {repo_id}: {error}. {seen}") from error

    return send


def _seen_after(api: Any, repo_id: str, revision: str | None, create_pr: bool, head: str) -> str:
    """What can be told of a commit whose answer was lost: the Hub may have made it all the same."""
    if create_pr:
        return f"A pull request may be open: look at {api.endpoint}/{repo_id}/discussions before you try again"
    again = "the same command goes on, and commits nothing that is there already"
    try:
        now = api.repo_info(repo_id, revision=revision).sha
    except Exception as error:
        if not (isinstance(error, OSError) or _is_broken_connection(error)):
            raise
        return f"Whether the commit is there could not be found out; {again}"
    if now == head:
        return f"Nothing of it is visible; {again}"
    return f"{revision or 'The main branch'} has moved to {now[:12]}, so the commit is probably there; {again}"


def _conflict(repo_id: str, revision: str | None, expected: str, head: str) -> str:
    return (
        f"{repo_id} has changed: {revision or 'its main branch'} is at {head[:12]}, not at {expected[:12]}. Nothing "
        "was committed. Look at what is there, then push again on top of it, or with --create-pr"
    )

"""A copy of a checkpoint in transformers' own layout, published beside it (`user/name-hf`).

The weights are those of the checkpoint under other names, converted and accounted for by `conversion.convert`; there
is no code in it. Checkpoints that the native classes cannot represent are refused there, with the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..conversion.convert import convert
from .cards import write_native
from .hub import Published, check_repo_id, commit, show
from .probe import Output, probe
from .secrets_check import refuse_secrets

_TASK = "image-text-to-text"


def make_native(checkpoint: Path, folder: Path, repo_id: str, original: str, license: str | None) -> Output:
    """Writes the copy and its card to `folder`; returns what it computes.

    Args:
        checkpoint: In the original layout.
        folder: Absent.
        repo_id, original: Repositories of the copy and of what it is a copy of.
        license: Identifier for the card.

    Raises:
        NativeLayoutError: Transformers' own classes would compute something else.
    """
    check_repo_id(repo_id)
    convert(checkpoint, folder, "native", progress=False)
    write_native(folder / "README.md", repo_id, original, license)
    return probe(folder, _TASK, layout="native")


def push_native(folder: Path, repo_id: str, dry_run: bool, **options: Any) -> Published:
    """Uploads what `make_native` wrote; options as of `hub.commit`. Stray files and credentials are refused."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    stray = [
        path.name for path in files if path.is_symlink() or path.suffix not in _SUFFIXES and path.stem != "LICENSE"
    ]
    if stray:
        raise ValueError(f"{folder} holds what no converted checkpoint has: {', '.join(stray)}")
    refuse_secrets(files)
    show(files, folder)
    if dry_run:
        return Published(tuple(Path(path.name) for path in files))
    return commit(files, repo_id, **options)


_SUFFIXES = (".json", ".safetensors", ".jinja", ".md", ".txt", ".model")

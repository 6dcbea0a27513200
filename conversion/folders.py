"""Checkpoint folders: found (also on the Hub), written aside and renamed when complete, weights streamed in shards."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from tqdm import tqdm

from ..checkpoint_internvl import INDEX, CheckpointError, LazyTensor
from ..upload_to_hub import write_json

# Everything beside the weights that can belong to a checkpoint.
_SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.md", "*.py")
_WEIGHT_FILES = ("*.safetensors", "*.bin")


def resolve(name_or_path: str | Path, *, weights: bool = True, **hub_options: Any) -> Path:
    """The folder of a checkpoint: a local one as it is, a Hub repository after downloading it.

    Args:
        name_or_path: A folder, or `organisation/name`.
        weights: Also fetch the weight files.
        **hub_options: `revision`, `cache_dir`, `token`, `local_files_only` of `huggingface_hub.snapshot_download`.

    Raises:
        CheckpointError: neither a folder nor a repository that can be reached.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if path.exists():
        raise CheckpointError(f"{path} is a file: give the folder that holds it.")
    patterns = [*_SIDE_FILES, *(_WEIGHT_FILES if weights else ())]
    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=patterns, **hub_options))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{name_or_path} is no folder here and no repository within reach: {reason}") from None


@contextmanager
def staged_folder(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside `target` that takes its name when the block ends, and is gone if the block raises.

    Raises:
        FileExistsError: `target` exists and is not empty, and `overwrite` is false; or it is a file.
    """
    target = Path(target).resolve()
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file: choose another place.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(f"{target} exists and is not empty: choose another place or allow overwriting it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        staged = Path(temporary) / "new"
        staged.mkdir()
        yield staged
        if target.exists():
            target.rename(Path(temporary) / "old")
        staged.rename(target)


def refuse_same(source: Path, target: str | Path) -> None:
    """Raises `FileExistsError` where writing `target` would destroy `source`."""
    source, target = source.resolve(), Path(target).resolve()
    if source == target or source.is_relative_to(target):
        raise FileExistsError(f"{target} holds the source itself: write into another folder.")


def write_tensors(
    tensors: Mapping[str, LazyTensor], folder: Path, max_shard_size: str | int = "5GB", progress: bool = True
) -> list[Path]:
    """Writes tensors as safetensors, one shard in memory at a time.

    Args:
        tensors: In the order in which shards are filled.
        folder: Gets `model.safetensors`, or numbered shards and their index.
        max_shard_size: Of one file, in bytes or such as `"5GB"`; a single larger tensor makes a larger file.
        progress: Show a bar.

    Returns:
        The weight files.
    """
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        get_storage_id=lambda tensor: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    total = sum(tensor.nbytes for tensor in tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="Writing weights", disable=not progress) as bar:
        for name, keys in split.filename_to_tensors.items():
            shard = {}
            for key in keys:
                shard[key] = tensors[key].read().contiguous()
                bar.update(tensors[key].nbytes)
            save_file(shard, folder / name, metadata={"format": "pt"})
            del shard
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX, index)
    return [folder / name for name in split.filename_to_tensors]

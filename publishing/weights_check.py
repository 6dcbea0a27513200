"""Whether weight files are whole, told from their headers alone: no tensor is read, torch is not needed.

Found are truncated and empty files, Git LFS pointers and error pages in the place of weights, and an index that says
something else than its shards hold. Changed values inside a tensor are not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_LONGEST_HEADER = 100_000_000  # bytes, as in safetensors itself


class DamagedError(ValueError):
    """A weight file is not what it should be."""


def refuse_damaged(files: Sequence[Path]) -> None:
    """Raise `DamagedError` unless every safetensors file is whole and an index among `files` fits them."""
    found: dict[str, str] = {}
    for file in files:
        if file.suffix == ".safetensors":
            found.update(dict.fromkeys(tensor_names(file), file.name))
    for index in (file for file in files if file.suffix == ".json"):
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        apart = sorted(name for name in {*weight_map, *found} if weight_map.get(name) != found.get(name))
        if apart:
            raise DamagedError(
                f"{index} and its shards disagree on {len(apart)} of {len({*weight_map, *found})} tensors, such as "
                f"{', '.join(apart[:3])}: fetch or write both again"
            )


def tensor_names(path: Path) -> list[str]:
    """Names of the tensors of a safetensors file.

    Raises:
        DamagedError: the header is none, it has no tensor, or the tensors are not exactly what follows it.
    """
    values, length = _header(path)
    tensors = {name: value for name, value in values.items() if name != "__metadata__"}
    if not tensors:
        raise DamagedError(f"{path} has no tensors")
    end = 0
    try:
        for start, stop in sorted(tuple(value["data_offsets"]) for value in tensors.values()):
            if start != end or stop < start:
                raise DamagedError(f"{path} is damaged: its tensors overlap or leave gaps. Fetch or write it again")
            end = stop
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(f"{path} is damaged: its header lacks the place of a tensor") from error
    size = path.stat().st_size
    if 8 + length + end != size:
        raise DamagedError(
            f"{path} is damaged: it has {size:,} bytes and should have {8 + length + end:,}. Fetch or write it again"
        )
    return list(tensors)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and how many bytes it takes."""
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if first == b"version ":
            raise DamagedError(f"{path} is a Git LFS pointer, not the weights: `git lfs pull` fetches them")
        if len(first) < 8 or length > min(_LONGEST_HEADER, path.stat().st_size - 8):
            raise DamagedError(f"{path} is no safetensors file, or its beginning is lost: fetch or write it again")
        content = file.read(length)
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is no safetensors file, or damaged: its header is not valid JSON") from error
    if not isinstance(values, dict):
        raise DamagedError(f"{path} is no safetensors file: its header holds a {type(values).__name__}")
    return values, length

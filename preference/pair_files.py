"""Files of preference pairs in the original's form (MMPR): a jsonl per data set and kind, and one meta file.

A file is complete or not there: rows go to a hidden one beside it, which takes its place at the end.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ..data.sources import DataSource

META_NAME = "meta.json"


class PairFile:
    """A jsonl that appears under its name when the block is left without an error; without rows, none is there.

    Args:
        path: What to write; replaced if it exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._temporary = _temporary(path)
        self._file: BinaryIO | None = None

    def __enter__(self) -> PairFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._temporary.open("wb")
        return self

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row."""
        assert self._file is not None
        self._file.write(_encode(row) + b"\n")
        self.rows += 1

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._file is not None
        self._file.close()
        if kind is None and self.rows:
            os.replace(self._temporary, self.path)
            return
        self._temporary.unlink(missing_ok=True)
        if kind is None:  # what an earlier call wrote there is no longer true
            self.path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A file of this process alone; process ids of several machines may be the same."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def _encode(row: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a lone surrogate of the source has no UTF-8; escaped it is what it was
        return json.dumps(row).encode()


def meta_entry(path: Path, rows: int, source: DataSource, max_tiles: int | None) -> dict[str, Any]:
    """The entry of a pair file for `data.meta_path`; folders are written in full, so that it works from anywhere.

    Args:
        path: What was written.
        rows: How many.
        source: The data set of the questions.
        max_tiles: Most tiles of an image that the model was shown; None for the checkpoint's own.
    """
    entry: dict[str, Any] = {
        "root": source.root if "://" in source.root else str(Path(source.root).absolute()),
        "annotation": str(path.absolute()),
        "data_augment": source.data_augment,
        "repeat_time": 1,
        "length": rows,
    }
    if not source.exif:
        entry["exif"] = False
    return entry if max_tiles is None else entry | {"max_dynamic_patch": max_tiles}


def update_meta(folder: Path, entries: Mapping[str, Mapping[str, Any]], written: Iterable[str]) -> Path | None:
    """Puts entries into the folder's meta file and keeps those of other runs whose files are still there.

    So both pipelines can write to one folder, whose meta file then has the pairs of both.

    Args:
        folder: Has, or gets, `meta.json`.
        entries: By name.
        written: Names that this run is responsible for; those without an entry are taken out.

    Returns:
        The meta file; None if there is nothing to put into it.

    Raises:
        ValueError: there is a `meta.json` that is not such a file.
    """
    path = folder / META_NAME
    old = _read_meta(path) if path.exists() else {}
    kept = {name: entry for name, entry in old.items() if Path(entry["annotation"]).exists()}
    merged = {name: entry for name, entry in kept.items() if name not in set(written)} | dict(entries)
    if not merged:
        path.unlink(missing_ok=True)
        return None
    write_json(path, dict(sorted(merged.items())))
    return path


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_bytes())
        if all(isinstance(entry["annotation"], str) for entry in meta.values()):
            return meta
    except (ValueError, AttributeError, KeyError, TypeError):
        pass
    raise ValueError(f"{path} is no meta file of pairs; choose another output folder")


def write_json(path: Path, value: Any) -> None:
    """Writes a json file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)

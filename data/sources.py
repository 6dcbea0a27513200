"""Data sets of a run as they are described: a meta file, or lists of paths, to one `DataSource` each.

Nothing is opened here but the meta file; `mixture` opens the annotation files and makes one row space of them.
"""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..training.arguments import DataArguments


class DataSourceError(ValueError):
    """A data set that is described wrongly or cannot be opened; the message names it.

    Args:
        name: The data set, or the file that describes it.
        problem: What is wrong and how to put it right.
    """

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(name, problem)
        self.name = name
        self.problem = problem

    def __str__(self) -> str:
        return f"data set {self.name!r}: {self.problem}"


@dataclass(frozen=True)
class DataSource:
    """One data set: an entry of the original's meta json, or of the lists of paths.

    Attributes:
        name: Unique in a mixture.
        annotation: The `.jsonl` or `.json` file.
        root: Folder that paths of its rows are relative to; empty for the working directory.
        data_augment: Whether images are recompressed as JPEG at random.
        min_dynamic_patch, max_dynamic_patch: Limits of the tiles of an image; None for those of the model.
        repeat_time: How often each row is seen in an epoch; 0 switches the data set off. A fraction is a random
            subset of the rows (see `Mixture.epoch_rows`).
        exif: Whether images are turned upright by their EXIF orientation.
        length: Rows that the meta file claims; only compared, with a warning.

    Raises:
        DataSourceError: a value of the wrong type or out of range.
    """

    name: str
    annotation: str
    root: str = ""
    data_augment: bool = False
    min_dynamic_patch: int | None = None
    max_dynamic_patch: int | None = None
    repeat_time: float = 1
    exif: bool = True
    length: int | None = None

    def __post_init__(self) -> None:
        for key, expected in (("annotation", str), ("root", str), ("data_augment", bool), ("exif", bool)):
            if not isinstance(getattr(self, key), expected):
                self._refuse(key, {str: "text", bool: "true or false"}[expected])
        for key in ("min_dynamic_patch", "max_dynamic_patch"):
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < 1):
                self._refuse(key, "a positive integer, or null for the model's")
        if None not in (self.min_dynamic_patch, self.max_dynamic_patch):
            if self.min_dynamic_patch > self.max_dynamic_patch:  # type: ignore[operator]
                self._refuse("min_dynamic_patch", f"at most max_dynamic_patch={self.max_dynamic_patch}")
        repeat = self.repeat_time
        if isinstance(repeat, bool) or not isinstance(repeat, (int, float)) or not 0 <= repeat < math.inf:
            self._refuse("repeat_time", "a number from 0 (off) upwards; below 1 for a random share of the rows")

    def _refuse(self, key: str, expected: str) -> None:
        raise DataSourceError(self.name, f"{key} must be {expected}, got {getattr(self, key)!r}")


def load_sources(data_arguments: DataArguments, evaluation: bool = False) -> list[DataSource]:
    """The data sets that the arguments name, in order; none if they name none.

    Evaluation data is never augmented, whatever its meta file says.

    Raises:
        DataSourceError: an unreadable meta file, an unknown key, a bad value, or a name or file given twice.
    """
    prefix = "eval_" if evaluation else ""
    defaults = {"data_augment": data_arguments.data_augment, "exif": data_arguments.exif}
    if evaluation:
        defaults["data_augment"] = False
    meta_path: str | None = getattr(data_arguments, f"{prefix}meta_path")
    if meta_path is not None:
        return read_meta(meta_path, defaults, {"data_augment": False} if evaluation else {})
    paths: list[str] = getattr(data_arguments, f"{prefix}data_paths")
    folders = getattr(data_arguments, f"{prefix}image_folders") or [None] * len(paths)
    repeats = [] if evaluation else data_arguments.repeat_times
    return [
        DataSource(name, str(path), str(folder or ""), repeat_time=repeat, **defaults)
        for name, path, folder, repeat in zip(_names(paths), paths, folders, repeats or [1] * len(paths), strict=True)
    ]


def read_meta(
    path: str | Path, defaults: dict[str, Any] | None = None, overrides: dict[str, Any] | None = None
) -> list[DataSource]:
    """Data sets of a meta json: an object of name to `{"root", "annotation", "data_augment", "repeat_time", ...}`.

    A relative `annotation` or `root` is looked up in the working directory, as in the original; where nothing exists
    there, it is relative to the folder of the meta file.

    Args:
        path: The meta file.
        defaults: Fields of entries that lack them.
        overrides: Fields of all entries, whatever they say.

    Raises:
        DataSourceError: see `load_sources`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        meta = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, str(path)))
    except OSError as error:
        raise DataSourceError(str(path), f"cannot read the meta file: {error.strerror or error}") from error
    except DataSourceError:
        raise
    except ValueError as error:
        raise DataSourceError(str(path), f"the meta file is not valid json: {error}") from error
    if not isinstance(meta, dict) or not meta:
        raise DataSourceError(str(path), "a meta file is an object with one entry per data set: {name: {annotation}}")
    return [_entry(name, entry, Path(path).parent, defaults or {}, overrides or {}) for name, entry in meta.items()]


def _unique(pairs: list[tuple[str, Any]], path: str) -> dict[str, Any]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise DataSourceError(path, f"the meta file has {twice[0]!r} twice; json would keep the last one alone")
    return dict(pairs)


def _entry(name: str, entry: Any, folder: Path, defaults: dict[str, Any], overrides: dict[str, Any]) -> DataSource:
    if not isinstance(entry, dict) or not entry.get("annotation"):
        raise DataSourceError(name, f"an entry is an object with at least 'annotation', got {entry!r:.80}")
    known = [field.name for field in fields(DataSource) if field.name != "name"]
    for key in entry:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            advice = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise DataSourceError(name, f"unknown key {key!r}; {advice}")
    values = {**defaults, **{key: value for key, value in entry.items() if value is not None}, **overrides}
    for key in ("annotation", "root"):
        if isinstance(values.get(key), str):
            values[key] = _resolve(values[key], folder)
    return DataSource(name, **values)


def _resolve(path: str, folder: Path) -> str:
    beside = folder / path
    return path if not path or "://" in path or Path(path).exists() or not beside.exists() else str(beside)


def _names(paths: Sequence[str]) -> list[str]:
    """File names without suffix, with as many folders before them as tell all of them apart."""
    parts = [Path(path).with_suffix("").parts for path in paths]
    twice = [path for path, count in Counter(map(str, paths)).items() if count > 1]
    if twice:
        raise DataSourceError(twice[0], "the file is listed twice; see its rows more often with repeat_times")
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]

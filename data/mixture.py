"""Sources to one row space, and which of its rows make an epoch.

A row of a mixture is a number: the rows of the first source come first, then those of the second, and so on. An epoch
is an array of such numbers in that order. Nothing is shuffled, batched or opened beyond the annotation files. How data
sets are described is in `sources`, whose names can be imported from here too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from .annotations import RecordError
from .records import RecordFile, RowParser, parse_record
from .sources import DataSource, DataSourceError, load_sources, read_meta

__all__ = ["DataSource", "DataSourceError", "Mixture", "load_sources", "read_meta"]

logger = logging.getLogger(__name__)


class Mixture(Sequence[Any]):
    """All rows of several data sets, each row once; a source with `repeat_time` 0 is not opened and has none.

    Args:
        sources: The data sets; their names must differ.
        parse: What makes a record of a row, see `RecordFile`.

    Raises:
        DataSourceError: no sources, a name given twice, a file that is missing, empty or no annotation file, or every
            source switched off.
    """

    def __init__(self, sources: Sequence[DataSource], parse: RowParser = parse_record) -> None:
        if not sources:
            raise DataSourceError("(none)", "there is no data; set meta_path or data_paths")
        twice = [name for name, count in Counter(source.name for source in sources).items() if count > 1]
        if twice:
            raise DataSourceError(twice[0], "two data sets have this name; rename one")
        self.sources = tuple(sources)
        self.files = tuple(_open(source, parse) if source.repeat_time else None for source in sources)
        self.ends = np.cumsum([0 if file is None else len(file) for file in self.files], dtype=np.int64)
        if not len(self):
            raise DataSourceError(sources[0].name, "this and all others have repeat_time 0, so there is no data")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, row: int) -> Any:  # type: ignore[override]  # no slices
        return self.record(row)

    def locate(self, row: int) -> tuple[int, int]:
        """Index of the source that a row belongs to, and the row's place in it.

        Raises:
            IndexError: no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        source = int(np.searchsorted(self.ends, row, side="right"))
        return source, int(row) - self._start(source)

    def record(self, row: int) -> Any:
        """The row, validated: what `parse` makes of it.

        Raises:
            RecordError: it cannot be used. IndexError: no such row.
        """
        source, place = self.locate(row)
        file = self.files[source]
        assert file is not None  # a source that is off has no rows to locate
        return file[place]

    def source_of(self, row: int) -> DataSource:
        """The data set that a row belongs to."""
        return self.sources[self.locate(row)[0]]

    def sizes(self) -> dict[str, int]:
        """Rows of each data set by name; 0 where it is off."""
        return {s.name: 0 if f is None else len(f) for s, f in zip(self.sources, self.files, strict=True)}

    def fingerprint(self) -> str:
        """Hash of all rows and of what makes their lengths: 32 hexadecimal digits, the key of a cached index.

        Included are the content of the files, their order, names and roots, and the limits of tiles; not how often
        rows are repeated, except 0, and not augmentation. The media themselves are not read.
        """
        digest = hashlib.blake2b(digest_size=16)
        for source, file in zip(self.sources, self.files, strict=True):
            if file is not None:
                limits = (source.min_dynamic_patch, source.max_dynamic_patch, source.exif)
                digest.update(json.dumps([source.name, file.fingerprint(), *limits]).encode())
        return digest.hexdigest()

    def epoch_rows(self, seed: int) -> np.ndarray:
        """Rows of an epoch, int64, source by source: `floor(repeat_time)` copies of all rows, then a random subset.

        The subset has `round(rows * fraction)` rows and depends on the seed and the name of the data set alone, so it
        is the same in every epoch, and `repeat_time` 0.1 means a tenth of the data. The original takes the first
        `int(rows * repeat_time)` lines instead, and refuses 2.5 or cuts it to 2.
        """
        parts = [self._source_rows(index, seed) for index in range(len(self.sources))]
        return np.concatenate(parts)

    def _source_rows(self, index: int, seed: int) -> np.ndarray:
        source, start = self.sources[index], self._start(index)
        rows = np.arange(start, int(self.ends[index]), dtype=np.int64)
        whole = math.floor(source.repeat_time)
        count = round(len(rows) * (source.repeat_time - whole))
        generator = np.random.default_rng([seed, crc32(source.name.encode())])
        subset = np.sort(generator.choice(rows, count, replace=False)) if count else rows[:0]
        return np.concatenate([np.tile(rows, whole), subset])

    def _start(self, index: int) -> int:
        return int(self.ends[index - 1]) if index else 0


def _open(source: DataSource, parse: RowParser) -> RecordFile:
    try:
        file = RecordFile(source.annotation, source.root, parse)
    except FileNotFoundError as error:
        path = Path(source.annotation).absolute()
        raise DataSourceError(source.name, f"there is no annotation file {str(path)!r}; check the path") from error
    except (OSError, RecordError) as error:
        raise DataSourceError(source.name, f"cannot read {source.annotation!r} ({error})") from error
    if not len(file):
        raise DataSourceError(source.name, f"{source.annotation!r} has no rows; leave it out or set repeat_time to 0")
    if source.length is not None and source.length != len(file):
        logger.warning(
            "data set %r: length says %s rows, %s has %d", source.name, source.length, source.annotation, len(file)
        )
    return file

"""Index of a data set: tokens and tiles of every row, found without decoding pictures, cached by content.

The plan of an epoch (`training/packing.py`) is made from it, so that a run knows its length before its first step and
goes on where it stopped. Rows that cannot be used are in it too, with the reason.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .skipped import Skipped

logger = logging.getLogger(__name__)

FORMAT = 1
_CHUNK = 64
# What numpy, zip and json raise on damaged files.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, zlib.error)


@dataclass(frozen=True)
class RowLength:
    """What a row costs: `tokens`, visual ones included; `tiles`; and its supervised tokens."""

    tokens: int
    tiles: int
    supervised: int


def rows_without(rows: np.ndarray, left_out: Collection[int]) -> np.ndarray:
    """`rows` but for those in `left_out`, in order."""
    return rows[~np.isin(rows, np.fromiter(left_out, dtype=np.int64, count=len(left_out)))]


@dataclass(frozen=True)
class LengthIndex:
    """Lengths of the rows of a data set.

    Attributes:
        lengths: int32 (rows, 3): tokens, tiles, supervised tokens; zeros for rows that cannot be used.
        unusable: Row to the reason why it cannot be used.
    """

    lengths: np.ndarray
    unusable: dict[int, Skipped]

    @property
    def tokens(self) -> np.ndarray:
        """(rows,) tokens."""
        return self.lengths[:, 0]

    @property
    def tiles(self) -> np.ndarray:
        """(rows,) tiles."""
        return self.lengths[:, 1]

    def usable(self, rows: np.ndarray) -> np.ndarray:
        """`rows` without those that cannot be used, in order."""
        return rows_without(rows, self.unusable)

    def save(self, path: Path) -> None:
        """Writes the index as one `.npz`, complete or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        notes = [[row, s.source, s.where, s.reason] for row, s in self.unusable.items()]
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with temporary.open("wb") as file:
            np.savez_compressed(file, lengths=self.lengths, unusable=np.array(json.dumps(notes)))
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> LengthIndex:
        """Reads what `save` wrote."""
        with np.load(path) as data:
            notes = json.loads(str(data["unusable"]))
            return cls(data["lengths"], {row: Skipped(*rest) for row, *rest in notes})


class _Measurements(Dataset):
    """Chunks of rows as a data set, so that a DataLoader's workers measure them."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return -(-len(self.dataset) // _CHUNK)

    def __getitem__(self, index: int) -> list[RowLength | Skipped]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        end = min((index + 1) * _CHUNK, len(self.dataset))
        return [self.dataset.measure(row) for row in range(index * _CHUNK, end)]


def measure_all(dataset: Any, workers: int = 0, progress: bool = True) -> LengthIndex:
    """Measures every row of `dataset` (`len`, `measure(row) -> RowLength | Skipped`) in `workers` processes."""
    lengths = np.zeros((len(dataset), 3), dtype=np.int32)
    unusable: dict[int, Skipped] = {}
    for row, found in enumerate(_measured(dataset, workers, progress)):
        if isinstance(found, Skipped):
            unusable[row] = found
        else:
            lengths[row] = (found.tokens, found.tiles, found.supervised)
    return LengthIndex(lengths, unusable)


def _measured(dataset: Any, workers: int, progress: bool) -> Iterator[RowLength | Skipped]:
    loader = DataLoader(_Measurements(dataset), batch_size=None, num_workers=workers)
    with tqdm(total=len(dataset), desc="Measuring rows", unit=" rows", disable=not progress) as bar:
        for chunk in loader:
            yield from chunk
            bar.update(len(chunk))


def load_or_measure(
    dataset: Any, cache: Path, fingerprint: str, workers: int = 0, progress: bool = True
) -> LengthIndex:
    """The cached index of `fingerprint`, or a new one, which is then cached.

    Args:
        dataset: As for `measure_all`.
        cache: Folder of cached indices.
        fingerprint: Hash of all that the lengths depend on: rows, tokenizer, template, tiling, limits. Pictures are
            not part of it; a row whose picture has changed since is skipped in training and says so.
        workers: Processes.
        progress: Show a bar.
    """
    path = cache / f"{fingerprint}.npz"
    if path.is_file():
        try:
            index = LengthIndex.load(path)
            if index.lengths.shape == (len(dataset), 3):
                return index
            logger.warning("%s is of %d rows, not %d, and is made again", path, len(index.lengths), len(dataset))
        except _DAMAGE as error:
            logger.warning("%s cannot be read (%s) and is made again", path, error)
    index = measure_all(dataset, workers, progress)
    index.save(path)
    return index


def hash_of(*parts: Any) -> str:
    """Hash (32 hex digits) of values that json can write, of bytes, and of lists of them."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (FORMAT, *parts):
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of what decides a tokenizer's ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = backend.to_str().encode() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hash_of(type(tokenizer).__name__, model, tokenizer.special_tokens_map)

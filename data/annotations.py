"""Annotation files as sequences of decoded rows: `.jsonl` of any size by an index of line offsets, `.json` lists.

A row is decoded when it is asked for and means nothing here: `formats` and `records` say what it holds. Lines end with
a newline; a carriage return before it, blank lines, a UTF-8 byte order mark and a missing last newline are all fine.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections.abc import Sequence
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = (".jsonl", ".json")
_CHUNK_BYTES = 1 << 21
_NEWLINE = ord("\n")
_IS_SPACE = np.zeros(256, dtype=bool)
_IS_SPACE[list(b" \t\n\r\v\f")] = True
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class RecordError(ValueError):
    """A row that cannot be used; the message begins with its file and line.

    Args:
        where: Position of the row, such as `train.jsonl:12`.
        problem: What is wrong and how to put it right. A DataLoader, which knows nothing of two arguments, leaves it
            out when it raises the error of a worker again.
    """

    def __init__(self, where: str, problem: str = "") -> None:
        super().__init__(where, problem)
        self.where = where
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}" if self.problem else self.where


class AnnotationFile(Sequence[Any]):
    """Decoded rows of a `.jsonl` file (one json value per line) or of a `.json` file (one list).

    A jsonl file costs 8 bytes per line and is read line by line, so it may be larger than memory; a json list is kept
    as encoded bytes, which worker processes share. Pickling closes the file, and it is opened again when next read.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: from the constructor.
        RecordError: from the constructor, for another suffix, a UTF-16 file, or a json file that is no list; from
            indexing, for a line that is not json, or a file that has changed since it was opened.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._handle: FileIO | None = None
        self._memory: bytes | None = None  # the rows of a json list
        self._lines: np.ndarray | None = None  # places among all lines of those that are not blank; None: all
        self._fingerprint: str | None = None
        self._state = self._stat()
        suffix = self.path.suffix.lower()
        if suffix == ".json":
            self._memory, self._offsets = _encode_list(self.path)
        elif suffix == ".jsonl":
            with self.path.open("rb", buffering=0) as file:
                self._offsets, self._lines = index_lines(file, str(self.path))
        else:
            raise RecordError(
                str(self.path),
                f"the suffix is {suffix!r}; use an uncompressed {' or '.join(SUFFIXES)} file",
            )

    def __len__(self) -> int:
        return len(self._offsets) - 1 if self._lines is None else len(self._lines)

    def __getitem__(self, row: int) -> Any:  # type: ignore[override]  # no slices
        text = self.read(row)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            hint = "" if self.line(row) != 1 or text.strip()[:1] != b"[" else "; a file with one list ends with .json"
            raise RecordError(self.where(row), f"not valid json: {error}{hint}") from error

    def read(self, row: int) -> bytes:
        """The undecoded row, with its line end."""
        line = self.line(row) - 1
        start, end = int(self._offsets[line]), int(self._offsets[line + 1])
        return self._pread(start, end - start) if self._memory is None else self._memory[start:end]

    def line(self, row: int) -> int:
        """Number of the row's line as an editor counts, from 1; in a json list, the row's place from 1.

        Raises:
            IndexError: no such row.
        """
        place = operator.index(row) + (len(self) if row < 0 else 0)
        if not 0 <= place < len(self):
            raise IndexError(f"{self.path}: row {row} of {len(self)}")
        return 1 + (place if self._lines is None else int(self._lines[place]))

    def where(self, row: int) -> str:
        """Position of a row for messages to people: `file.jsonl:12` or `file.json[11]`."""
        line = self.line(row)
        return f"{self.path}:{line}" if self._memory is None else f"{self.path}[{line - 1}]"

    def fingerprint(self) -> str:
        """Hash of the file's content, 32 hexadecimal digits (BLAKE2b): the key under which results may be cached."""
        if self._fingerprint is None:
            with self._open() as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def close(self) -> None:
        """Closes the file; reading opens it again."""
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def _stat(self) -> tuple[int, int]:
        status = self.path.stat()
        return status.st_size, status.st_mtime_ns

    def _open(self) -> FileIO:
        if self._stat() != self._state:
            raise RecordError(str(self.path), "the file has changed since it was opened; start again")
        return self.path.open("rb", buffering=0)

    def _pread(self, start: int, count: int) -> bytes:
        """Bytes of the file; `os.pread` has no position that forked processes or threads could fight over."""
        if not hasattr(os, "pread"):  # Windows
            with self._open() as file:
                file.seek(start)
                return file.read(count)
        if self._handle is None:
            self._handle = self._open()
        return os.pread(self._handle.fileno(), count, start)


def index_lines(
    file: FileIO | BytesIO, name: str = "file", chunk_bytes: int = _CHUNK_BYTES
) -> tuple[np.ndarray, np.ndarray | None]:
    """Where the lines of a file lie.

    Args:
        file: Opened for reading bytes, not buffered, at its start.
        name: For errors.
        chunk_bytes: Bytes searched at a time.

    Returns:
        Offsets of all lines and of the end of the last one, int64 (lines + 1,); and the places of the lines that are
        not blank, int64, or None if none is blank.

    Raises:
        RecordError: the file is UTF-16.
    """
    position = _skip_mark(file, name)
    storage = bytearray(chunk_bytes)
    buffer = np.frombuffer(storage, dtype=np.uint8)
    offsets, filled, unfinished = [np.array([position])], [], False
    while count := file.readinto(storage):
        chunk = buffer[:count]
        newlines = np.flatnonzero(chunk == _NEWLINE)
        has_text = _has_text(chunk, newlines)
        has_text[0] |= unfinished  # the first line may have begun in an earlier chunk
        offsets.append(newlines + (position + 1))
        filled.append(has_text[:-1])
        unfinished = bool(has_text[-1])
        position += count
    ends = np.concatenate(offsets).astype(np.int64, copy=False)
    if ends[-1] != position:  # no newline at the end
        ends, filled = np.append(ends, position), [*filled, np.array([unfinished])]
    kept = np.concatenate([np.zeros(0, dtype=bool), *filled])
    return ends, None if kept.all() else np.flatnonzero(kept)


def _skip_mark(file: FileIO | BytesIO, name: str) -> int:
    """Moves behind a UTF-8 byte order mark; returns the position."""
    mark = file.read(len(_UTF8_MARK))
    if mark.startswith(_UTF16_MARKS):
        raise RecordError(name, "the file is UTF-16; save it as UTF-8")
    return file.seek(len(_UTF8_MARK) if mark == _UTF8_MARK else 0)


def _has_text(chunk: np.ndarray, newlines: np.ndarray) -> np.ndarray:
    """Whether the lines of a chunk, the part behind the last newline included, hold more than white space."""
    starts = np.concatenate([[0], newlines + 1])
    lines = np.flatnonzero(starts < np.append(newlines, len(chunk)))  # not empty
    has_text = np.zeros(len(starts), dtype=bool)
    has_text[lines] = ~_IS_SPACE[chunk[starts[lines]]]
    if not has_text[lines].all():  # some begin with white space, so all bytes must be looked at
        has_text[lines] = np.logical_or.reduceat(~_IS_SPACE[chunk], starts[lines])
    return has_text


def _encode_list(path: Path) -> tuple[bytes, np.ndarray]:
    """The rows of a json list one after the other, and their offsets (rows + 1,)."""
    text = path.read_bytes()
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "; a file with one object per line ends with .jsonl" if "Extra data" in str(error) else ""
        raise RecordError(str(path), f"not valid json: {error}{hint}") from error
    if not isinstance(rows, list):
        raise RecordError(str(path), f"a .json file must hold a list of rows, got {type(rows).__name__}")
    encoded = [json.dumps(row).encode() for row in rows]
    return b"".join(encoded), np.cumsum([0, *map(len, encoded)], dtype=np.int64)

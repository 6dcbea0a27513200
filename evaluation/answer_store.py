"""Answers on disk as they come, so that a long collection survives an interruption and can be shared out.

One append-only jsonl per shard. Its first line holds the settings; every other line is the entry of one request:
`{"key", "answers": [{"text", "complete"}, ...]}` or `{"key", "error"}`. What the settings and entries mean is left to
others; which requests are asked is `collecting`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

_VERSION = 1
_NAME = re.compile(r"answers-(\d{5})-of-(\d{5})\.jsonl")

Entry = dict[str, Any]


class AnswerStore:
    """The answers of one shard of a collection, and, to read, those of all shards in the folder.

    Opening writes nothing but the folder; the shard's file comes with its first entries. A line that an interruption
    cut is dropped. One process at a time may write to a shard.

    Args:
        folder: Is made if need be.
        settings: All that the answers depend on, as json values (see `collecting.collection_settings`).
        shard: Number of this shard, from 0.
        shards: How many there are.

    Raises:
        ValueError: the folder holds answers that were made with other settings or another number of shards (the
            message says what differs), or a damaged file; or `shard` is out of range.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], shard: int = 0, shards: int = 1) -> None:
        if not 0 <= shard < shards:
            raise ValueError(f"shard={shard} of shards={shards}; shards are numbered from 0, as in 0/4 to 3/4")
        self.folder, self.shard, self.shards = Path(folder), shard, shards
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"answers-{shard:05d}-of-{shards:05d}.jsonl"
        for path in shard_files(self.folder):
            _check_header(path, self.settings, shards)
        self._failed: dict[str, bool] = {}
        for entry in _read_entries(self.path):
            self._failed[entry["key"]] = "error" in entry
        self._started = False

    def keys(self) -> set[str]:
        """Requests of this shard that are done, failures included."""
        return set(self._failed)

    def failed_keys(self) -> set[str]:
        """Requests of this shard whose last entry is an error."""
        return {key for key, failed in self._failed.items() if failed}

    def append(self, entries: Sequence[Entry]) -> None:
        """Writes entries to this shard's file at once; a later entry of a key replaces an earlier one.

        No entries begin the file all the same, which tells that the shard has been at work.

        Raises:
            ValueError: an entry has no key, or not either answers or an error.
        """
        for entry in entries:
            if not isinstance(entry.get("key"), str) or ("answers" in entry) == ("error" in entry):
                raise ValueError(f"an entry needs a 'key' and either 'answers' or 'error', got {entry!r:.100}")
        self._start()
        with self.path.open("ab") as file:
            file.write(b"".join(map(_line, entries)))
            file.flush()
        for entry in entries:
            self._failed[entry["key"]] = "error" in entry

    def entries(self) -> list[Entry]:
        """The last entry of every request, of all shards in the folder, shard by shard."""
        return read_entries(self.folder)

    def _start(self) -> None:
        """Makes the file with its first line, or cuts off a line that was not finished."""
        if self._started:
            return
        whole = _whole_bytes(self.path)
        if whole:
            with self.path.open("r+b") as file:
                file.truncate(whole)
        else:
            header = {"version": _VERSION, "shard": self.shard, "shards": self.shards, "settings": self.settings}
            self.path.write_bytes(_line(header))
        self._started = True


def shard_files(folder: str | Path) -> list[Path]:
    """The files of a store, in order of the shards."""
    return sorted(path for path in Path(folder).glob("answers-*.jsonl") if _NAME.fullmatch(path.name))


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The settings that the answers in a folder were made with.

    Raises:
        FileNotFoundError: the folder holds no answers.
        ValueError: its files differ in their settings, or one is damaged.
    """
    headers = [(path, header) for path in shard_files(folder) if (header := _header(path)) is not None]
    if not headers:
        raise FileNotFoundError(f"{folder} holds no answers-*.jsonl")
    settings = headers[0][1]["settings"]
    for path, _ in headers[1:]:
        _check_header(path, settings, headers[0][1]["shards"])
    return settings


def missing_shards(folder: str | Path) -> list[int]:
    """Numbers of the shards that have no file in the folder yet."""
    names = [_NAME.fullmatch(path.name) for path in shard_files(folder)]
    found = {int(name[1]) for name in names if name}
    return [shard for shard in range(max((int(name[2]) for name in names if name), default=0)) if shard not in found]


def read_entries(folder: str | Path) -> list[Entry]:
    """The last entry of every request of a store, shard by shard; unfinished last lines are left out."""
    found: dict[str, Entry] = {}
    for path in shard_files(folder):
        found.update((entry["key"], entry) for entry in _read_entries(path))
    return list(found.values())


def entries_in(file: BinaryIO) -> Iterator[tuple[int, Entry]]:
    """The entries of a store's file with the places where their lines begin, in bytes.

    A last line that was not finished is left out.

    Raises:
        ValueError: a finished line is not an entry.
    """
    start = len(file.readline())  # the settings
    for number, line in enumerate(file, 2):
        if not line.endswith(b"\n"):
            return
        entry = _decode(line, f"{file.name}:{number}")
        if not isinstance(entry.get("key"), str):
            raise ValueError(f"{file.name}:{number}: the entry has no key; the file is damaged")
        yield start, entry
        start += len(line)


def entry_at(file: BinaryIO, start: int) -> Entry:
    """The entry whose line begins at a place that `entries_in` gave."""
    file.seek(start)
    return _decode(file.readline(), f"{file.name}, byte {start}")


def differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """What differs between two json values, such as `sampling.seed: 0 there, 1 now`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name}: {old!r:.80} there, {new!r:.80} now"


# --- files -----------------------------------------------------------------------------------------------------------


def _line(value: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which a server may send, has no UTF-8; escaped it is valid json
        return json.dumps(value).encode() + b"\n"


def _whole_bytes(path: Path) -> int:
    """Length of the part of a file that consists of finished lines."""
    if not path.is_file():
        return 0
    return path.read_bytes().rfind(b"\n") + 1


def _header(path: Path) -> dict[str, Any] | None:
    """The first line of a file; None if it was not finished."""
    with path.open("rb") as file:
        line = file.readline()
    if not line.endswith(b"\n"):
        return None
    header = _decode(line, f"{path}:1")
    if header.get("version") != _VERSION or not isinstance(header.get("settings"), dict):
        raise ValueError(f"{path}:1: not the first line of an answer store; choose another folder")
    return header


def _check_header(path: Path, settings: Mapping[str, Any], shards: int) -> None:
    header = _header(path)
    if header is None:
        return
    here = {"shards": header["shards"], **header["settings"]}
    if unlike := list(differences(here, {"shards": shards, **settings})):
        raise ValueError(
            f"{path} was made with other settings ({'; '.join(unlike)}); choose another output folder, or remove this "
            "one to start anew"
        )


def _read_entries(path: Path) -> Iterator[Entry]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        yield from (entry for _, entry in entries_in(file))


def _decode(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid json, so the file is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not a json object, so the file is damaged")
    return value

"""Answers of an answer store by the key of their question, read from disk when they are asked for.

Thirty-two long answers to each of a million questions do not fit into memory; their places do. Nothing is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..evaluation.answer_store import shard_files
from ..evaluation.engines import Answer, Failure


class StoredAnswers:
    """The last entry of every request in a store's folder, of all shards; closes its files when it is left.

    Args:
        folder: Of an `AnswerStore`; a missing one holds no answers.

    Raises:
        ValueError: a finished line is not an entry.
    """

    def __init__(self, folder: str | Path) -> None:
        self._files = [path.open("rb") for path in shard_files(folder)]
        self._places: dict[str, tuple[int, int]] = {}
        for number, file in enumerate(self._files):
            start = len(file.readline())  # the settings
            for line in file:
                if line.endswith(b"\n"):  # else an interruption cut it
                    self._places[_decode(line, file.name)["key"]] = (number, start)
                start += len(line)

    def __enter__(self) -> StoredAnswers:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> list[Answer] | Failure:
        """The answers of a request, in the order in which they were drawn, or why there are none."""
        number, start = self._places[key]
        file = self._files[number]
        file.seek(start)
        entry = _decode(file.readline(), file.name)
        if "error" in entry:
            return Failure(entry["error"])
        return [Answer(answer["text"], answer["complete"]) for answer in entry["answers"]]


def _decode(line: bytes, name: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{name}: a line is not valid json, so the file is damaged: {error}") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
        raise ValueError(f"{name}: an entry without a key, so the file is damaged: {line[:60]!r}")
    return entry

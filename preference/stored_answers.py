"""Answers of an answer store by the key of their question, read from disk when they are asked for.

Thirty-two long answers to each of a million questions do not fit into memory; their places do. Nothing is written.
"""

from __future__ import annotations

from pathlib import Path

from ..evaluation.answer_store import entries_in, entry_at, shard_files
from ..evaluation.collecting import result_of
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
            self._places.update((entry["key"], (number, start)) for start, entry in entries_in(file))

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
        return result_of(entry_at(self._files[number], start))

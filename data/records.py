"""One row of an InternVL data file as a typed, validated record.

A row is a conversation with the pictures it talks about (jsonl, one object per line, or one json list). Everything
that can be known without opening a picture is checked here, and every error names the file and the line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from ..conversation import IMAGE_PLACEHOLDER

Speaker = Literal["system", "human", "gpt"]
SPEAKERS: tuple[str, ...] = get_args(Speaker)


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


@dataclass(frozen=True)
class Message:
    """One turn; in human turns `<image>` stands for a picture, everywhere else it is text."""

    speaker: Speaker
    text: str


@dataclass(frozen=True)
class Record:
    """A conversation and its pictures.

    Attributes:
        messages: Human and gpt in turn, ending with gpt; a system turn may come first.
        images: Paths or pictures in memory, one per `<image>` of the human turns.
        where: Position in its source, for messages to people.
    """

    messages: tuple[Message, ...]
    images: tuple[str | Path | Image.Image, ...] = ()
    where: str = "record"

    @property
    def placeholders(self) -> int:
        """Number of `<image>` in the human turns."""
        return sum(m.text.count(IMAGE_PLACEHOLDER) for m in self.messages if m.speaker == "human")


def parse_record(row: Any, where: str = "record", root: str | Path = "") -> Record:
    """Validates one row in the format of the original's meta files (`{"image": ..., "conversations": [...]}`).

    A single picture without a placeholder gets `<image>\\n` before the first human turn, as in the original
    (`train/dataset.py`). With several pictures their order would be a guess, so the placeholders must be there.

    Args:
        row: The decoded json object.
        where: Its position, for errors.
        root: Folder that picture paths are relative to.

    Raises:
        RecordError: the row is malformed, or pictures and placeholders differ in number.
    """
    if not isinstance(row, dict):
        raise RecordError(where, f"a row must be a json object, got {type(row).__name__}")
    if row.get("video"):
        raise RecordError(where, "the row has a video, which this reader does not support; use its frames as images")
    record = Record(_messages(row, where), _images(row, where, root), where)
    if len(record.images) == 1 and record.placeholders == 0:
        record = _with_leading_placeholder(record)
    if record.placeholders != len(record.images):
        raise RecordError(
            where,
            f"the human turns have {record.placeholders} {IMAGE_PLACEHOLDER} for {len(record.images)} image(s); "
            "write one per image, in order",
        )
    return record


def _with_leading_placeholder(record: Record) -> Record:
    first = next(i for i, message in enumerate(record.messages) if message.speaker == "human")
    message = Message("human", f"{IMAGE_PLACEHOLDER}\n{record.messages[first].text}")
    return replace(record, messages=(*record.messages[:first], message, *record.messages[first + 1 :]))


def _messages(row: dict[str, Any], where: str) -> tuple[Message, ...]:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RecordError(where, f"'conversations' must be a non-empty list, got {turns!r:.60}")
    messages = tuple(_message(turn, f"turn {i + 1}", where) for i, turn in enumerate(turns))
    spoken = [message.speaker for message in messages]
    spoken = spoken[1:] if spoken[0] == "system" else spoken
    if not spoken or len(spoken) % 2 or spoken != ["human", "gpt"] * (len(spoken) // 2):
        raise RecordError(
            where, f"turns must be human and gpt in turn and end with gpt (system only first), got {', '.join(spoken)}"
        )
    return messages


def _message(turn: Any, name: str, where: str) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise RecordError(where, f"{name} must be an object with 'from' and a text 'value', got {turn!r:.60}")
    if turn.get("from") not in SPEAKERS:
        raise RecordError(where, f"{name} is from {turn.get('from')!r}; expected one of {', '.join(SPEAKERS)}")
    return Message(turn["from"], turn["value"])


def _images(row: dict[str, Any], where: str, root: str | Path) -> tuple[Path, ...]:
    value = row.get("image") or []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise RecordError(where, f"'image' must be a path or a list of paths, got {value!r:.60}")
    return tuple(Path(root, name) for name in names)


class RecordFile(Sequence[Record]):
    """Records of a `.jsonl` file (one object per line, blank lines ignored) or of a `.json` file (one list).

    A jsonl file is indexed once and read line by line, so it may be larger than memory; its errors therefore come when
    a row is asked for.

    Args:
        path: The file.
        root: Folder that picture paths are relative to.

    Raises:
        RecordError: from indexing, on a bad row; from the constructor, for a json file that is no list.
    """

    def __init__(self, path: str | Path, root: str | Path = "") -> None:
        self.path = Path(path)
        self.root = root
        self._rows: list[Any] | None = None
        self._lines: list[tuple[int, int]] = []  # number of each line that is not blank, and its offset in bytes
        if self.path.suffix == ".json":
            self._rows = self._load_list()
        else:
            self._lines = list(self._index())

    def _load_list(self) -> list[Any]:
        rows = _decode(self.path.read_bytes(), str(self.path))
        if not isinstance(rows, list):
            raise RecordError(str(self.path), f"a .json file must hold a list of rows, got {type(rows).__name__}")
        return rows

    def _index(self) -> Iterator[tuple[int, int]]:
        offset = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, offset
                offset += len(line)

    def __len__(self) -> int:
        return len(self._lines) if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]  # no slices
        if self._rows is not None:
            return parse_record(self._rows[index], f"{self.path}[{index % len(self)}]", self.root)
        number, offset = self._lines[index]
        where = f"{self.path}:{number}"
        with self.path.open("rb") as file:
            file.seek(offset)
            return parse_record(_decode(file.readline(), where), where, self.root)


def _decode(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RecordError(where, f"not valid json: {error}") from error

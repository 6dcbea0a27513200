"""Questions with their gold answers, read from a jsonl or json file.

Two kinds of rows: those with a `question` field, as benchmarks are written (answers, options and boxes beside it), and
conversations in any format that `data.formats` knows, whose questions and answers are turns. Nothing is opened but the
file itself, and nothing is asked: prompts are made by whoever asks.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from ..conversation import IMAGE_PLACEHOLDER, ImageSlot
from ..data.annotations import AnnotationFile, RecordError
from ..data.records import VIDEO_PLACEHOLDER, Message, Record, Video, VideoSlot, parse_record

_ANSWERS, _OPTIONS, _IDS = ("answer_gt", "answers", "answer"), ("options", "choices"), ("id", "question_id")
_MEDIA = ("image", "images", "video", "videos", "clip")
_TURNS = (
    "conversations",
    "messages",
    "conversation",
    "query",
    "response",
    "history",
    "instruction",
    "input",
    "output",
)
_OWN = {"question", "bbox", "task", "category", *_ANSWERS, *_OPTIONS, *_IDS, *_MEDIA, *_TURNS}
BOX_SCALE = 1000


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        key: Unique among the questions of a file.
        text: The words, with one `<image>` or `<video>` per medium.
        images: Paths, URLs or pictures in memory, one per `<image>`.
        videos: One per `<video>`.
        answers: Gold answers; none if the row has none.
        options: Texts of a multiple choice, in order.
        task: How answers are judged (`verifiers.VERIFIERS`), where the row says so.
        category: For scores by category.
        where: File and line, for messages to people.
        fields: All other fields of the row; `system`, if the row has a system text.
    """

    key: str
    text: str
    images: tuple[str | Path | Image.Image, ...] = ()
    videos: tuple[Video, ...] = ()
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    task: str | None = None
    category: str | None = None
    where: str = "question"
    fields: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def read_questions(path: str | Path, root: str | Path = "", all_turns: bool = False) -> list[Question]:
    """The questions of a file.

    A row with `question` may have: `image(s)`, `video(s)`, `clip` as in training data; gold answers under `answer_gt`,
    `answers` or `answer` (the first of these that is there; texts, numbers or objects with an `answer`; a whole number
    that is no option counts the options from 0); `options` or `choices`, a list or an object, or the fields `A`, `B`
    ...; `bbox` [x1, y1, x2, y2], in pixels if the row has `width` and `height`, else from 0 to 1000; `task`,
    `category`, `id` or `question_id`. Any other row is a conversation.

    The key of a question is the row's id if no other row has it, else the file's stem and the row's line; with
    `all_turns`, `#1`, `#2` ... follow for the turns.

    Args:
        path: `.jsonl` or `.json`, see `AnnotationFile`.
        root: Folder (or URL) that paths of pictures and videos are relative to.
        all_turns: Make a question of every turn of a conversation, not only of the first. Each stands on its own: it
            gets the media of earlier turns in front of its text, but not their words.

    Raises:
        RecordError: a row is malformed; the message begins with its file and line. Also for a file that has no rows.
    """
    file = AnnotationFile(path)
    rows: list[tuple[str, str, list[Question]]] = []
    for place in range(len(file)):
        where = file.where(place)
        value = file[place]
        questions = list(parse_questions(value, where, root, all_turns))
        rows.append((_id_of(value, where), f"{file.path.stem}:{file.line(place)}", questions))
    if not rows:
        raise RecordError(str(path), "the file has no rows")
    return _with_keys(rows, all_turns)


def parse_questions(
    value: Any, where: str = "question", root: str | Path = "", all_turns: bool = False
) -> Iterator[Question]:
    """The questions of one decoded row, all with the key `where`; arguments and errors as in `read_questions`."""
    if not isinstance(value, dict):
        raise RecordError(where, f"a row must be a json object, got {type(value).__name__}")
    row = {key: item for key, item in value.items() if item is not None}
    options = _options(row, where)
    known: dict[str, Any] = {
        "options": options,
        "task": _text_field(row, "task", where),
        "category": _text_field(row, "category", where),
        "where": where,
    }
    fields = {key: item for key, item in row.items() if key not in _OWN}
    gold = _gold(row, options, where)
    if "question" in row:
        record = _record_of_question(row, where, root)
    else:
        record = parse_record(_turns_only(row), where, root)
    system = _system(record)
    more = MappingProxyType(fields if system is None else {**fields, "system": system})
    for question, answer, images, videos in _turns(record, all_turns):
        answers = gold or ((answer,) if answer else ())
        yield Question(where, question, images, videos, answers, fields=more, **known)
        gold = ()  # what stands beside the turns belongs to the first


# --- one row ---------------------------------------------------------------------------------------------------------


def _record_of_question(row: dict[str, Any], where: str, root: str | Path) -> Record:
    """A `question` row as a conversation, so that media are read by the rules of training data."""
    if not isinstance(row["question"], str):
        raise RecordError(where, f"'question' must be text, got {row['question']!r:.60}")
    turns = [{"from": "human", "value": row["question"]}, {"from": "gpt", "value": ""}]
    system = {"system": row["system"]} if "system" in row else {}
    return parse_record({**{k: row[k] for k in _MEDIA if k in row}, **system, "conversations": turns}, where, root)


def _turns_only(row: dict[str, Any]) -> dict[str, Any]:
    """A conversation row; one without an answer at its end gets an empty one, which is no gold answer."""
    for key, speaker, text in (("conversations", "from", "value"), ("messages", "role", "content")):
        turns = row.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            if turns[-1].get("from", turns[-1].get("role")) in ("human", "user"):
                return {**row, key: [*turns, {speaker: "assistant", text: ""}]}
    return row


def _turns(record: Record, all_turns: bool) -> Iterator[tuple[str, str, tuple, tuple]]:
    """Question, answer, images and videos of the turns of a record."""
    talk = [message for message in record.messages if message.speaker != "system"]
    if talk[0].speaker == "pretrain":
        raise RecordError(record.where, "the row is running text and has no question; leave it out")
    lead, images, videos = "", 0, 0
    for asked, answered in zip(talk[::2], talk[1::2], strict=True):
        marks = _marks(asked, record.where)
        images, videos = images + marks.count(IMAGE_PLACEHOLDER), videos + marks.count(VIDEO_PLACEHOLDER)
        yield lead + asked.text, answered.text, record.images[:images], record.videos[:videos]
        if not all_turns:
            return
        lead += "".join(f"{mark}\n" for mark in marks)


def _marks(message: Message, where: str) -> list[str]:
    """The placeholders of a turn in order, all of which must stand for media."""
    names = {ImageSlot: IMAGE_PLACEHOLDER, VideoSlot: VIDEO_PLACEHOLDER}
    marks = [names[type(part)] for part in message.parts if not isinstance(part, str)]
    written = message.text.count(IMAGE_PLACEHOLDER) + message.text.count(VIDEO_PLACEHOLDER)
    if written != len(marks):
        raise RecordError(where, "an <image> or <video> of the question is only text; a model cannot be asked so")
    return marks


def _system(record: Record) -> str | None:
    first = record.messages[0]
    return first.text if first.speaker == "system" else None


def _gold(row: dict[str, Any], options: Sequence[str], where: str) -> tuple[str, ...]:
    name = next((name for name in _ANSWERS if name in row), None)
    if name is None:
        return (_box(row, where),) if "bbox" in row else ()
    values = row[name] if isinstance(row[name], list) else [row[name]]
    return tuple(_answer(value, options, f"{name!r}", where) for value in values)


def _answer(value: Any, options: Sequence[str], name: str, where: str) -> str:
    if isinstance(value, dict):
        value = value.get("answer")
    if type(value) is int and options and str(value) not in options:
        if not 0 <= value < min(len(options), 26):
            raise RecordError(where, f"{name} is {value}, but there are {len(options)} options, counted from 0")
        return string.ascii_uppercase[value]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise RecordError(where, f"{name} must be a text, a number or a list of these, got {value!r:.60}")
    return str(value)


def _options(row: dict[str, Any], where: str) -> tuple[str, ...]:
    name = next((name for name in _OPTIONS if name in row), None)
    if name is None:
        letters = [row[letter] for letter in _consecutive_letters(row)]
        return tuple(map(str, letters)) if len(letters) > 1 else ()
    values = list(row[name].values()) if isinstance(row[name], dict) else row[name]
    if not isinstance(values, list) or not all(_is_plain(value) for value in values):
        raise RecordError(where, f"{name!r} must be a list of texts or an object of letters, got {row[name]!r:.60}")
    return tuple(map(str, values))


def _consecutive_letters(row: dict[str, Any]) -> Iterator[str]:
    """`A`, `B` ... as far as the row has them as fields."""
    for letter in string.ascii_uppercase:
        if not _is_plain(row.get(letter)):
            return
        yield letter


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _box(row: dict[str, Any], where: str) -> str:
    """The gold box as the models write boxes, `[[x1, y1, x2, y2]]` from 0 to 1000.

    Intersection over union does not change when an axis is scaled, so that nothing is lost but the rounding to a
    hundredth.
    """
    box: Any = row["bbox"]
    size: tuple[Any, Any] = (row.get("width"), row.get("height"))
    if not isinstance(box, list) or len(box) != 4 or not all(_is_plain(v) and not isinstance(v, str) for v in box):
        raise RecordError(where, f"'bbox' must be [x1, y1, x2, y2], got {box!r:.60}")
    if size != (None, None):
        if not all(type(side) in (int, float) and side > 0 for side in size):
            raise RecordError(where, f"'width' and 'height' must be positive numbers, got {size}")
        box = [value * BOX_SCALE / size[axis % 2] for axis, value in enumerate(box)]
    if not (box[0] < box[2] and box[1] < box[3]):
        raise RecordError(where, f"'bbox' must have x1 < x2 and y1 < y2 (corners, not width and height), got {box}")
    return f"[[{', '.join(f'{value:.2f}'.rstrip('0').rstrip('.') for value in box)}]]"


def _text_field(row: dict[str, Any], name: str, where: str) -> str | None:
    value = row.get(name)
    if value is not None and not _is_plain(value):
        raise RecordError(where, f"{name!r} must be a text, got {value!r:.60}")
    return None if value is None else str(value)


# --- keys ------------------------------------------------------------------------------------------------------------


def _id_of(value: dict[str, Any], where: str) -> str:
    """The row's id as text, "" for none."""
    given = next((value[name] for name in _IDS if value.get(name) is not None), "")
    if not _is_plain(given):
        raise RecordError(where, f"'id' must be a text or a number, got {given!r:.60}")
    return str(given)


def _with_keys(rows: Sequence[tuple[str, str, list[Question]]], all_turns: bool) -> list[Question]:
    counts = Counter(own for own, _, _ in rows)
    chosen = [own if own and counts[own] == 1 else place for own, place, _ in rows]
    for names in (
        chosen,
        [place for _, place, _ in rows],
    ):  # an id that looks like another row's place: places for all
        keyed = [
            replace(question, key=f"{name}#{turn}" if all_turns else name)
            for name, (_, _, questions) in zip(names, rows, strict=True)
            for turn, question in enumerate(questions, 1)
        ]
        if len({question.key for question in keyed}) == len(keyed):
            break
    return keyed

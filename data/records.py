"""One row of a data file as a typed, validated record.

A row is a conversation with the pictures and videos it talks about, in any format that `formats` knows. Everything
that can be known without opening a picture or a video is checked here, and every error names the file and the line.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ..conversation import IMAGE_PLACEHOLDER, ImageSlot
from .annotations import AnnotationFile, RecordError
from .formats import SPEAKERS, VIDEO_PLACEHOLDER, to_row

__all__ = [
    "IMAGE_PLACEHOLDER", "SPEAKERS", "VIDEO_PLACEHOLDER", "FrameSampling", "Message", "PlaceholderError", "Record",
    "RecordError", "RecordFile", "RowParser", "Video", "VideoSlot", "check_placeholders", "parse_record",
]  # fmt: skip

RowParser = Callable[[Any, str, "str | Path"], Any]
"""A function like `parse_record`: decoded row, its position, root of its media -> record."""

Speaker = Literal["system", "human", "gpt", "pretrain"]
_PLACEHOLDER = re.compile(f"{re.escape(IMAGE_PLACEHOLDER)}|{re.escape(VIDEO_PLACEHOLDER)}")
_WITH_MEDIA = ("human", "pretrain")


class PlaceholderError(RecordError):
    """A row whose placeholders differ in number from its media."""


@dataclass(frozen=True)
class VideoSlot:
    """Stands for one video inside a turn, as `ImageSlot` does for a picture."""


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        speaker: Who speaks; `"pretrain"` is running text, all of which is learned.
        text: The words; in human and pretrain turns `<image>` and `<video>` stand for media, elsewhere they are text.
        slots: Offsets in `text` of the placeholders that stand for media, ascending; None: all of them.
    """

    speaker: Speaker
    text: str
    slots: tuple[int, ...] | None = None

    @property
    def parts(self) -> tuple[str | ImageSlot | VideoSlot, ...]:
        """The turn as plain texts and slots in order; empty texts are left out."""
        parts: list[str | ImageSlot | VideoSlot] = []
        start = 0
        for match in _PLACEHOLDER.finditer(self.text) if self.speaker in _WITH_MEDIA else ():
            if self.slots is None or match.start() in self.slots:
                slot = ImageSlot() if match[0] == IMAGE_PLACEHOLDER else VideoSlot()
                parts += [self.text[start : match.start()], slot]
                start = match.end()
        return tuple(part for part in (*parts, self.text[start:]) if part != "")


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video a row asks for; None leaves a value to the settings of the run.

    Attributes:
        fps: Frames to take of a second; of a folder or list of frames, which has no clock, the rate it was taken at.
        num_frames: Exactly so many frames.
        min_frames, max_frames: Limits of their number.
        indices: These frames and no others, counted from 0.
    """

    fps: float | None = None
    num_frames: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    indices: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Video:
    """A video of a row.

    Attributes:
        path: File, folder of frames or URL; or the pictures that are its frames, in order.
        clip: Start and end in seconds; the end may be infinite. None for the whole video.
        frames: How the row itself wants frames to be chosen.
    """

    path: str | Path | tuple[str | Path, ...]
    clip: tuple[float, float] | None = None
    frames: FrameSampling | None = None


@dataclass(frozen=True)
class Record:
    """A conversation, its pictures and its videos.

    Attributes:
        messages: Human and gpt in turn, ending with gpt; a system turn may come first. Or one pretrain turn.
        images: Paths, URLs or pictures in memory, one per `<image>` that stands for one.
        where: Position in its source, for messages to people.
        videos: One per `<video>` that stands for one.
    """

    messages: tuple[Message, ...]
    images: tuple[str | Path | Image.Image, ...] = ()
    where: str = "record"
    videos: tuple[Video, ...] = ()

    @property
    def placeholders(self) -> int:
        """Number of `<image>` that stand for pictures."""
        return sum(isinstance(part, ImageSlot) for message in self.messages for part in message.parts)

    @property
    def video_placeholders(self) -> int:
        """Number of `<video>` that stand for videos."""
        return sum(isinstance(part, VideoSlot) for message in self.messages for part in message.parts)


def parse_record(row: Any, where: str = "record", root: str | Path = "") -> Record:
    """Validates one row of any format that `formats.to_row` understands.

    A single picture or video without a placeholder gets `<image>\\n` or `<video>\\n` before the first human turn, as
    in the original (`train/dataset.py`). With several their order would be a guess, so the placeholders must be there.

    Args:
        row: The decoded json object.
        where: Its position, for errors.
        root: Folder (or URL) that paths are relative to.

    Raises:
        RecordError: the row is malformed. PlaceholderError: media and placeholders differ in number.
    """
    row = to_row(row, where)
    images = tuple(_locate(root, name) for name in row["image"])
    videos = tuple(_video(value, where, root) for value in row["video"])
    record = _with_missing_placeholder(Record(_messages(row["conversations"], where), images, where, videos))
    check_placeholders(record)
    return record


def check_placeholders(record: Record) -> None:
    """Raises `PlaceholderError` unless a record has as many placeholders as media, of either kind."""
    for marker, found, given, name in (
        (IMAGE_PLACEHOLDER, record.placeholders, len(record.images), "image"),
        (VIDEO_PLACEHOLDER, record.video_placeholders, len(record.videos), "video"),
    ):
        if found != given:
            advice = f"write one per {name}, in order"
            if found > given:
                advice += f'; a {marker} that is only text needs the turn as {{"text": ..., "slots": [...]}}'
            raise PlaceholderError(
                record.where, f"the human turns have {found} {marker} for {given} {name}(s); {advice}"
            )


def _with_missing_placeholder(record: Record) -> Record:
    missing = [IMAGE_PLACEHOLDER] if len(record.images) == 1 and not record.placeholders else []
    missing += [VIDEO_PLACEHOLDER] if len(record.videos) == 1 and not record.video_placeholders else []
    if len(missing) != 1:
        return record
    lead = f"{missing[0]}\n"
    place = next(i for i, message in enumerate(record.messages) if message.speaker in _WITH_MEDIA)
    old = record.messages[place]
    slots = None if old.slots is None else (0, *(slot + len(lead) for slot in old.slots))
    new = Message(old.speaker, lead + old.text, slots)
    return replace(record, messages=(*record.messages[:place], new, *record.messages[place + 1 :]))


def _messages(turns: list[dict[str, Any]], where: str) -> tuple[Message, ...]:
    messages = tuple(_message(turn["from"], turn["value"]) for turn in turns)
    spoken = [message.speaker for message in messages]
    talk = spoken[1:] if spoken[:1] == ["system"] else spoken
    if spoken != ["pretrain"] and (not talk or len(talk) % 2 or talk != ["human", "gpt"] * (len(talk) // 2)):
        raise RecordError(
            where,
            "turns must be human and gpt in turn and end with gpt (system only first), or be one pretrain turn; got "
            + (", ".join(spoken) or "none"),
        )
    return messages


def _message(speaker: Speaker, value: str | dict[str, Any]) -> Message:
    return (
        Message(speaker, value) if isinstance(value, str) else Message(speaker, value["text"], tuple(value["slots"]))
    )


def _locate(root: str | Path, name: str) -> str | Path:
    """A path below the root; URLs and data URLs stay as they are."""
    if name.startswith("data:") or "://" in name:
        return name
    return f"{str(root).rstrip('/')}/{name}" if "://" in str(root) else Path(root, name)


def _video(value: dict[str, Any], where: str, root: str | Path) -> Video:
    path = value["path"]
    located = tuple(_locate(root, name) for name in path) if isinstance(path, list) else _locate(root, path)
    counts = {key: value[key] for key in ("num_frames", "min_frames", "max_frames") if key in value}
    indices = value.get("indices")
    if any(type(count) is not int or count < 1 for count in counts.values()):
        raise RecordError(where, f"numbers of frames must be positive integers, got {counts}")
    if indices is not None:
        if not isinstance(indices, list) or not indices or any(type(i) is not int or i < 0 for i in indices):
            raise RecordError(where, f"frame indices must be a list of integers from 0, got {indices!r:.60}")
    if "fps" in value and not (_is_number(value["fps"]) and 0 < value["fps"] < math.inf):
        raise RecordError(where, f"fps of a video must be a positive number, got {value['fps']!r}")
    sampling = FrameSampling(value.get("fps"), indices=None if indices is None else tuple(indices), **counts)
    clip = _clip(value["clip"], where) if "clip" in value else None
    return Video(located, clip, None if sampling == FrameSampling() else sampling)


def _clip(value: Any, where: str) -> tuple[float, float]:
    if isinstance(value, list) and len(value) == 2:
        start, end = value[0], math.inf if value[1] is None else value[1]
        if _is_number(start) and _is_number(end) and 0 <= start < end:
            return float(start), float(end)
    raise RecordError(where, f"'clip' must be [start, end] in seconds with 0 <= start < end, got {value!r:.60}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class RecordFile(Sequence[Any]):
    """Records of an annotation file, `.jsonl` or `.json`; a bad row is an error when it is asked for.

    Args:
        path: The file.
        root: Folder that paths of pictures and videos are relative to.
        parse: What makes a record of a row: `parse_record`, or `pairs.parse_pair` for preference rows.

    Raises:
        RecordError: from indexing, on a bad row; from the constructor, for a file that cannot be one (see
            `AnnotationFile`).
    """

    def __init__(self, path: str | Path, root: str | Path = "", parse: RowParser = parse_record) -> None:
        self.annotations = AnnotationFile(path)
        self.path = self.annotations.path
        self.root = root
        self.parse = parse

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]  # no slices
        return self.parse(self.annotations[index], self.annotations.where(index), self.root)

    def fingerprint(self) -> str:
        """Hash of the file's content, of where its media are and of how it is read, 32 hexadecimal digits."""
        root = str(self.root) if "://" in str(self.root) else str(Path(self.root).absolute())
        text = f"{self.annotations.fingerprint()} {root}"
        if self.parse is not parse_record:  # of others only the name is known
            text += f" {getattr(self.parse, '__qualname__', repr(self.parse))}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

"""Data sets of questions, and what each question becomes: a request to a model, and the beginning of a training row.

Both come from the same text, so that training sees the prompt that the answers were sampled with. Nothing is asked and
no picture is opened here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.records import Video
from ..data.sources import DataSource, DataSourceError, load_sources, read_meta
from ..evaluation.engines import Request
from ..evaluation.prompts import cot_prompt
from ..evaluation.questions import Question, read_questions
from ..training.arguments import DataArguments


@dataclass(frozen=True)
class QuestionSource:
    """A data set and its questions.

    Attributes:
        source: As its meta entry or path describes it.
        questions: In the order of the file.
    """

    source: DataSource
    questions: tuple[Question, ...]

    @property
    def name(self) -> str:
        """Of the data set, as a file name: what is no letter, digit, `.`, `-` or `_` becomes `_`."""
        return file_name(self.source.name)


def file_name(name: str) -> str:
    """The name of a data set without the characters that a file name may not have."""
    return "".join(character if character.isalnum() or character in "-_." else "_" for character in name).lstrip(".")


def read_sources(
    data: Sequence[str | Path], images: str | None = None, all_turns: bool = False, limit: int | None = None
) -> list[QuestionSource]:
    """The questions of annotation files (`.jsonl`, `.json` lists) and of the data sets of meta files.

    Data sets that a meta file switches off (`repeat_time` 0) are left out; every other question is taken once.

    Args:
        data: Paths of either kind.
        images: Folder of the annotation files' media.
        all_turns: Make a question of every turn of a conversation, not only of the first.
        limit: Take only so many questions of each data set, from its beginning.

    Raises:
        DataSourceError: a file cannot be read, there is no data, or two data sets have the same name.
        RecordError: a row is malformed.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    metas = [path for path in data if _is_meta(Path(path))]
    files = [str(path) for path in data if path not in metas]
    sources = load_sources(DataArguments(data_paths=files, image_folders=[images] * len(files)))
    sources += [source for path in metas for source in read_meta(path)]
    sources = [source for source in sources if source.repeat_time]
    if not sources:
        raise DataSourceError("(none)", "there is no data; name annotation files or meta files with a data set")
    _refuse_equal_names(sources)
    return [QuestionSource(source, _read(source, all_turns, limit)) for source in sources]


def _is_meta(path: Path) -> bool:
    """Whether a file is a `.json` with an object."""
    if path.suffix.lower() != ".json":
        return False
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except OSError as error:
        raise DataSourceError(str(path), f"cannot read it: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataSourceError(str(path), f"not valid json: {error}") from error


def _refuse_equal_names(sources: Sequence[DataSource]) -> None:
    seen: dict[str, str] = {}
    for source in sources:
        name = file_name(source.name).casefold()
        if not name:
            raise DataSourceError(source.name, "no file can have this name; use letters and digits")
        if name in seen:
            raise DataSourceError(source.name, f"its files would have the names of those of {seen[name]!r}; rename it")
        seen[name] = source.name


def _read(source: DataSource, all_turns: bool, limit: int | None) -> tuple[Question, ...]:
    try:
        return tuple(read_questions(source.annotation, source.root, all_turns)[:limit])
    except FileNotFoundError as error:
        raise DataSourceError(source.name, f"there is no annotation file {source.annotation!r}") from error


def make_request(question: Question, style: str, max_tiles: int | None = None) -> Request:
    """A question in the prompt of a style of `parse_response`.

    The system text of the row, if it has one, stands before that of the style.

    Args:
        question: With its media.
        style: `"final_answer"`, `"boxed"`, `"think"`, or `"direct"` for the question as it is.
        max_tiles: Most tiles of an image; None for what the checkpoint says.
    """
    prompt = cot_prompt(question.text, style)
    texts = [text for text in (question.fields.get("system"), prompt.system) if text]
    system = "\n".join(texts) if texts else None
    return Request(prompt.question, question.images, question.videos, system, max_tiles=max_tiles)


def training_row(question: Question, request: Request, root: str) -> dict[str, Any]:
    """Media, question, system text and gold answer of a row of preference data, without its answers.

    Args:
        question: What was read.
        request: What the model was asked.
        root: Folder of the data set's media, which paths are written relative to as they were read.
    """
    row: dict[str, Any] = {}
    if question.images:
        row["image"] = _one_or_all([_relative(image, root) for image in question.images])
    if question.videos:
        row["video"] = _one_or_all([_video_row(video, root) for video in question.videos])
    if request.system:
        row["system"] = request.system
    row["question"] = request.text
    if question.answers:
        row["answer_gt"] = _one_or_all(list(question.answers))
    return row


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def _relative(path: str | Path | Image.Image, root: str) -> str:
    """A path as it stood in its row."""
    if isinstance(path, Image.Image):
        raise TypeError("a picture in memory cannot be written into a row; save it and give its path")
    text, folder = str(path), root.rstrip("/")
    if "://" in text or text.startswith("data:"):
        return text.removeprefix(f"{folder}/") if "://" in folder else text
    return os.path.relpath(text, root) if root and Path(text).is_relative_to(root) else text


def _video_row(video: Video, root: str) -> Any:
    """A video as `data.formats` reads it: a path, or an object with its part and frames."""
    frames = isinstance(video.path, tuple)
    path = [_relative(frame, root) for frame in video.path] if frames else _relative(video.path, root)
    row: dict[str, Any] = {"path": path}
    if video.clip is not None:
        start, end = video.clip
        row["clip"] = [start, None if math.isinf(end) else end]
    if video.frames is not None:
        row |= {key: value for key, value in vars(video.frames).items() if value is not None}
    return path if len(row) == 1 and not frames else row

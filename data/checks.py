"""What can be wrong with a row: the list of checks, and those that need the text of a record alone.

A check yields problems and never raises; it changes nothing. Media are looked at by `media_checks`, lengths and
duplicates by `validate`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from ..conversation import IMAGE_PLACEHOLDER
from .formats import VIDEO_PLACEHOLDER
from .pairs import EmptyAnswerError, PairRecord
from .records import Message, PlaceholderError, Record, RecordError
from .repetition import NGRAM, THRESHOLD, repeated_ngrams, repeated_share

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Check:
    """A kind of problem.

    Attributes:
        severity: `"error"`: the row is left out in training, or is wrong beyond doubt. `"warning"`: it is trained on,
            which is probably not what was meant. `"note"`: worth knowing.
        meaning: One line for tables and documentation.
        is_left_out: Whether training leaves such a row out, counted against `max_skip_share`.
    """

    severity: Severity
    meaning: str
    is_left_out: bool = False


CHECKS: dict[str, Check] = {
    "row": Check("error", "cannot be read, is of no known format, or its turns are malformed", True),
    "placeholders": Check("error", "<image> and <video> differ in number from the media", True),
    "empty-pair-answer": Check("error", "a chosen or rejected answer holds no text", True),
    "missing-media": Check("error", "no such picture or video", True),
    "damaged-media": Check("error", "empty, truncated, or no picture or video", True),
    "huge-media": Check("error", "more pixels than a picture may have: a decompression bomb", True),
    "clip": Check("error", "a clip begins behind the end of its video, or the video has no times", True),
    "frames": Check("error", "frames are asked for that the video does not have", True),
    "encoding": Check("error", "the row cannot be encoded with the model's template and tokenizer", True),
    "too-long": Check("error", "more tokens or tiles than a row may have", True),
    "unsupervised": Check("error", "no token is learned"),
    "box": Check("error", "grounding markup of an answer is unpaired, malformed, outside 0..1000 or inverted"),
    "question-box": Check("warning", "the same in a question"),
    "clip-end": Check("warning", "a clip ends more than a second after its video"),
    "empty-answer": Check("warning", "an answer holds no text: the model learns to stop at once"),
    "repetition": Check("warning", f"more than {THRESHOLD:.0%} of an answer's {NGRAM}-grams are repeated"),
    "identical-answers": Check("warning", "chosen and rejected answer are the same: nothing is preferred"),
    "duplicate": Check("warning", "the same turns and media as an earlier row, in this or another data set"),
    "markup": Check("note", "tokens of a chat template, or placeholders in answers; they are read as plain text"),
}


class Problem(NamedTuple):
    """Something wrong with a row: a key of `CHECKS`, and what was found."""

    check: str
    message: str


@dataclass(frozen=True)
class Finding:
    """A problem in its place.

    Attributes:
        source: Name of the data set.
        where: Position of the row, such as `train.jsonl:12`.
        check: A key of `CHECKS`.
        severity: Of the check.
        message: What was found.
    """

    source: str
    where: str
    check: str
    severity: Severity
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def to_finding(source: str, where: str, problem: Problem) -> Finding:
    """A problem with its place and severity."""
    return Finding(source, where, problem.check, CHECKS[problem.check].severity, problem.message)


# ----------------------------------------------------------------------------------------------------------- whole row


def explain_refusal(error: RecordError) -> Problem:
    """The problem behind an error of `parse_record` or `parse_pair`."""
    kinds = {PlaceholderError: "placeholders", EmptyAnswerError: "empty-pair-answer"}
    return Problem(kinds.get(type(error), "row"), error.problem)


def hash_record(record: Record | PairRecord) -> int:
    """64 bits of a hash of the conversation and the names of its media, whatever format the row was written in.

    Among ten million different rows, two share it with a probability of 3e-6.
    """
    parts = [record] if isinstance(record, Record) else [record.chosen, record.rejected]
    digest = hashlib.blake2b(b"".join(map(_content, parts)), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _content(record: Record) -> bytes:
    turns = [(m.speaker, [p if isinstance(p, str) else [type(p).__name__] for p in m.parts]) for m in record.messages]
    media = [[str(source) for source in record.images], [asdict(video) for video in record.videos]]
    return json.dumps([turns, media], default=str).encode()


# ---------------------------------------------------------------------------------------------------------------- text


def check_text(record: Record | PairRecord) -> Iterator[Problem]:
    """Problems in the turns of a record, at most one of each kind per turn."""
    if isinstance(record, PairRecord):
        yield from _check_pair(record)
        return
    for number, message in enumerate(record.messages, 1):
        yield from _check_turn(message, f"turn {number}", message.speaker in ("gpt", "pretrain"))


def _check_pair(pair: PairRecord) -> Iterator[Problem]:
    """Shared turns once; they are not learned. A rejected answer may be wrong, in its grounding or by looping, too."""
    *shared, chosen = pair.chosen.messages
    rejected = pair.rejected.messages[-1]
    for number, message in enumerate(shared, 1):
        yield from _check_turn(message, f"turn {number}", is_learned=False)
    yield from _check_turn(chosen, "the chosen answer", is_learned=True)
    yield from _check_markup(rejected, "the rejected answer")
    if chosen.text == rejected.text:
        yield Problem("identical-answers", f"both answers are {_shown(chosen.text)}; leave the row out")


def _check_turn(message: Message, turn: str, is_learned: bool) -> Iterator[Problem]:
    if is_learned:
        yield from _check_answer(message.text, turn)
    yield from _check_grounding(message.text, turn, is_learned)
    yield from _check_markup(message, turn)


def _check_answer(text: str, turn: str) -> Iterator[Problem]:
    if not text.strip():
        yield Problem("empty-answer", f"{turn} has no text; leave the turn out, or write the answer")
    exact, loops = repeated_ngrams(text), repeated_share(text)
    if max(exact, loops) > THRESHOLD:
        yield Problem(
            "repetition",
            f"{turn}: {loops:.0%} of its {NGRAM}-grams occur elsewhere in it ({exact:.0%} by the original's count): "
            f"{_shown(text)}",
        )


_FOREIGN = re.compile(
    r"<\|[A-Za-z][A-Za-z0-9_]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?img>|<(?:IMG|VIDEO)_CONTEXT>|<(?:start|end)_of_turn>"
)
_PLACEHOLDER = re.compile("|".join(map(re.escape, (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER))))


def _check_markup(message: Message, turn: str) -> Iterator[Problem]:
    found = dict.fromkeys(_FOREIGN.findall(message.text))
    if message.speaker in ("gpt", "system"):
        found |= dict.fromkeys(_PLACEHOLDER.findall(message.text))
    if found:
        tokens = ", ".join(list(found)[:5])
        yield Problem("markup", f"{turn} ({message.speaker}) has {tokens}, which is read as plain text")


# ----------------------------------------------------------------------------------------------------------- grounding

_TAG = re.compile(r"<(/?)(ref|box|quad)>")
_BOX = re.compile(r"<box>(.*?)</box>", re.DOTALL)
# A number on its own, unlike that of "x1": descriptions of the format, common in questions, have none.
_NUMBER = re.compile(r"(?<![A-Za-z_\d])\d")
MAX_COORDINATE = 1000


def _check_grounding(text: str, turn: str, is_answer: bool) -> Iterator[Problem]:
    problems = find_grounding_problems(text, allow_descriptions=not is_answer)
    if problems:
        more = f" (and {len(problems) - 1} more in this turn)" if len(problems) > 1 else ""
        yield Problem("box" if is_answer else "question-box", f"{turn}: {problems[0]}{more}")


def find_grounding_problems(text: str, allow_descriptions: bool = False) -> list[str]:
    """What is wrong with `<ref>`, `<quad>` and `<box>[[x1, y1, x2, y2], ...]</box>` in a text.

    Tags must be paired and not nested. A box is four integers from 0 to 1000 with x1 <= x2 and y1 <= y2 (thousandths
    of the picture's width and height, as in the original's grounding data). The content of quads is not looked at.

    Args:
        text: Any text; it may have no markup.
        allow_descriptions: Accept boxes without numbers, as in "answer as <box>[[x1, y1, x2, y2]]</box>".
    """
    boxes = _BOX.findall(text)
    if allow_descriptions:
        boxes = [content for content in boxes if _NUMBER.search(content)]
    return [*_find_unpaired(text), *(problem for content in boxes if (problem := _problem_of(content)))]


def _find_unpaired(text: str) -> list[str]:
    problems, opened = [], None
    for match in _TAG.finditer(text):
        closes, name = bool(match[1]), match[2]
        near = _shown(text[match.start() :])
        if closes and opened != name:
            problems.append(f"</{name}> without <{name}> before it: {near}")
        elif not closes and opened is not None:
            problems.append(f"<{opened}> is not closed before {near}")
        opened = None if closes else name
    return problems if opened is None else [*problems, f"<{opened}> is not closed"]


def _problem_of(content: str) -> str | None:
    """What is wrong with the inside of one `<box>`, or None."""
    try:
        boxes = json.loads(content)
    except (ValueError, RecursionError):
        boxes = None
    if not isinstance(boxes, list) or not boxes or not all(isinstance(box, list) and len(box) == 4 for box in boxes):
        return f"a box must be [[x1, y1, x2, y2]], one list of four for each object, got {_shown(content)}"
    for box in boxes:
        if not all(type(value) is int for value in box):
            return f"coordinates are integers from 0 to {MAX_COORDINATE}, got {_shown(str(box))}"
        if not all(0 <= value <= MAX_COORDINATE for value in box):
            return f"{box} is outside 0..{MAX_COORDINATE}; coordinates are thousandths of width and height, not pixels"
        if box[0] > box[2] or box[1] > box[3]:
            return f"{box} is inverted; write [x1, y1, x2, y2] with x1 <= x2 and y1 <= y2"
    return None


def _shown(text: str, length: int = 60) -> str:
    """The start of a text, on one line."""
    return repr(text if len(text) <= length else text[:length] + "...")

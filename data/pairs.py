"""One row of a preference file as two records that differ in their last answer: `parse_pair`.

A row is split into two ordinary rows, one with the chosen and one with the rejected answer, and both go through
`records.parse_record`; so media, system turns, histories and placeholders mean what they mean everywhere else. Nothing
here knows of tokens or losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from .annotations import RecordError
from .format_media import Row
from .format_turns import PAIR_KEYS, history_of, is_given, question_of
from .records import Record, parse_record

__all__ = ["EmptyAnswerError", "PairRecord", "PairRows", "is_pair", "pair_rows", "parse_any", "parse_pair"]

_ANSWERS = ("chosen", "rejected")
_OF_MS_SWIFT = ("rejected_response", "rejected_messages")
_LISTED = ("prompt", "messages", "conversations")
_ASKED = ("question", "prompt", "instruction", "query")
# What both rows take over; everything else is metadata, such as `answer_gt` and `chosen_meta` of MMPR.
_SHARED = (
    "image", "images", "video", "videos", "clip", "system",
    "audio", "audios", "tools", "tool_calls", "function_call",  # refused, not dropped
)  # fmt: skip


class EmptyAnswerError(RecordError):
    """A preference row with an answer that holds no text."""


@dataclass(frozen=True)
class PairRecord:
    """A conversation with two last answers, of which one is preferred. They may be the same.

    Attributes:
        chosen: The conversation with the preferred answer.
        rejected: The same with the other answer: media and all messages but the last are equal.

    Raises:
        RecordError: they differ in more, or do not end with an answer. EmptyAnswerError: an answer has no text.
    """

    chosen: Record
    rejected: Record

    def __post_init__(self) -> None:
        for name, record in (("chosen", self.chosen), ("rejected", self.rejected)):
            speaker, text = record.messages[-1].speaker, record.messages[-1].text
            if speaker != "gpt":
                raise RecordError(self.where, f"the {name} conversation must end with an answer, not with {speaker}")
            if not text.strip():
                raise EmptyAnswerError(self.where, f"the {name} answer has no text; write it, or leave the row out")
        for number, (left, right) in enumerate(zip_longest(self.chosen.messages[:-1], self.rejected.messages[:-1]), 1):
            if left != right:
                raise RecordError(
                    self.where,
                    f"the chosen and the rejected conversation differ in turn {number}; they must be the same up to "
                    "their last answer",
                )
        for name in ("images", "videos"):
            if getattr(self.chosen, name) != getattr(self.rejected, name):
                raise RecordError(self.where, f"the chosen and the rejected conversation must have the same {name}")

    @property
    def where(self) -> str:
        """Position in its source, for messages to people."""
        return self.chosen.where


class PairRows(NamedTuple):
    """Two rows of formats that `parse_record` reads, and what errors call their answers."""

    chosen: Row
    rejected: Row
    names: tuple[str, str] = _ANSWERS


def is_pair(row: Any) -> bool:
    """Whether a decoded row is one of preference training: whether it has a key of a second answer."""
    return isinstance(row, dict) and any(is_given(row, key) for key in PAIR_KEYS)


def parse_pair(row: Any, where: str = "record", root: str | Path = "") -> PairRecord:
    """Validates one preference row of any format that `pair_rows` understands.

    Args:
        row: The decoded json object.
        where: Its position, for errors.
        root: Folder (or URL) that paths are relative to.

    Raises:
        RecordError: the row is malformed, an answer is missing, media and placeholders differ in number, or the two
            conversations differ in more than their last answer. EmptyAnswerError: an answer has no text.
    """
    rows = pair_rows(row, where)
    return PairRecord(
        _parse(rows.chosen, where, root, rows.names[0]), _parse(rows.rejected, where, root, rows.names[1])
    )


def parse_any(row: Any, where: str = "record", root: str | Path = "") -> Record | PairRecord:
    """`parse_pair` for a preference row, `parse_record` for any other."""
    return parse_pair(row, where, root) if is_pair(row) else parse_record(row, where, root)


def _parse(row: Row, where: str, root: str | Path, name: str) -> Record:
    try:
        return parse_record(row, where, root)
    except RecordError as error:
        raise type(error)(where, f"with {name!r} as its answer: {error.problem}") from error


def pair_rows(value: Any, where: str = "row") -> PairRows:
    """Splits a preference row into two ordinary ones.

    Understood are texts or messages under `chosen` and `rejected` beside the conversation so far: `question` (MMPR),
    `prompt` (TRL; a text or messages), `conversations` or `messages` (LLaMA-Factory), `instruction` (Alpaca) and
    `query`, the texts with `history`; whole conversations under both keys (TRL); and ms-swift's `messages`, or `query`
    and `response`, with `rejected_response` or `rejected_messages`.

    Args:
        value: The decoded json value.
        where: Its position, for errors.

    Raises:
        RecordError: not an object, no preference row, or one that could be read in two ways.
    """
    if not isinstance(value, dict):
        raise RecordError(where, f"a row must be a json object, got {type(value).__name__}")
    row = {key: item for key, item in value.items() if item is not None}
    has_answers = any(is_given(row, key) for key in _ANSWERS)
    if not has_answers and any(key in row for key in _OF_MS_SWIFT):
        return _split_ms_swift(row, where)
    if extra := [key for key in _OF_MS_SWIFT if is_given(row, key)]:
        raise RecordError(where, f"the row has {extra[0]!r} beside 'chosen' and 'rejected'; keep one or the other")
    answers = [_answer(row, key, where) for key in _ANSWERS]
    form, turns = _conversation(row, answers, where)
    shared = {key: row[key] for key in _SHARED if key in row}
    chosen, rejected = ({form: [*turns, *answer], **shared} for answer in answers)
    return PairRows(chosen, rejected)


def _answer(row: Row, key: str, where: str) -> list[Any]:
    """The turns under `chosen` or `rejected`."""
    value = row.get(key)
    if value is None:
        raise RecordError(where, f"the row has no {key!r}; a preference row needs a 'chosen' and a 'rejected' answer")
    if isinstance(value, str):
        return [{"from": "gpt", "value": value}]
    turns = value if isinstance(value, list) else [value]
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        raise RecordError(where, f"{key!r} must be a text, a message or a list of messages, got {value!r:.60}")
    return turns


def _conversation(row: Row, answers: list[list[Any]], where: str) -> tuple[str, list[Any]]:
    """The turns before the answers, and the key of the format that they are written in."""
    found = [key for key in _LISTED if isinstance(row.get(key), list) and row[key]]
    found += [key for key in _ASKED if isinstance(row.get(key), str)]
    if len(found) > 1:
        raise RecordError(where, f"the row has {found[0]!r} and {found[1]!r}; keep one of them")
    if not found:
        if all(len(answer) > 1 for answer in answers):  # whole conversations
            return "messages", []
        raise RecordError(
            where,
            "the row has no question to its answers; understood are 'question', 'prompt', 'conversations', "
            "'messages', 'instruction' and 'query', or whole conversations under 'chosen' and 'rejected'",
        )
    key = found[0]
    # As for supervised rows, marks of other tools are refused except in the original's own formats.
    form = "conversations" if key in ("question", "conversations") else "messages"
    if isinstance(row[key], list):
        return form, row[key]
    pairs = history_of(row, where)
    texts = [text for pair in pairs for text in pair]
    turns = [*texts, question_of(row, key)]
    return form, [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]


def _split_ms_swift(row: Row, where: str) -> PairRows:
    """Rows whose own answer is the chosen one."""
    given = [key for key in _OF_MS_SWIFT if key in row]
    if len(given) > 1:
        given = [key for key in given if is_given(row, key)] or given[:1]
    if len(given) > 1:
        raise RecordError(where, "the row has 'rejected_response' and 'rejected_messages'; keep one of them")
    for kind in ("images", "videos"):
        if is_given(row, f"rejected_{kind}") and row[f"rejected_{kind}"] != row.get(kind):
            raise RecordError(where, f"'rejected_{kind}' must be those of {kind!r}: both answers are about the same")
    key = given[0]
    chosen = {name: item for name, item in row.items() if name not in PAIR_KEYS}
    rejected, value = dict(chosen), row[key]
    listed = next((name for name in ("messages", "conversations") if isinstance(row.get(name), list)), None)
    own = listed or "response"
    if own not in row or (key == "rejected_messages" and listed is None):
        advice = "'messages'" if key == "rejected_messages" else "'messages' or 'query' and 'response'"
        raise RecordError(where, f"the row has {key!r} but no chosen answer; it needs {advice}")
    expected = list if key == "rejected_messages" else str
    if not isinstance(value, expected):
        wanted = {list: "a list of messages", str: "text"}[expected]
        raise RecordError(where, f"{key!r} must be {wanted}, got {value!r:.60}")
    if listed and key == "rejected_response":
        value = [*row[listed][:-1], {"from": "gpt", "value": value}]
    rejected[own] = value
    return PairRows(chosen, rejected, (own, key))

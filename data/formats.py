"""Rows of the formats that people have, to the one form that `records` reads: `to_row`.

Understood: `conversations` (InternVL, LLaVA, ShareGPT, LLaMA-Factory), `messages` (OpenAI, transformers, ms-swift),
`conversation` (ms-swift's pairs), `query`/`response`/`history` (ms-swift), `instruction`/`input`/`output` (Alpaca) and
`text` (pre-training). Only the form changes here: nothing is opened, and turns and counts are checked by `records`.

Where pictures are parts of a message, text is text: an `<image>` written in it stays what it is. In every other format
`<image>` and `<video>` in human turns stand for media.
"""

from __future__ import annotations

from typing import Any

from .annotations import RecordError
from .format_media import PLACEHOLDERS, VIDEO_PLACEHOLDER, Medium, Row, find_placeholders, listed_media
from .format_turns import Turn, read_turns, refuse_foreign_marks, refuse_unsupported, with_system

__all__ = ["PLACEHOLDERS", "SPEAKERS", "VIDEO_PLACEHOLDER", "Row", "to_row"]

SPEAKERS = ("system", "human", "gpt", "pretrain")


def to_row(value: Any, where: str = "row") -> Row:
    """A decoded row of any known format in the canonical form.

    Args:
        value: The decoded json value.
        where: Its position, for errors.

    Returns:
        `conversations`, a list of `{"from": speaker, "value": text}` with the speakers system, human, gpt and
        pretrain; `image`, a list of paths, URLs and data URLs; `video`, a list of objects with `path` (or a list of
        frames' paths) and, where given, `clip`, `fps`, `num_frames`, `min_frames`, `max_frames`, `indices`. A text
        whose placeholders do not all stand for media is `{"text": text, "slots": offsets of those that do}`.
        A canonical row is returned unchanged in meaning.

    Raises:
        RecordError: not an object, an unknown format, or something in it that could not be kept.
    """
    if not isinstance(value, dict):
        raise RecordError(where, f"a row must be a json object, got {type(value).__name__}")
    row = {key: item for key, item in value.items() if item is not None}
    refuse_unsupported(row, where)
    media = {kind: listed_media(row, kind, where) for kind in PLACEHOLDERS}
    turns = with_system(read_turns(row, where), row, where)
    if "conversations" not in row:
        refuse_foreign_marks(turns, where)
    return _assemble(turns, media, where)


def _assemble(turns: list[Turn], media: dict[str, list[Any]], where: str) -> Row:
    found = [part for turn in turns for part in turn.parts if isinstance(part, Medium)]
    sources = {kind: _sources(kind, [p for p in found if p.kind == kind], media[kind], where) for kind in media}
    top_level = any(media.values())
    conversations = []
    for turn in turns:
        literal = bool(found) or (turn.listed and not top_level)
        conversations.append({"from": turn.speaker, "value": _value(turn, literal)})
    return {"conversations": conversations, **sources}


def _sources(kind: str, parts: list[Medium], listed: list[Any], where: str) -> list[Any]:
    """Sources of one kind in order: those of the parts, or the row's own list."""
    given = [part.source for part in parts if part.source is not None]
    if not given:
        return listed
    if listed or len(given) < len(parts):
        raise RecordError(where, f"every {kind} part needs its path, or none has one and all paths stand in '{kind}s'")
    return given


def _value(turn: Turn, literal: bool) -> str | Row:
    """Text of a turn; with its slots where a placeholder in it is only text."""
    text, slots = "", []
    for part in turn.parts:
        if isinstance(part, Medium):
            slots.append(len(text))
        text += PLACEHOLDERS[part.kind] if isinstance(part, Medium) else part
    if turn.slots is not None:
        slots, literal = turn.slots, True
    if not literal or turn.speaker in ("gpt", "system") or slots == [m.start() for m in find_placeholders(text)]:
        return text
    return {"text": text, "slots": slots}

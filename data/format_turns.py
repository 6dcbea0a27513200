"""Turns of rows of any format: who speaks, and the texts and media of each.

One reader per format; a row is refused where something in it would change its meaning if it were left out. Whether
the turns make a conversation is checked by `records`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from .annotations import RecordError
from .format_media import Medium, Row, find_placeholders, path_of, video_of

_ROLES = {
    **dict.fromkeys(("human", "user"), "human"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "gpt"),
    **dict.fromkeys(("system", "developer"), "system"),
    "pretrain": "pretrain",
}
# Keys that make a row one of preference training; `pairs` reads those.
PAIR_KEYS = ("chosen", "rejected", "rejected_response", "rejected_messages")
# What would change the meaning of a row if it were left out, with what to do about it.
_UNSUPPORTED = {
    **dict.fromkeys(
        PAIR_KEYS,
        "this is a row for preference training (MPO), whose recipe has a 'preference' section; for supervised "
        "training keep only the answer to learn",
    ),
    **dict.fromkeys(("audio", "audios"), "audio is not supported; leave such rows out"),
    **dict.fromkeys(("tool_calls", "function_call"), "tool calls are not supported; write them as text"),
    "tools": "tool descriptions are not supported; write them into the system turn",
}
# Marks of other tools inside texts, which would be learned as plain text.
_FOREIGN_MARKS = {
    re.compile(r"<img>[^<>]+</img>"): "write <image> for <img>path</img> and put the path in 'images'",
    re.compile("<(IMG|VIDEO)_CONTEXT>"): "put the image and video parts where the text has these tokens",
    re.compile("<(ref-object|bbox)>"): "write <ref>name</ref><box>[[x1, y1, x2, y2]]</box>, integers from 0 to 1000",
}


@dataclass(frozen=True)
class Turn:
    """One turn as it was read.

    Attributes:
        speaker: system, human, gpt or pretrain.
        parts: Texts and media in order.
        listed: Whether the content was a list of parts.
        slots: Offsets of the placeholders that stand for media, where the row gives them.
    """

    speaker: str
    parts: tuple[str | Medium, ...]
    listed: bool = False
    slots: list[int] | None = None


def read_turns(row: Row, where: str) -> list[Turn]:
    """The turns of a row of any known format; a `system` beside them is not among them (`with_system`)."""
    lists = [key for key in ("conversations", "messages", "conversation") if key in row]
    if len(lists) > 1:
        raise RecordError(where, f"the row has {' and '.join(lists)}; keep one of them")
    key = lists[0] if lists else next((key for key in ("query", "instruction", "text") if key in row), None)
    if key is None:
        raise RecordError(
            where,
            f"unknown format: the row has the keys {', '.join(map(repr, row)) or '(none)'}; understood are "
            "'conversations' (InternVL, LLaVA, ShareGPT), 'messages' (OpenAI, ms-swift), 'conversation' (pairs), "
            "'query' with 'response', 'instruction' with 'output', and 'text' (pre-training)",
        )
    return _READERS[key](row, key, where)


def _listed_turns(row: Row, key: str, where: str) -> list[Turn]:
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        raise RecordError(where, f"{key!r} must be a non-empty list, got {turns!r:.60}")
    output = [_turn(turn, f"turn {i + 1}", where) for i, turn in enumerate(turns)]
    if key == "messages" and [turn.speaker for turn in output] == ["gpt"]:  # ms-swift's pre-training rows
        return [Turn("pretrain", output[0].parts, output[0].listed)]
    return output


def _turn(turn: Any, name: str, where: str) -> Turn:
    given = {k: v for k, v in turn.items() if v is not None} if isinstance(turn, dict) else {}
    refuse_unsupported(given, where)
    content = next((given[key] for key in ("value", "content", "text") if key in given), None)
    if not isinstance(content, (str, list, dict)):
        raise RecordError(where, f"{name} must be an object with 'from' and a text 'value', got {turn!r:.60}")
    role = given.get("from", given.get("role"))
    speaker = _ROLES.get(role.lower()) if isinstance(role, str) else None
    if speaker is None:
        raise RecordError(where, f"{name} is from {role!r}; expected one of {', '.join(_ROLES)}")
    learned = given.get("loss", given.get("weight") if speaker == "gpt" else None)
    if learned is not None and bool(learned) != (speaker in ("gpt", "pretrain")):
        raise RecordError(where, f"{name} sets its own loss, which is not supported; all answers are learned")
    if isinstance(content, dict):
        return _slotted(speaker, content, name, where)
    if isinstance(content, str):
        return Turn(speaker, (content,))
    parts = tuple(chain.from_iterable(_part(part, name, where) for part in content))
    if speaker in ("gpt", "system") and any(isinstance(part, Medium) for part in parts):
        raise RecordError(where, f"{name} is from {role!r} and holds a picture or video; only human turns may")
    return Turn(speaker, parts, listed=True)


def _slotted(speaker: str, content: Row, name: str, where: str) -> Turn:
    text, slots = content.get("text"), content.get("slots")
    if not isinstance(text, str) or not isinstance(slots, list):
        raise RecordError(where, f"{name} must hold text, parts, or an object with 'text' and 'slots'")
    places = {match.start() for match in find_placeholders(text)}
    if any(type(slot) is not int for slot in slots) or slots != sorted(places & set(slots)):
        raise RecordError(where, f"the slots of {name} must be offsets of placeholders in order, got {slots!r:.60}")
    return Turn(speaker, (text,), slots=slots)


def _part(part: Any, name: str, where: str) -> Iterator[str | Medium]:
    """Texts and media of one part; a medium ends its line, as in the chat template."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind == "text" and isinstance(part.get("text"), str):
        yield part["text"]
    elif kind in ("image", "image_url", "video", "video_url"):
        medium = kind.removesuffix("_url")
        keys = (kind, medium, "url", "path", "frames")
        source = next((part[key] for key in keys if part.get(key) is not None), None)
        if medium == "video" and source is not None:
            source = video_of({**part, "path": source["url"] if isinstance(source, dict) else source}, where)
        yield Medium(medium, path_of(source, medium, where) if medium == "image" and source is not None else source)
        yield "\n"
    else:
        raise RecordError(
            where, f"{name} has a part of type {kind!r}; expected text, image_url, image, video, video_url"
        )


def _pairs(row: Row, key: str, where: str) -> list[Turn]:
    """ms-swift: a list of objects, each with a question and its answer."""
    pairs = row[key]
    if not isinstance(pairs, list) or not all(isinstance(p, dict) and {"human", "assistant"} <= set(p) for p in pairs):
        raise RecordError(where, f"{key!r} must be a list of objects with 'human' and 'assistant', got {pairs!r:.60}")
    return _alternate([(pair["human"], pair["assistant"]) for pair in pairs], where)


def _query(row: Row, key: str, where: str) -> list[Turn]:
    """ms-swift's query, response and history, or Alpaca's instruction, input and output."""
    answer_key = {"query": "response", "instruction": "output"}[key]
    if answer_key not in row:
        raise RecordError(where, f"the row has {key!r} but no {answer_key!r}")
    return _alternate([*history_of(row, where), (question_of(row, key), row[answer_key])], where)


def question_of(row: Row, key: str) -> Any:
    """The question under `key`; Alpaca's `instruction` with its `input`, if there is one, on the lines after it."""
    question = row[key]
    if key == "instruction" and row.get("input"):
        return f"{question}\n{row['input']}" if question else row["input"]
    return question


def history_of(row: Row, where: str) -> list[Any]:
    """The [question, answer] pairs of earlier turns under `history`."""
    history = row.get("history", [])
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RecordError(where, f"'history' must be a list of [question, answer] pairs, got {history!r:.60}")
    return history


def _alternate(pairs: list[Any], where: str) -> list[Turn]:
    turns = []
    for i, (speaker, text) in enumerate((s, t) for pair in pairs for s, t in zip(("human", "gpt"), pair, strict=True)):
        if not isinstance(text, str):
            raise RecordError(where, f"turn {i + 1} must be text, got {text!r:.60}")
        turns.append(Turn(speaker, (text,)))
    return turns


def _document(row: Row, key: str, where: str) -> list[Turn]:
    if not isinstance(row[key], str):
        raise RecordError(where, f"{key!r} must be text, got {row[key]!r:.60}")
    return [Turn("pretrain", (row[key],))]


_READERS: dict[str, Callable[[Row, str, str], list[Turn]]] = {
    "conversations": _listed_turns, "messages": _listed_turns, "conversation": _pairs, "query": _query,
    "instruction": _query, "text": _document,
}  # fmt: skip


def with_system(turns: list[Turn], row: Row, where: str) -> list[Turn]:
    """The turns with the row's `system` before them."""
    system = row.get("system")
    if not system:  # an empty one means none in the formats that have the key
        return turns
    if not isinstance(system, str):
        raise RecordError(where, f"'system' must be text, got {system!r:.60}")
    if turns and turns[0].speaker == "system":
        if turns[0].parts == (system,):
            return turns
        raise RecordError(where, "the row has a 'system' text and a system turn that differ; keep one of them")
    return [Turn("system", (system,)), *turns]


def is_given(row: Row, key: str) -> bool:
    """Whether a key says anything: tables of several kinds of rows fill the others' keys with empty values."""
    return bool(row.get(key)) and row[key] != "[]"


def refuse_unsupported(row: Row, where: str) -> None:
    """Raises `RecordError` for a row or turn with a key that changes its meaning and cannot be kept."""
    for key, advice in _UNSUPPORTED.items():
        if is_given(row, key):
            raise RecordError(where, f"the row has {key!r}: {advice}")


def refuse_foreign_marks(turns: list[Turn], where: str) -> None:
    """Raises `RecordError` for texts with marks of other tools."""
    for i, turn in enumerate(turns):
        text = "".join(part for part in turn.parts if isinstance(part, str))
        for mark, advice in _FOREIGN_MARKS.items():
            if found := mark.search(text):
                raise RecordError(where, f"turn {i + 1} has {found[0]!r:.60}: {advice}")

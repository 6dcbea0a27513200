"""Rows of the formats that people have, to the one form that `records` reads: `to_row`.

Understood: `conversations` (InternVL, LLaVA, ShareGPT, LLaMA-Factory), `messages` (OpenAI, transformers, ms-swift),
`conversation` (ms-swift's pairs), `query`/`response`/`history` (ms-swift), `instruction`/`input`/`output` (Alpaca) and
`text` (pre-training). Only the form changes here: nothing is opened, and turns and counts are checked by `records`.

Where pictures are parts of a message, text is text: an `<image>` written in it stays what it is. In every other format
`<image>` and `<video>` in human turns stand for media.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ..conversation import IMAGE_PLACEHOLDER
from .annotations import RecordError

VIDEO_PLACEHOLDER = "<video>"
PLACEHOLDERS = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}
SPEAKERS = ("system", "human", "gpt", "pretrain")

Row = dict[str, Any]

_ROLES = {
    **dict.fromkeys(("human", "user"), "human"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "gpt"),
    **dict.fromkeys(("system", "developer"), "system"),
    "pretrain": "pretrain",
}
# What would change the meaning of a row if it were left out, with what to do about it.
_UNSUPPORTED = {
    **dict.fromkeys(
        ("chosen", "rejected", "rejected_response", "rejected_messages"),
        "this is a row for preference training; for supervised training keep only the answer to learn",
    ),
    **dict.fromkeys(("audio", "audios"), "audio is not supported; leave such rows out"),
    **dict.fromkeys(("tool_calls", "function_call"), "tool calls are not supported; write them as text"),
    "tools": "tool descriptions are not supported; write them into the system turn",
}
_VIDEO_KEYS = {
    "clip": "clip", "fps": "fps", "nframes": "num_frames", "num_frames": "num_frames", "min_frames": "min_frames",
    "max_frames": "max_frames", "indices": "indices", "frame_indices": "indices",
}  # fmt: skip
# Marks of other tools inside texts, which would be learned as plain text.
_FOREIGN_MARKS = {
    re.compile(r"<img>[^<>]+</img>"): "write <image> for <img>path</img> and put the path in 'images'",
    re.compile("<(IMG|VIDEO)_CONTEXT>"): "put the image and video parts where the text has these tokens",
    re.compile("<(ref-object|bbox)>"): "write <ref>name</ref><box>[[x1, y1, x2, y2]]</box>, integers from 0 to 1000",
}


@dataclass(frozen=True)
class _Medium:
    """A picture or video as a part of a message; without a source it takes the next one of the row's list."""

    kind: str
    source: Any = None


@dataclass(frozen=True)
class _Turn:
    speaker: str
    parts: tuple[str | _Medium, ...]
    listed: bool = False  # whether the content was a list of parts
    slots: list[int] | None = None


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
    _refuse_unsupported(row, where)
    media = {kind: _top_level(row, kind, where) for kind in PLACEHOLDERS}
    turns = _with_system(_read_turns(row, where), row, where)
    if "conversations" not in row:
        _refuse_foreign_marks(turns, where)
    return _assemble(turns, media, where)


# --- turns -----------------------------------------------------------------------------------------------------------


def _read_turns(row: Row, where: str) -> list[_Turn]:
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


def _listed_turns(row: Row, key: str, where: str) -> list[_Turn]:
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        raise RecordError(where, f"{key!r} must be a non-empty list, got {turns!r:.60}")
    output = [_turn(turn, f"turn {i + 1}", where) for i, turn in enumerate(turns)]
    if key == "messages" and [turn.speaker for turn in output] == ["gpt"]:  # ms-swift's pre-training rows
        return [_Turn("pretrain", output[0].parts, output[0].listed)]
    return output


def _turn(turn: Any, name: str, where: str) -> _Turn:
    given = {k: v for k, v in turn.items() if v is not None} if isinstance(turn, dict) else {}
    _refuse_unsupported(given, where)
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
        return _Turn(speaker, (content,))
    parts = tuple(chain.from_iterable(_part(part, name, where) for part in content))
    if speaker in ("gpt", "system") and any(isinstance(part, _Medium) for part in parts):
        raise RecordError(where, f"{name} is from {role!r} and holds a picture or video; only human turns may")
    return _Turn(speaker, parts, listed=True)


def _slotted(speaker: str, content: Row, name: str, where: str) -> _Turn:
    text, slots = content.get("text"), content.get("slots")
    if not isinstance(text, str) or not isinstance(slots, list):
        raise RecordError(where, f"{name} must hold text, parts, or an object with 'text' and 'slots'")
    places = {match.start() for match in _placeholders(text)}
    if any(type(slot) is not int for slot in slots) or slots != sorted(places & set(slots)):
        raise RecordError(where, f"the slots of {name} must be offsets of placeholders in order, got {slots!r:.60}")
    return _Turn(speaker, (text,), slots=slots)


def _part(part: Any, name: str, where: str) -> Iterator[str | _Medium]:
    """Texts and media of one part; a medium ends its line, as in the chat template."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind == "text" and isinstance(part.get("text"), str):
        yield part["text"]
    elif kind in ("image", "image_url", "video", "video_url"):
        medium = kind.removesuffix("_url")
        keys = (kind, medium, "url", "path", "frames")
        source = next((part[key] for key in keys if part.get(key) is not None), None)
        if medium == "video" and source is not None:
            source = _video({**part, "path": source["url"] if isinstance(source, dict) else source}, where)
        yield _Medium(medium, _path(source, medium, where) if medium == "image" and source is not None else source)
        yield "\n"
    else:
        raise RecordError(
            where, f"{name} has a part of type {kind!r}; expected text, image_url, image, video, video_url"
        )


def _pairs(row: Row, key: str, where: str) -> list[_Turn]:
    """ms-swift: a list of objects, each with a question and its answer."""
    pairs = row[key]
    if not isinstance(pairs, list) or not all(isinstance(p, dict) and {"human", "assistant"} <= set(p) for p in pairs):
        raise RecordError(where, f"{key!r} must be a list of objects with 'human' and 'assistant', got {pairs!r:.60}")
    return _alternate([(pair["human"], pair["assistant"]) for pair in pairs], where)


def _query(row: Row, key: str, where: str) -> list[_Turn]:
    """ms-swift's query, response and history, or Alpaca's instruction, input and output."""
    question, answer_key = row[key], {"query": "response", "instruction": "output"}[key]
    if key == "instruction" and row.get("input"):
        question = f"{question}\n{row['input']}" if question else row["input"]
    if answer_key not in row:
        raise RecordError(where, f"the row has {key!r} but no {answer_key!r}")
    history = row.get("history", [])
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RecordError(where, f"'history' must be a list of [question, answer] pairs, got {history!r:.60}")
    return _alternate([*history, (question, row[answer_key])], where)


def _alternate(pairs: list[Any], where: str) -> list[_Turn]:
    turns = []
    for i, (speaker, text) in enumerate((s, t) for pair in pairs for s, t in zip(("human", "gpt"), pair, strict=True)):
        if not isinstance(text, str):
            raise RecordError(where, f"turn {i + 1} must be text, got {text!r:.60}")
        turns.append(_Turn(speaker, (text,)))
    return turns


def _document(row: Row, key: str, where: str) -> list[_Turn]:
    if not isinstance(row[key], str):
        raise RecordError(where, f"{key!r} must be text, got {row[key]!r:.60}")
    return [_Turn("pretrain", (row[key],))]


_READERS: dict[str, Callable[[Row, str, str], list[_Turn]]] = {
    "conversations": _listed_turns, "messages": _listed_turns, "conversation": _pairs, "query": _query,
    "instruction": _query, "text": _document,
}  # fmt: skip


def _with_system(turns: list[_Turn], row: Row, where: str) -> list[_Turn]:
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
    return [_Turn("system", (system,)), *turns]


def _refuse_unsupported(row: Row, where: str) -> None:
    for key, advice in _UNSUPPORTED.items():
        if row.get(key) and row[key] != "[]":
            raise RecordError(where, f"the row has {key!r}: {advice}")


def _refuse_foreign_marks(turns: list[_Turn], where: str) -> None:
    for i, turn in enumerate(turns):
        text = "".join(part for part in turn.parts if isinstance(part, str))
        for mark, advice in _FOREIGN_MARKS.items():
            if found := mark.search(text):
                raise RecordError(where, f"turn {i + 1} has {found[0]!r:.60}: {advice}")


# --- media -----------------------------------------------------------------------------------------------------------


def _top_level(row: Row, kind: str, where: str) -> list[Any]:
    """Sources under `image` or `images` (`video`, `videos`) of the row."""
    keys = [key for key in (kind, f"{kind}s") if row.get(key)]
    if len(keys) > 1:
        raise RecordError(where, f"the row has {keys[0]!r} and {keys[1]!r}; keep one of them")
    value = row[keys[0]] if keys else []
    items = value if isinstance(value, list) else [value]
    if kind == "image":
        return [_path(item, keys[0], where) for item in items]
    return [_video(item, where, clip) for item, clip in zip(items, _clips(row, len(items), where), strict=True)]


def _clips(row: Row, videos: int, where: str) -> list[Any]:
    """The row's `clip` for each of its videos: one pair, or a list with a pair or null for each."""
    clip = row.get("clip")
    if not clip or not videos:
        return [None] * videos
    if isinstance(clip, list) and videos == 1 and not isinstance(clip[0], list):
        return [clip]
    if not isinstance(clip, list) or len(clip) != videos:
        raise RecordError(where, f"'clip' must have one [start, end] per video ({videos}), got {clip!r:.60}")
    return clip


def _path(value: Any, name: str, where: str) -> str:
    if isinstance(value, dict):
        value = next((value[key] for key in ("url", "path", "image") if value.get(key)), value)
    if not isinstance(value, str) or not value:
        raise RecordError(where, f"{name!r} must be a path or a list of paths, got {value!r:.60}")
    return value.removeprefix("file://")


def _video(value: Any, where: str, clip: Any = None) -> Row:
    if not isinstance(value, dict):
        value = {"path": value}
    path: Any = next((value[key] for key in ("path", "url", "video") if value.get(key)), None)
    is_frames = isinstance(path, list) and path
    output: Row = {"path": [_path(p, "video", where) for p in path] if is_frames else _path(path, "video", where)}
    if clip:
        output["clip"] = clip
    for key, name in _VIDEO_KEYS.items():
        if value.get(key) is not None:
            output[name] = value[key]
    if value.get("video_start") is not None or value.get("video_end") is not None:
        output["clip"] = [value.get("video_start") or 0, value.get("video_end")]
    return output


# --- together --------------------------------------------------------------------------------------------------------


def _assemble(turns: list[_Turn], media: dict[str, list[Any]], where: str) -> Row:
    found = [part for turn in turns for part in turn.parts if isinstance(part, _Medium)]
    sources = {kind: _sources(kind, [p for p in found if p.kind == kind], media[kind], where) for kind in media}
    top_level = any(media.values())
    conversations = []
    for turn in turns:
        literal = bool(found) or (turn.listed and not top_level)
        conversations.append({"from": turn.speaker, "value": _value(turn, literal)})
    return {"conversations": conversations, **sources}


def _sources(kind: str, parts: list[_Medium], listed: list[Any], where: str) -> list[Any]:
    """Sources of one kind in order: those of the parts, or the row's own list."""
    given = [part.source for part in parts if part.source is not None]
    if not given:
        return listed
    if listed or len(given) < len(parts):
        raise RecordError(where, f"every {kind} part needs its path, or none has one and all paths stand in '{kind}s'")
    return given


def _value(turn: _Turn, literal: bool) -> str | Row:
    """Text of a turn; with its slots where a placeholder in it is only text."""
    text, slots = "", []
    for part in turn.parts:
        if isinstance(part, _Medium):
            slots.append(len(text))
        text += PLACEHOLDERS[part.kind] if isinstance(part, _Medium) else part
    if turn.slots is not None:
        slots, literal = turn.slots, True
    if not literal or turn.speaker in ("gpt", "system") or slots == [m.start() for m in _placeholders(text)]:
        return text
    return {"text": text, "slots": slots}


_PLACEHOLDER = re.compile("|".join(map(re.escape, PLACEHOLDERS.values())))


def _placeholders(text: str) -> Iterator[re.Match[str]]:
    return _PLACEHOLDER.finditer(text)

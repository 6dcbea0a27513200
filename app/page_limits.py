"""What a visitor of the demo page may ask for, and the settings of an answer; values from the browser are not trusted.

Limits of single files are `page_media.MediaLimits`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

THINKING = {"as the model is set": None, "on": True, "off": False}


class PageError(ValueError):
    """A request that is refused; the message is for the visitor."""


@dataclass(frozen=True)
class ChatLimits:
    """What one conversation may have, and how many there may be.

    Attributes:
        media: Images and videos of a conversation.
        tiles: Tiles of a conversation, those of video frames included; memory grows with them.
        characters: Of a question, and of the system text.
        turns: Questions of a conversation.
        new_tokens: Tokens of an answer.
        seconds: Time of an answer.
        conversations: Kept at once; the one idle for longest gives way.
        idle_seconds: After which a conversation is forgotten.
        waiting: Visitors who may wait for their answer.
    """

    media: int = 8
    tiles: int = 64
    characters: int = 4000
    turns: int = 40
    new_tokens: int = 1024
    seconds: float = 180.0
    conversations: int = 16
    idle_seconds: float = 1800.0
    waiting: int = 32

    def checked_question(self, question: object, has_uploads: bool) -> str:
        """The question, stripped.

        Raises:
            PageError: no text, too much of it, or nothing at all.
        """
        if not isinstance(question, str):
            raise PageError("A question must be text.")
        question = question.strip()
        if len(question) > self.characters:
            raise PageError(f"The question has {len(question)} characters; at most {self.characters} are taken.")
        if not question:
            raise PageError("Write a question about the upload." if has_uploads else "Write a question.")
        return question

    def check_turns(self, turns: int) -> None:
        """Raises `PageError` where one more question is too many."""
        if turns >= self.turns:
            raise PageError(f"A conversation has at most {self.turns} questions. Clear it to begin a new one.")

    def check_media(self, media: int) -> None:
        """Raises `PageError` for too many images and videos."""
        if media > self.media:
            raise PageError(f"A conversation has at most {self.media} images and videos; this would make {media}.")

    def check_tiles(self, tiles: int) -> None:
        """Raises `PageError` for too many tiles."""
        if tiles > self.tiles:
            raise PageError(
                f"A conversation has at most {self.tiles} tiles; this would make {tiles}. Allow fewer tiles for each "
                "image, or clear the conversation."
            )


@dataclass(frozen=True)
class Settings:
    """How an answer is made.

    Attributes:
        max_tiles: Most tiles of each new image, thumbnail not counted.
        frames: Taken from each new video.
        max_new_tokens: Of the answer.
        temperature: 0 for the most likely words, always the same.
        top_p, top_k: From how many words each is drawn; 1 and 0 for all. Not used at temperature 0.
        repetition_penalty: 1 for none.
        system: System text instead of the model's own; "" for the model's own.
        thinking: One of `THINKING`.
    """

    max_tiles: int = 12
    frames: int = 8
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    system: str = ""
    thinking: str = next(iter(THINKING))

    def generation(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.repetition_penalty != 1:
            options["repetition_penalty"] = self.repetition_penalty
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return options

    def system_text(self) -> str | None:
        """The argument `system` of the chat methods."""
        return self.system or None

    def extras(self, model: Any) -> dict[str, Any]:
        """Arguments that only some models' `stream_chat` has."""
        thinking = THINKING[self.thinking]
        return {} if thinking is None or not can_think(model) else {"thinking": thinking}


def can_think(model: Any) -> bool:
    """Whether thinking can be switched on and off."""
    return "thinking" in inspect.signature(model.stream_chat).parameters


# Lowest and highest value of each number.
RANGES: dict[str, tuple[float, float]] = {
    "max_tiles": (1, 40),
    "frames": (1, 64),
    "max_new_tokens": (1, 1 << 20),
    "temperature": (0, 2),
    "top_p": (0.01, 1),
    "top_k": (0, 1000),
    "repetition_penalty": (1, 2),
}


def setting_ranges(limits: ChatLimits, frames: int) -> dict[str, tuple[float, float]]:
    """Lowest and highest value of each number on a page with these limits, at most `frames` frames of a video."""
    most = {"max_tiles": limits.tiles, "frames": frames, "max_new_tokens": limits.new_tokens}
    return {name: (low, min(high, most.get(name, high))) for name, (low, high) in RANGES.items()}


def checked_settings(values: Mapping[str, Any], limits: ChatLimits, frames: int) -> Settings:
    """Settings from what a browser has sent.

    Args:
        values: By the names of `Settings`; missing ones keep their default, as far as the limits allow it.
        limits: Of the conversation.
        frames: Most frames of a video.

    Raises:
        PageError: a value of the wrong type or out of its range, or an unknown name.
    """
    ranges = setting_ranges(limits, frames)
    known = {field.name: field for field in fields(Settings)}
    checked: dict[str, Any] = {name: min(getattr(Settings, name), high) for name, (_, high) in ranges.items()}
    for name, value in values.items():
        value = "" if value is None and name == "system" else value  # an empty text box
        if name not in known:
            raise PageError(f"There is no setting {name[:40]!r}.")
        if name in ranges:
            checked[name] = _number(name, value, *ranges[name], known[name].type == "int")
        elif not isinstance(value, str) or len(value) > limits.characters:
            raise PageError(f"{name} must be a text of at most {limits.characters} characters.")
        else:
            checked[name] = value.strip()
    if checked.get("thinking", Settings.thinking) not in THINKING:
        raise PageError(f"thinking must be one of {', '.join(THINKING)}.")
    return Settings(**checked)


def _number(name: str, value: Any, low: float, high: float, whole: bool) -> float:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not usable or (whole and value != int(value)) or not low <= value <= high:
        kind = "whole number" if whole else "number"
        raise PageError(f"{name} must be a {kind} from {low:g} to {high:g}.")
    return int(value) if whole else float(value)

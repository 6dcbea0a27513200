"""A conversation as what the demo page shows: messages of the chat, pictures as files, the gallery of tiles.

Text is escaped here, because Gradio's chat takes HTML also where it is told not to render Markdown. Pictures are
written to the page's folder, since a browser fetches them from there, and deleted with what they show.
"""

from __future__ import annotations

import html
import secrets
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..reasoning_internvl import split_reasoning
from .page_chat import Exchange
from .page_medium import Medium
from .page_view import answer_text, boxed_picture

_STOPPED = {"stopped": "(stopped)", "limit": "(stopped: the time of an answer is over)"}


class Shelf:
    """Pictures as files, each for as long as the object lives that it belongs to.

    Args:
        folder: Where they are written, under names that nobody can guess; made if it is not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(exist_ok=True)
        self._paths: weakref.WeakKeyDictionary[Any, dict[str, str | None]] = weakref.WeakKeyDictionary()

    def path(self, owner: Any, name: str, make: Callable[[], Image.Image | None]) -> str | None:
        """Where the picture called `name` of `owner` lies; `make` gives it, or None, the first time."""
        known = self._paths.setdefault(owner, {})
        if name not in known:
            picture = make()
            known[name] = None if picture is None else self._write(owner, picture)
        return known[name]

    def _write(self, owner: Any, picture: Image.Image) -> str:
        path = self.folder / f"{secrets.token_hex(16)}.png"
        picture.save(path)
        weakref.finalize(owner, path.unlink, missing_ok=True)
        return str(path)


def chat_messages(
    exchanges: Iterable[Exchange], shelf: Shelf, current: Exchange | None = None
) -> list[dict[str, Any]]:
    """Messages of the chat: uploads, question, reasoning, answer, and the picture that the answer's boxes lie in.

    Args:
        exchanges: Finished ones.
        shelf: Where pictures go.
        current: The one that is being answered; its boxes are not drawn yet.
    """
    messages: list[dict[str, Any]] = []
    last: Medium | None = None
    finished = list(exchanges)
    for exchange in [*finished, *([current] if current is not None else [])]:
        for medium in exchange.media:
            messages.append(
                _picture_message(
                    "user", shelf.path(medium, "picture", lambda medium=medium: medium.picture), medium.name
                )
            )
            last = None if medium.is_video else medium
        messages.append(_text_message("user", exchange.question))
        messages += _answer_messages(exchange)
        if last is not None and exchange is not current:
            messages += _boxes_message(exchange, last, shelf)
    return messages


def tile_views(media: Sequence[Medium], shelf: Shelf) -> list[tuple[str | None, str]]:
    """(path, caption) of everything that the model sees, in order."""
    return [
        (shelf.path(medium, f"view {i}", lambda view=view: view), caption)
        for medium in media
        for i, (view, caption) in enumerate(medium.views)
    ]


def token_summary(media: Sequence[Medium], tokens_per_tile: int) -> str:
    """One line on what the pictures cost."""
    if not media:
        return "Nothing yet: send an image or a video."
    tiles = sum(medium.tile_count for medium in media)
    return (
        f"{_count(len(media), 'upload')}, {_count(tiles, 'tile')}, {_count(tiles * tokens_per_tile, 'visual token')}"
    )


def _boxes_message(exchange: Exchange, medium: Medium, shelf: Shelf) -> list[dict[str, Any]]:
    """The image with the answer's boxes; [] without any."""
    answer = split_reasoning(exchange.answer).answer
    path = shelf.path(exchange, "boxes", lambda: boxed_picture(medium.picture, answer))
    return [_picture_message("assistant", path, f"boxes in {medium.name}")] if path is not None else []


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _answer_messages(exchange: Exchange) -> list[dict[str, Any]]:
    parts = split_reasoning(exchange.answer)
    messages = []
    if parts.reasoning:
        state = "done" if parts.complete else "pending"
        thought = _text_message("assistant", parts.reasoning)
        messages.append({**thought, "metadata": {"title": "Thinking", "status": state}})
    text = " ".join(filter(None, (answer_text(parts.answer), _STOPPED.get(exchange.stopped, ""))))
    if text:
        messages.append(_text_message("assistant", text))
    return messages


def _text_message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": html.escape(text)}]}


def _picture_message(role: str, path: str | None, name: str) -> dict[str, Any]:
    file = {"path": path, "mime_type": "image/png"}
    return {"role": role, "content": [{"type": "file", "file": file, "alt_text": name}]}

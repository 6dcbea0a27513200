"""Requests as the bodies of chat completions, and replies as answers; nothing is sent here.

Files that are PNG, JPEG, WebP or GIF go as they are, in data URLs; other files and pictures in memory as PNG; URLs as
URLs. Videos go as their frames with the lines that the models were trained on.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ..tiling_internvl import divided_max_num, load_image, to_rgb
from .engines import Answer, Request
from .request_media import DEFAULT_FRAMES, Picture, question_text, spell_request

KINDS = ("vllm", "sglang", "lmdeploy", "internvl", "other")
ONE_BUDGET = ("vllm", "internvl")  # one number of tiles for all pictures of a request
_MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}
_ORIENTATION = 0x0112
_FAILED = ("error", "abort", "content_filter")


class ReplyError(ValueError):
    """A reply that is not what was asked for."""


def request_body(
    request: Request, model: str, kind: str = "other", num_frames: int = DEFAULT_FRAMES, exif: bool = True
) -> dict[str, Any]:
    """The body of a chat completion, without its sampling.

    Args:
        request: What is asked.
        model: Name of the model.
        kind: Of the server, one of `KINDS`; see `server_engine` for what they take.
        num_frames: Frames of a video that does not say itself how many.
        exif: Turn pictures upright; servers do not look at the orientation of a file.

    Raises:
        ValueError, OSError: a medium cannot be read, (vLLM, `internvl serve`) pictures and frames need tiles of
            different number, or (the latter) the answer is begun.
    """
    parts = spell_request(request, num_frames, exif)
    budgets = _budgets(request, parts, kind)
    messages: list[dict[str, Any]] = [{"role": "system", "content": request.system}] if request.system else []
    messages.append({"role": "user", "content": _content(parts, budgets, kind, exif)})
    body: dict[str, Any] = {"model": model, "messages": messages}
    if kind in ONE_BUDGET and budgets:
        body["mm_processor_kwargs"] = {"max_dynamic_patch": next(iter(budgets.values()))}
    if request.prefix and kind == "internvl":
        raise ValueError("`internvl serve` does not go on with a begun answer; ask the model here, or another server")
    if request.prefix:
        messages.append({"role": "assistant", "content": request.prefix})
        if kind != "lmdeploy":
            body |= {"continue_final_message": True, "add_generation_prompt": False}
    return body


def _budgets(request: Request, parts: Sequence[str | Picture], kind: str) -> dict[bool, int]:
    """Most tiles of a picture and of a frame, by whether it is a frame, where the server is to be told."""
    pictures = [part for part in parts if isinstance(part, Picture)]
    stills = sum(not picture.is_frame for picture in pictures)
    budgets = {True: 1} if len(pictures) > stills else {}
    if stills and request.max_tiles is not None:
        budgets[False] = divided_max_num(request.max_tiles, stills)
    if kind in ONE_BUDGET and stills and True in budgets and budgets.get(False) != 1:
        words = "this server has one number of tiles for all pictures of a request"
        raise ValueError(f"{words}; set max_tiles=1 beside a video")
    return budgets


def _content(parts: Sequence[str | Picture], budgets: dict[bool, int], kind: str, exif: bool) -> Any:
    if not any(isinstance(part, Picture) for part in parts):
        return question_text(parts)
    return list(_content_parts(parts, budgets if kind in ("sglang", "lmdeploy") else {}, exif))


def _content_parts(parts: Sequence[str | Picture], budgets: dict[bool, int], exif: bool) -> Iterator[dict[str, Any]]:
    """Text and picture parts; the chat templates end the line behind a picture themselves."""
    before: Any = None
    for part in parts:
        if isinstance(part, Picture):
            tiles = {"max_dynamic_patch": budgets[part.is_frame]} if part.is_frame in budgets else {}
            yield {"type": "image_url", "image_url": {"url": picture_url(part.source, exif), **tiles}}
        elif text := part.removeprefix("\n") if isinstance(before, Picture) else part:
            yield {"type": "text", "text": text}
        before = part


def picture_url(source: str | Path | Image.Image, exif: bool = True) -> str:
    """A picture as a URL: its own, or a data URL with its bytes.

    Raises:
        ValueError, OSError: it cannot be read.
    """
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        return source
    if isinstance(source, Image.Image):
        return _png_url(to_rgb(source))
    kind = _sendable_type(Path(source), exif)
    if kind is None:
        return _png_url(load_image(source, exif=exif))
    return f"data:{kind};base64,{base64.b64encode(Path(source).read_bytes()).decode()}"


def _sendable_type(path: Path, exif: bool) -> str | None:
    """The media type of a file that can go as it is; None for one that must be decoded, or that is none."""
    try:
        with Image.open(path) as image:
            turned = exif and image.getexif().get(_ORIENTATION, 1) not in (0, 1)
            return None if turned else _MEDIA_TYPES.get(image.format or "")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None  # `load_image` says what is wrong


def _png_url(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def read_choices(reply: Any) -> list[Answer]:
    """The answers of a chat completion; thoughts that a server split off are put back in front.

    Raises:
        ReplyError: it is none, or holds no text.
    """
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not choices:
        raise ReplyError(f"the reply has no choices: {reply!r:.200}")
    return [_answer(choice) for choice in choices]


def _answer(choice: Any) -> Answer:
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise ReplyError(f"a choice has no message: {choice!r:.200}")
    finish = choice.get("finish_reason")
    text: Any = message.get("content")
    thoughts = next((message[k] for k in ("reasoning_content", "reasoning") if isinstance(message.get(k), str)), "")
    if finish in _FAILED or not (isinstance(text, str) or thoughts):
        raise ReplyError(f"a choice holds no text (finish_reason {finish!r}): {message!r:.200}")
    if thoughts:
        text = f"<think>{thoughts}" + (f"</think>\n{text}" if isinstance(text, str) else "")
    return Answer(text, finish != "length")

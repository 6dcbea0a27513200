"""The fixed conversations and images of reference dumps (`golden.py`).

Changing any of them changes every dump: raise `golden.FORMAT` then.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

# name -> (width, height, mode); the picture is a function of these alone, see `synthetic_image`.
IMAGES = {
    "square": (448, 448, "RGB"),
    "wide": (896, 448, "RGB"),
    "strip": (60, 30, "RGB"),
    "tall": (300, 700, "RGB"),
    "photo": (800, 1300, "RGB"),
    "small": (61, 40, "RGB"),
    "pixel": (1, 1, "RGB"),
    "very_wide": (3000, 60, "RGB"),
    "rgba": (333, 500, "RGBA"),
    "grey": (257, 190, "L"),
}


def _user(*parts: str | dict[str, Any]) -> dict[str, Any]:
    """A user message; strings become text parts, a single string plain content."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return {"role": "user", "content": parts[0]}
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def _image(name: str) -> dict[str, Any]:
    return {"type": "image", "image": name}


def _says(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


# Conversations that end with a question; images by name. "pixel" is one tile and "strip" three, of whatever size.
PROMPTS: dict[str, list[dict[str, Any]]] = {
    "text": [_user("Hello, who are you?")],
    "one_tile": [_user(_image("pixel"), "What is on the left?")],
    "one_image": [_user(_image("strip"), "Describe the image.")],
    "image_last": [_user("Describe the image.\n", _image("strip"))],
    "several_images": [_user("Image-1: ", _image("strip"), "Image-2: ", _image("pixel"), "What differs?")],
    "several_turns": [
        _user(_image("strip"), "What is it?"),
        _says("assistant", "A cat."),
        _user("And the colour?"),
    ],
    "images_in_two_turns": [
        _user(_image("pixel"), "What is this?"),
        _says("assistant", "A cat."),
        _user(_image("small"), "And this?"),
    ],
    "system": [_says("system", "You are a helpful assistant."), _user("Hi")],
    "empty_system": [_says("system", ""), _user("Hi")],
    "chinese": [
        _user("你好"),
        _says("assistant", "您好！"),
        _user("1+1=?"),
        _says("assistant", "2"),
        _user("Thanks"),
    ],
    "chinese_image": [_user(_image("pixel"), "请详细描述这张图片。")],
    "whitespace": [_user("  two  spaces\n\n\tand a tab, then 3.14 × 10⁸ 😀 ")],
    "video": [_user({"type": "video", "video": ["square", "photo", "grey"]}, "What happens?")],
}


def synthetic_image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A picture with gradients, edges and fine texture, from integer arithmetic alone; the same everywhere.

    With x and y counted from 0 and `//` rounding down: red is `x * 255 // max(width - 1, 1)`, green
    `y * 255 // max(height - 1, 1)`, blue `(x // 7 + y // 5) % 2 * 200 + (x * 31 + y * 17) % 56`, alpha
    `(x + 2 * y) % 256`. A grey picture ("L") has blue's values.
    """
    y, x = np.mgrid[0:height, 0:width]
    blue = (x // 7 + y // 5) % 2 * 200 + (x * 31 + y * 17) % 56
    if mode == "L":
        return Image.fromarray(blue.astype(np.uint8))
    planes = [x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), blue, (x + 2 * y) % 256]
    return Image.fromarray(np.stack(planes[: len(mode)], axis=-1).astype(np.uint8))

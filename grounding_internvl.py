"""Boxes in answers: reading them, turning them into pixels, drawing them; and writing them for questions.

InternVL writes `<ref>label</ref><box>[[x1, y1, x2, y2]]</box>` with whole numbers in 0-1000 of the original image's
sides. Models write other things too: no tags, single brackets, decimals in 0-1, quadrilaterals. Whatever stands in a
text, reading it is no error. How answers are scored is `evaluation/boxes.py`, which reads numbers with this file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .tiling_internvl import load_image, to_rgb

Box = tuple[float, float, float, float]

GROUNDING_PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: <ref>{}</ref>"
"""The question of the InternVL papers' RefCOCO evaluation (original: internvl_chat/eval/refcoco)."""

FULL_SCALE = 1000
_NUMBER = r"\s*(-?(?:\d{1,9}(?:\.\d{0,20})?|\.\d{1,20}))\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]", re.ASCII)
_PAIRS = r",\s*".join([rf"\[{_NUMBER},{_NUMBER}\]\s*"] * 4)
_QUAD = re.compile(rf"\[{','.join([_NUMBER] * 8)}\]|{_PAIRS}", re.ASCII)
_MARKUP = re.compile(r"</?(?:ref|box|quad)>")
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000", "#000075")


@dataclass(frozen=True)
class Grounding:
    """What an answer points at.

    Attributes:
        boxes: (label, (x1, y1, x2, y2) in pixels of the image) in order, clamped to it; the label is "" where the
            answer gave none.
        text: The answer, with its markup.
        dropped: Boxes left out because nothing of them lies in the image.
    """

    boxes: list[tuple[str, Box]]
    text: str
    dropped: int = 0


# ------------------------------------------------------------------------------------------------------------- reading


def read_boxes(text: str) -> list[Box]:
    """All groups of four numbers in square brackets, in order, as they are written (0-1, 0-1000 or pixels).

    Nested brackets, `<box>` tags and text around them do not matter. Boxes without area are kept: what they are worth
    is the caller's to say.
    """
    return [_as_box(match.groups()) for match in _BOX.finditer(text)]


def relative_box(box: Box) -> Box:
    """A box in 0-1: divided by 1000 where its four numbers sum to 4 or more (rule of chat/eval/refcoco)."""
    return _as_box(value / FULL_SCALE for value in box) if sum(box) >= 4 else box


def parse_grounding(text: str, width: float, height: float) -> Grounding:
    """The boxes of an answer in pixels of an image.

    A box belongs to the `<ref>` before it; one without belongs to none. Tags may be missing or unclosed. A
    quadrilateral (`<quad>`, or eight numbers) counts as the box around it. All numbers of an answer are of one scale:
    0-1 where all are below 2 (as fractions that overshoot a little), else 0-1000. Corners in the wrong order are put
    right; what lies outside the image is cut off.

    Args:
        text: What the model wrote, decoded with its markup (`keep_markup=True`).
        width, height: Of the image, in pixels.
    """
    found = list(_labelled_shapes(text))
    fractions = all(abs(value) < 2 for _, values in found for value in values)
    scale = 1 if fractions else FULL_SCALE
    boxes = [(label, _in_pixels(values, scale, width, height)) for label, values in found]
    kept = [(label, box) for label, box in boxes if box[2] > box[0] and box[3] > box[1]]
    return Grounding(kept, text, len(boxes) - len(kept))


def _labelled_shapes(text: str) -> Iterator[tuple[str, list[float]]]:
    """(label, its 4 or 8 numbers) in order."""
    for i, part in enumerate(text.split("<ref>")):
        label, closed, rest = part.partition("</ref>") if i else ("", "", part)
        if i and not closed:  # cut at the first tag or bracket
            label = re.split(r"[<\[]", part, maxsplit=1)[0]
            rest = part[len(label) :]
        label = " ".join(_MARKUP.sub(" ", label).split())
        shapes = [(match.start(), match.groups()) for pattern in (_BOX, _QUAD) for match in pattern.finditer(rest)]
        for _, numbers in sorted(shapes):
            yield label, [float(number) for number in numbers if number is not None]


def _in_pixels(values: list[float], scale: float, width: float, height: float) -> Box:
    xs = [min(max(value / scale, 0.0), 1.0) * width for value in values[0::2]]
    ys = [min(max(value / scale, 0.0), 1.0) * height for value in values[1::2]]
    return min(xs), min(ys), max(xs), max(ys)


def _as_box(values: Iterable[str | float]) -> Box:
    x1, y1, x2, y2 = map(float, values)
    return x1, y1, x2, y2


def grounding_question(phrase: str) -> str:
    """The question that asks where something is; a phrase that holds a `<ref>` already is the question itself."""
    return phrase if "<ref>" in phrase else GROUNDING_PROMPT.format(phrase)


# ------------------------------------------------------------------------------------------------------------- writing


def box_text(boxes: Iterable[Sequence[float]], width: float, height: float, label: str = "") -> str:
    """Boxes in pixels as InternVL writes them, for questions and training data; `parse_grounding` reads them back.

    Args:
        boxes: (x1, y1, x2, y2) each, corners in any order.
        width, height: Of the original image, in pixels.
        label: What stands in `<ref>` before them; "" for no `<ref>`.

    Returns:
        `<ref>label</ref><box>[[x1, y1, x2, y2], ...]</box>`, whole numbers from 0 to 1000.

    Raises:
        ValueError: no boxes, a box that is not four numbers within the image, or an image without area.
    """
    if not (width > 0 and height > 0):
        raise ValueError(f"width and height must be positive, got {width} and {height}")
    corners = [_thousandths(box, width, height) for box in boxes]
    if not corners:
        raise ValueError("boxes is empty")
    return f"<ref>{label}</ref>" * bool(label) + f"<box>{corners}</box>"


def _thousandths(box: Sequence[float], width: float, height: float) -> list[int]:
    if len(box) != 4 or not all(0 <= value <= (width, height)[i % 2] for i, value in enumerate(box)):
        raise ValueError(f"a box must be [x1, y1, x2, y2] in pixels of the {width} x {height} image, got {list(box)}")
    values = [round(FULL_SCALE * value / (width, height)[i % 2]) for i, value in enumerate(box)]
    return [min(values[0::2]), min(values[1::2]), max(values[0::2]), max(values[1::2])]


# ------------------------------------------------------------------------------------------------------------- drawing


def draw_boxes(image: Any, grounding: Grounding, font: Any = None) -> Image.Image:
    """A copy of an image with boxes and their labels drawn in, one colour for each label.

    Args:
        image: PIL image, path, or anything that `load_image` takes; the one that the boxes are of.
        grounding: From `ground` or `parse_grounding`.
        font: A PIL font, or the path of a TrueType file. Pillow's own has Latin letters only: with it, others stand as
            `?` in the picture; give a CJK font to see Chinese labels.
    """
    picture = to_rgb(load_image(image)).copy()
    pen = ImageDraw.Draw(picture)
    size = max(10, round(min(picture.size) / 24))
    font = ImageFont.truetype(font, size) if isinstance(font, str) else font
    own = font is None
    font = ImageFont.load_default(size) if own else font
    line = max(2, max(picture.size) // 150)  # still seen where a viewer shrinks a large picture to its window
    colours: dict[str, str] = {}
    for label, box in grounding.boxes:
        colour = colours.setdefault(label, _COLOURS[len(colours) % len(_COLOURS)])
        # The far edge of a box is the border behind its last pixel.
        far = (max(box[0], box[2] - 1), max(box[1], box[3] - 1))
        pen.rectangle((box[0], box[1], *far), outline=colour, width=line)
        if label:
            _draw_label(pen, _printable(label) if own else label, box, colour, font, picture.size)
    return picture


def _draw_label(pen: Any, label: str, box: Box, colour: str, font: Any, size: tuple[int, int]) -> None:
    """White letters on the box's colour: above the box, inside it where there is no room, always within the image."""
    label = kept = " ".join(label.split())
    while kept and pen.textlength(label, font=font) > size[0] - 4:
        kept = kept[: len(kept) * 3 // 4]
        label = f"{kept}..."
    if not kept:
        return
    left, top, right, bottom = pen.textbbox((0, 0), label, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = max(0.0, min(box[0], size[0] - width))
    y = box[1] - height if box[1] >= height else max(0.0, min(box[1], size[1] - height))
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    pen.text((x + 2 - left, y + 2 - top), label, fill="white", font=font)


def _printable(label: str) -> str:
    """A label in the letters that Pillow's own font has."""
    return "".join(letter if letter.isprintable() and ord(letter) < 0x180 else "?" for letter in label)

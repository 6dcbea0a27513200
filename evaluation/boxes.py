"""Boxes in text: reading them, their overlap, and the rule by which RefCOCO answers are scored.

`parse_boxes` is strict: whole numbers, which InternVL writes in 0-1000. `read_boxes` (`grounding_internvl.py`) takes
what models of other habits write: decimals, nested or missing brackets' partners, any scale. Whatever stands in a
text, reading it is no error.
"""

from __future__ import annotations

import re

from ..grounding_internvl import Box as Box
from ..grounding_internvl import read_boxes as read_boxes
from ..grounding_internvl import relative_box as relative_box

NO_BOX: Box = (0.0, 0.0, 0.0, 0.0)
GROUNDING_HIT = 0.5  # least IoU of a correct answer, inclusive

_NUMBER = r"\s*(\d{1,4})\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]", re.ASCII)


def parse_boxes(text: str) -> list[Box]:
    """Boxes [x1, y1, x2, y2] in `text`, in order, those without area left out; [] where there is none."""
    boxes = [tuple(map(float, match.groups())) for match in _BOX.finditer(text)]
    return [box for box in boxes if box[2] > box[0] and box[3] > box[1]]


def box_iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2), 0 to 1; 0 where the union has no area."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0.0, width) * max(0.0, height)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)) - shared
    return shared / union if union > 0 else 0.0


def grounding_box(text: str, width: float, height: float) -> Box:
    """The first box of an answer in pixels of an image (rule of chat/eval/refcoco); `NO_BOX` where there is none.

    Args:
        text: The answer; its box is in 0-1 or 0-1000.
        width: Of the image, in pixels.
        height: Of the image, in pixels.
    """
    boxes = read_boxes(text)
    if not boxes:
        return NO_BOX
    x1, y1, x2, y2 = relative_box(boxes[0])
    return x1 * width, y1 * height, x2 * width, y2 * height


def grounding_hit(text: str, gold: Box, width: float, height: float, threshold: float = GROUNDING_HIT) -> bool:
    """Precision at 1 of RefCOCO for one answer: IoU with `gold` (xyxy, pixels) of at least `threshold`."""
    return box_iou(grounding_box(text, width, height), gold) >= threshold

"""Pictures that the demo page shows: tiles as the model gets them, small copies of uploads, boxes of answers.

Nothing here decides how an image is cut: tiles are read back from the tensors that the model is given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..grounding_internvl import draw_boxes, parse_grounding

SHOWN_SIDE = 1024  # longest side of what is sent to the browser, pixels
_GAP = 8
_MARKUP = re.compile(r"</?(?:ref|box|quad)>")


def shown_copy(image: Image.Image, side: int = SHOWN_SIDE, least: int = 0) -> Image.Image:
    """An RGB copy with at most `side` pixels a side; one with all sides below `least` is enlarged, pixels visible."""
    longest = max(image.size)
    if longest > side:
        size = tuple(max(1, round(edge * side / longest)) for edge in image.size)
        return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)  # type: ignore[arg-type]
    if longest < least:
        factor = -(-least // longest)
        return image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image.convert("RGB")


def tile_pictures(tiles: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> list[Image.Image]:
    """Tiles (n, 3, S, S), normalised with `mean` and `std` per channel, as RGB pictures of S x S pixels."""
    shape = (1, 3, 1, 1)
    pixels = tiles.float() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    levels = (pixels * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(level)) for level in levels]


def tile_sheet(tiles: Sequence[Image.Image], grid: tuple[int, int]) -> Image.Image:
    """The tiles of an image laid out as they were cut; one more than the grid has is the thumbnail, set apart.

    Args:
        tiles: Of one size, in the model's order.
        grid: (columns, rows).
    """
    columns, rows = grid
    extra = len(tiles) - columns * rows
    edge = min(tiles[0].width, max(96, SHOWN_SIDE // (columns + extra)))
    edge *= -(-160 // edge)  # tiles of tiny models: whole pixels, large enough to be seen
    step = edge + _GAP
    width = (columns + extra) * step - _GAP + extra * 3 * _GAP
    sheet = Image.new("RGB", (width, rows * step - _GAP), "white")
    for index, tile in enumerate(tiles[: columns * rows]):
        sheet.paste(_scaled(tile, edge), (index % columns * step, index // columns * step))
    if extra:
        sheet.paste(_scaled(tiles[-1], edge), (width - edge, (sheet.height - edge) // 2))
        line = width - edge - 2 * _GAP
        ImageDraw.Draw(sheet).line([(line, 0), (line, sheet.height)], fill="#b0b7c3", width=2)
    return sheet


def _scaled(tile: Image.Image, edge: int) -> Image.Image:
    kind = Image.Resampling.NEAREST if edge > tile.width else Image.Resampling.LANCZOS
    return tile.resize((edge, edge), kind)


def answer_text(answer: str) -> str:
    """An answer for people to read: without the tags of references and boxes."""
    if not _MARKUP.search(answer):
        return answer
    spaced = re.sub(r"(</ref>)\s*(<box>)", r"\1 \2", answer)
    return _MARKUP.sub("", spaced).replace("[[", "[").replace("]]", "]").strip()


def boxed_picture(image: Image.Image, answer: str) -> Image.Image | None:
    """A copy of the image with the boxes of an answer drawn in, large enough to be looked at; None without boxes.

    Numbers in brackets alone are no box here: an answer may list numbers.
    """
    if "<box>" not in answer and "<quad>" not in answer:
        return None
    picture = shown_copy(image, least=640)
    grounding = parse_grounding(answer, *picture.size)
    return draw_boxes(picture, grounding) if grounding.boxes else None

"""Draws the media of a row: each picture with its tile grid, and beside it the tiles as the model gets them.

Tiles are made from `pixel_values` by undoing the normalisation, so augmentation shows. Pillow only.
"""

from __future__ import annotations

from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..tiling_internvl import find_grid
from .pair_preview import PairPreview
from .preview import Preview

_MARGIN, _GAP, _LINE = 12, 4, 18
_LINES = "#e6007e"
_SIDES = (96, 224)
_PICTURE = 448
_FRAMES_PER_ROW = 8
_LEAST_WIDTH = 360  # room for a title


def denormalize(pixel_values: torch.Tensor, image_processor: Any) -> np.ndarray:
    """Tiles as uint8 pixels.

    Args:
        pixel_values: (tiles, 3, S, S), float.
        image_processor: Whose `image_mean` and `image_std` were used.

    Returns:
        (tiles, S, S, 3); exactly the pixels that were normalised, if that was done in float32.
    """
    mean, std = (torch.tensor(getattr(image_processor, f"image_{name}"))[:, None, None] for name in ("mean", "std"))
    pixels = (pixel_values.float().cpu() * std + mean) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()


def grid_of(size: tuple[int, int], tiles: int, image_processor: Any) -> tuple[int, int]:
    """(columns, rows) of a picture that became `tiles` tiles, a thumbnail among them if the processor makes one.

    The grid was the best of all those allowed, so it is the best of those with its number of tiles.
    """
    cells = tiles - (image_processor.use_thumbnail and tiles > 1)
    return find_grid(*size, cells, cells, image_processor.image_size, no_upscale=image_processor.no_upscale)


def draw_preview(preview: Preview | PairPreview, image_processor: Any) -> Image.Image | None:
    """One picture of all media of a row; None for a row without any.

    Args:
        preview: The row.
        image_processor: That made its tiles.
    """
    if not preview.pictures:
        return None
    tiles = iter(map(Image.fromarray, denormalize(preview.features["pixel_values"], image_processor)))
    each = zip(preview.owners, preview.pictures, preview.tiles, strict=True)
    strips, number = [], 0
    for owner, group in groupby(each, itemgetter(0)):
        if owner:
            strips.append(_draw_frames([next(tiles) for _ in group], owner))
            continue
        for _, picture, count in group:
            number += 1
            grid = grid_of(picture.size, count, image_processor)
            strips.append(_draw_picture(picture, list(islice(tiles, count)), grid, number))
    return _stack(strips)


def _draw_picture(picture: Image.Image, tiles: list[Image.Image], grid: tuple[int, int], number: int) -> Image.Image:
    """The picture with its grid on the left, its tiles on the right, the thumbnail below them."""
    original, side = _with_grid(picture.convert("RGB"), grid), _side_of(tiles[0])
    columns, rows = grid
    blocks = [("tiles", _sheet(tiles[: columns * rows], columns, side))]
    blocks += [("thumbnail", _scaled(tile, side)) for tile in tiles[columns * rows :]]
    title = f"picture {number}: {picture.width}x{picture.height}, {columns}x{rows} tiles"
    left = original.width + 2 * _MARGIN
    height = max(original.height + _LINE, sum(block.height + _LINE for _, block in blocks))
    strip = _new_strip(left + max(block.width for _, block in blocks), _LINE + height, title)
    strip.paste(original, (0, 2 * _LINE))
    top = _LINE
    for name, block in blocks:
        _write(strip, (left, top), name)
        strip.paste(block, (left, top + _LINE))
        top += block.height + _LINE
    return strip


def _with_grid(picture: Image.Image, grid: tuple[int, int]) -> Image.Image:
    scale = _PICTURE / max(picture.size)
    size = tuple(max(1, round(edge * scale)) for edge in picture.size)
    picture = picture.resize(size, Image.Resampling.LANCZOS)  # type: ignore[arg-type]
    pen = ImageDraw.Draw(picture)
    columns, rows = grid
    for i in range(1, columns):
        pen.line([(picture.width * i / columns, 0), (picture.width * i / columns, picture.height)], _LINES, 2)
    for i in range(1, rows):
        pen.line([(0, picture.height * i / rows), (picture.width, picture.height * i / rows)], _LINES, 2)
    pen.rectangle([0, 0, picture.width - 1, picture.height - 1], outline=_LINES, width=2)
    return picture


def _draw_frames(frames: list[Image.Image], number: int) -> Image.Image:
    """Frames of a video as the model gets them, under the names that they have in the prompt."""
    side = _side_of(frames[0])
    columns = min(_FRAMES_PER_ROW, len(frames))
    rows = -(-len(frames) // columns)
    title = f"video {number}: {len(frames)} frames, one tile each"
    strip = _new_strip(columns * (side + _GAP) - _GAP, _LINE + rows * (side + _LINE), title)
    for i, frame in enumerate(frames):
        left, top = (i % columns) * (side + _GAP), _LINE + (i // columns) * (side + _LINE)
        _write(strip, (left, top), f"Frame-{i + 1}")
        strip.paste(_scaled(frame, side), (left, top + _LINE))
    return strip


def _new_strip(width: int, height: int, title: str) -> Image.Image:
    strip = Image.new("RGB", (max(width, _LEAST_WIDTH), height), "white")
    _write(strip, (0, 0), title, "black", 14)
    return strip


def _write(image: Image.Image, place: tuple[int, int], text: str, fill: str = "dimgray", size: int = 12) -> None:
    ImageDraw.Draw(image).text(place, text, fill=fill, font=ImageFont.load_default(size))


def _sheet(tiles: list[Image.Image], columns: int, side: int) -> Image.Image:
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (side + _GAP) - _GAP, rows * (side + _GAP) - _GAP), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(_scaled(tile, side), ((i % columns) * (side + _GAP), (i // columns) * (side + _GAP)))
    return sheet


def _side_of(tile: Image.Image) -> int:
    """Edge at which tiles are shown: their own, within limits; small ones are enlarged by a whole factor."""
    low, high = _SIDES
    return min(high, tile.width * -(-low // tile.width))


def _scaled(tile: Image.Image, side: int) -> Image.Image:
    larger = side > tile.width
    return tile.resize((side, side), Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)


def _stack(strips: list[Image.Image]) -> Image.Image:
    width = max(strip.width for strip in strips) + 2 * _MARGIN
    sheet = Image.new("RGB", (width, sum(strip.height + _MARGIN for strip in strips) + _MARGIN), "white")
    top = _MARGIN
    for strip in strips:
        sheet.paste(strip, (_MARGIN, top))
        top += strip.height + _MARGIN
    return sheet

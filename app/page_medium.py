"""An image or a video of a conversation: its tiles, how it stands in the prompt, and how the page shows it.

The tiles are those of the model's own image processor; only the numbers that describe them are worked out here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..conversation import IMAGE_PLACEHOLDER
from ..frames_internvl import frame_prompt
from ..tiling_internvl import find_grid
from .page_media import Upload
from .page_view import shown_copy, tile_pictures, tile_sheet


@dataclass(frozen=True, eq=False)
class Medium:
    """An upload, ready for the model and for the page.

    Attributes:
        name: Of the file.
        picture: A small copy of the image, or of the first frame.
        tiles: (tiles, 3, S, S) for the model, frames one after the other.
        num_patches: Tiles of the image, or 1 for each frame.
        views: Pictures of what the model sees, each with its caption.
        prompt: The lines that stand for it before a question.
        is_video: Whether it is one.
    """

    name: str
    picture: Image.Image
    tiles: torch.Tensor
    num_patches: tuple[int, ...]
    views: tuple[tuple[Image.Image, str], ...]
    prompt: str
    is_video: bool = False

    @property
    def tile_count(self) -> int:
        """Tiles in all."""
        return len(self.tiles)


def make_medium(upload: Upload, processor: Any, max_tiles: int) -> Medium:
    """Cuts an upload into tiles.

    Args:
        upload: What was read.
        processor: The model's; its own budgets over several images do not apply, since they come one by one.
        max_tiles: Most tiles of an image, thumbnail not counted.
    """
    images = processor.image_processor
    options: dict[str, Any] = {"dynamic_image_size": False} if upload.is_video else _tiling(images, max_tiles)
    output = images(list(upload.pictures), max_total_patches=None, divide_patches_by_images=False, **options)
    tiles, counts = output["pixel_values"], tuple(output["num_patches"].tolist())
    shown = tile_pictures(tiles, images.image_mean, images.image_std)
    tokens = processor.tokens_per_tile(len(tiles))
    if upload.is_video:
        views = tuple(
            (shown_copy(tile, least=160), _frame_caption(i, upload.seconds, tokens[i])) for i, tile in enumerate(shown)
        )
        prompt = frame_prompt(len(counts))
    else:
        grid = image_grid(upload.pictures[0].size, images, max_tiles)
        views = ((tile_sheet(shown, grid), _image_caption(upload, grid, len(tiles), sum(tokens))),)
        prompt = f"{IMAGE_PLACEHOLDER}\n"
    return Medium(upload.name, shown_copy(upload.pictures[0]), tiles, counts, views, prompt, upload.is_video)


def image_grid(size: tuple[int, int], images: Any, max_tiles: int) -> tuple[int, int]:
    """(columns, rows) that an image processor cuts an image of this (width, height) into."""
    if not images.dynamic_image_size:
        return 1, 1
    options = _tiling(images, max_tiles)
    low, high = options["min_dynamic_patch"], options["max_dynamic_patch"]
    return find_grid(*size, low, high, images.image_size, no_upscale=images.no_upscale)


def _tiling(images: Any, max_tiles: int) -> dict[str, int]:
    return {"min_dynamic_patch": min(images.min_dynamic_patch, max_tiles), "max_dynamic_patch": max_tiles}


def _image_caption(upload: Upload, grid: tuple[int, int], tiles: int, tokens: int) -> str:
    width, height = upload.pictures[0].size
    thumbnail = " + thumbnail" if tiles > grid[0] * grid[1] else ""
    plural = "s" if tiles > 1 else ""
    return f"{upload.name}: {width} x {height} px, grid {grid[0]} x {grid[1]}{thumbnail} = {tiles} tile{plural}, " + (
        f"{tokens} tokens"
    )


def _frame_caption(index: int, seconds: tuple[float, ...] | None, tokens: int) -> str:
    moment = "" if seconds is None else f" at {seconds[index]:.1f} s"
    return f"Frame {index + 1}{moment}: 1 tile, {tokens} tokens"

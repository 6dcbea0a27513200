"""Where a language model looks while it answers: attention to visual tokens, mapped back to pixels of the image.

The prompt runs with the model's own attention; only the few tokens that are asked about run with eager attention, on
top of the cache, so that no weights of the whole prompt are ever held. Attention says what was read, not why.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import DynamicCache

from .generation_internvl import without_checkpointing


@dataclass(frozen=True)
class Tiling:
    """How an image was cut.

    Attributes:
        size: Width and height of the original image in pixels.
        grid: Columns and rows of its tiles.
        has_thumbnail: Whether one more tile shows the whole image.
        padded: Whether the image was centred on a square first (`pad2square`).
    """

    size: tuple[int, int]
    grid: tuple[int, int] = (1, 1)
    has_thumbnail: bool = False
    padded: bool = False

    @property
    def tiles(self) -> int:
        """Number of tiles, with the thumbnail."""
        return self.grid[0] * self.grid[1] + self.has_thumbnail

    @classmethod
    def of(cls, image_processor: Any, size: tuple[int, int], **overrides: Any) -> Tiling:
        """What an `InternVLImageProcessor` does with an image of `size` (width, height)."""
        grid = image_processor.grids_per_image([size], **overrides)[0]
        thumbnail = image_processor.num_tiles(*size, **overrides) > grid[0] * grid[1]
        settings = {name: overrides.get(name, getattr(image_processor, name)) for name in _PADDING}
        return cls(size, grid, thumbnail, settings["pad2square"] and not settings["dynamic_image_size"])

    def to_pixels(self, views: torch.Tensor, thumbnail: bool = True) -> torch.Tensor:
        """Spreads what lies on the tokens of tiles over the pixels that they show.

        A token's amount is shared out by area, so that sums are kept (but for what lies on padding).

        Args:
            views: (tiles, h, w), one number per visual token, the thumbnail last.
            thumbnail: Add the thumbnail's numbers to those of the tiles.

        Returns:
            (height, width) float64.

        Raises:
            ValueError: another number of tiles than the tiling's.
        """
        if len(views) != self.tiles:
            raise ValueError(f"views has {len(views)} tiles, the tiling {self.tiles} with its thumbnail.")
        columns, rows = self.grid
        _, height, width = views.shape
        tiles = views[: columns * rows].reshape(rows, columns, height, width)
        pixels = self._spread(tiles.permute(0, 2, 1, 3).reshape(rows * height, columns * width))
        return pixels + self._spread(views[-1]) if thumbnail and self.has_thumbnail else pixels

    def _spread(self, cells: torch.Tensor) -> torch.Tensor:
        width, height = self.size
        if not self.padded:
            return _shares(height, cells.shape[0]) @ cells.double().cpu() @ _shares(width, cells.shape[1]).T
        edge = max(self.size)
        square = _shares(edge, cells.shape[0]) @ cells.double().cpu() @ _shares(edge, cells.shape[1]).T
        left, top = (edge - width) // 2, (edge - height) // 2
        return square[top : top + height, left : left + width]


_PADDING = ("pad2square", "dynamic_image_size")


def _shares(pixels: int, cells: int) -> torch.Tensor:
    """(pixels, cells): the share of each cell's extent that each pixel covers; columns sum to 1."""
    borders = torch.arange(cells + 1, dtype=torch.float64) * pixels / cells
    edges = torch.arange(pixels + 1, dtype=torch.float64)
    lower = torch.maximum(edges[:-1, None], borders[None, :-1])
    upper = torch.minimum(edges[1:, None], borders[None, 1:])
    return (upper - lower).clamp(min=0) * cells / pixels


@dataclass(frozen=True)
class AttentionMap:
    """Attention to an image, averaged over heads and layers.

    Attributes:
        pixels: (height, width) of the original image; averaged over the tokens, tiles and thumbnail added up. Its sum
            is the share of all attention that goes to the image.
        tiles: (tiles, h, w) averaged over the tokens, a number per visual token, tiles row by row, without thumbnail.
        thumbnail: (h, w), or None.
        tokens: The tokens that were about to be written; [""] for the first one of an answer that was not given.
        by_token: (tokens, tiles with thumbnail, h, w): the same for each of them.
        tiling: Of the image.
    """

    pixels: torch.Tensor
    tiles: torch.Tensor
    thumbnail: torch.Tensor | None
    tokens: list[str]
    by_token: torch.Tensor
    tiling: Tiling

    def token_pixels(self, index: int, thumbnail: bool = True) -> torch.Tensor:
        """`pixels` for one of `tokens`; without the thumbnail's part if `thumbnail` is False."""
        return self.tiling.to_pixels(self.by_token[index], thumbnail)

    def overlay(self, image: Image.Image, pixels: torch.Tensor | None = None) -> Image.Image:
        """The image, dark where it was not looked at; `pixels` from `token_pixels` instead of the average."""
        pixels = self.pixels if pixels is None else pixels
        light = (pixels / pixels.max().clamp(min=1e-30)).numpy()[..., None]
        return Image.fromarray((np.asarray(image.convert("RGB")) * (0.25 + 0.75 * light)).astype(np.uint8))


def attention_map_of(
    weights: torch.Tensor, tokens: Sequence[str], tiling: Tiling, transposed: bool = False
) -> AttentionMap:
    """An `AttentionMap` from attention to visual tokens.

    Args:
        weights: (tokens, visual tokens), in the order in which they stand in the prompt.
        tokens: Texts, one per row.
        tiling: Of the image.
        transposed: Whether the tokens of a tile lie column by column (`ps_version` "v1").

    Raises:
        ValueError: the visual tokens do not make square tiles of the tiling's number.
    """
    side = round((weights.shape[1] / tiling.tiles) ** 0.5)
    if side * side * tiling.tiles != weights.shape[1]:
        raise ValueError(
            f"{weights.shape[1]} visual tokens do not fit {tiling.tiles} tile(s) of a {tiling.grid} grid; give the "
            "tiling with which pixel_values was made."
        )
    by_token = weights.reshape(len(weights), tiling.tiles, side, side)
    by_token = by_token.transpose(-1, -2) if transposed else by_token
    mean = by_token.mean(0)
    thumbnail = mean[-1] if tiling.has_thumbnail else None
    tiles = mean[: tiling.grid[0] * tiling.grid[1]]
    return AttentionMap(tiling.to_pixels(mean), tiles, thumbnail, list(tokens), by_token, tiling)


# ----------------------------------------------------------------------------------------------------------- measuring


def attention_rows(
    language_model: Any, embeds: torch.Tensor, first: int, last: int, keys: slice, layers: Sequence[int] | None = None
) -> torch.Tensor:
    """Attention of the positions `first` to `last`, averaged over heads and layers.

    Args:
        language_model: A causal language model of transformers, whatever attention it was loaded with.
        embeds: (1, L, D) of the whole prompt.
        first, last: Positions, both included.
        keys: The positions attended to.
        layers: Numbers of the layers to average, negative ones from the end; None for all.

    Returns:
        (last - first + 1, keys) float32.

    Raises:
        ValueError: a layer does not exist or has no attention weights.
    """
    decoder = language_model.get_decoder()
    cache = DynamicCache()  # no sliding windows in it: a full row of weights for every layer
    with without_checkpointing(language_model):
        if first:
            decoder(inputs_embeds=embeds[:, :first], past_key_values=cache, use_cache=True)
        with _eager(language_model), _recorded(decoder, layers) as records:
            decoder(inputs_embeds=embeds[:, first : last + 1], past_key_values=cache, use_cache=True)
    if not records:
        raise ValueError("No layer gave attention weights: the language model has none, or layers is empty.")
    return torch.stack([weights[0, :, :, keys].float().mean(0).cpu() for weights in records]).mean(0)


@contextmanager
def _eager(language_model: Any) -> Iterator[None]:
    """The only attention that returns its weights, for as long as it is needed."""
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        language_model.set_attn_implementation(before)


@contextmanager
def _recorded(decoder: Any, layers: Sequence[int] | None) -> Iterator[list[torch.Tensor]]:
    """Collects the attention weights (1, heads, queries, keys) of layers, as far as this thread runs them."""
    modules = [getattr(layer, "self_attn", None) for layer in decoder.layers]
    count = len(modules)
    wanted = range(count) if layers is None else layers
    if any(not -count <= i < count for i in wanted):
        raise ValueError(f"layers={list(wanted)}, but the language model has {count}: choose from 0 to {count - 1}.")
    records: list[torch.Tensor] = []
    thread = threading.get_ident()

    def keep(module: Any, args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, torch.Tensor) and threading.get_ident() == thread:
            records.append(weights)

    handles = [modules[i].register_forward_hook(keep) for i in wanted if modules[i] is not None]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()

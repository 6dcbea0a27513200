"""Random JPEG compression of tiles, the augmentation of the published recipes (InternVL 2.5 report, section 3.1).

A quality is drawn for each tile, after tiling and before normalisation, as in the original (`train/dataset.py`,
`build_transform` with `is_train`). Draws come from a generator that belongs to one sample, so that they do not depend
on workers, ranks or the order of loading.
"""

from __future__ import annotations

from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image

JPEG_QUALITIES = (75, 100)


class Take(NamedTuple):
    """One occurrence of a row in a run; everything random about it is a function of this.

    Attributes:
        seed: Of the run.
        row: The row.
        copy: Its how many-th occurrence in the epoch.
        epoch: The epoch.
    """

    seed: int = 0
    row: int = 0
    copy: int = 0
    epoch: int = 0

    def generator(self) -> np.random.Generator:
        """For what changes from one occurrence to the next."""
        return np.random.default_rng((*self, 1))

    def fixed_generator(self) -> np.random.Generator:
        """For what belongs to the row and stays: how long it is."""
        return np.random.default_rng((self.seed, self.row, 0, 0, 0))


class RandomJPEG:
    """Encodes a tile as JPEG and decodes it again; a `tile_transform` of `InternVLImageProcessor`.

    Args:
        generator: Draws the quality of each tile.
        qualities: Lowest and highest quality, inclusive, drawn uniformly.

    Raises:
        ValueError: qualities outside 1...100, or in the wrong order.
    """

    def __init__(self, generator: np.random.Generator, qualities: tuple[int, int] = JPEG_QUALITIES) -> None:
        low, high = qualities
        if not 1 <= low <= high <= 100:
            raise ValueError(f"qualities must be 1 <= low <= high <= 100, got {qualities}")
        self.generator = generator
        self.qualities = qualities

    def __call__(self, tile: Image.Image) -> Image.Image:
        """The tile after compression: RGB of the same size."""
        low, high = self.qualities
        buffer = BytesIO()
        tile.save(buffer, format="JPEG", quality=int(self.generator.integers(low, high, endpoint=True)))
        return Image.open(buffer).convert("RGB")

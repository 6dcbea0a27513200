"""Random JPEG: it compresses every tile on its own, with qualities of a uniform draw that belongs to the sample."""

from collections import Counter
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from internvl_hub.data.augmentation import RandomJPEG, Take
from internvl_hub.image_processing_internvl import InternVLImageProcessor
from internvl_hub.tests.training import tiny_models as tiny

# Mean and standard deviation of ImageNet, the default normalisation.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def compressed(tile: Image.Image, quality: int) -> Image.Image:
    buffer = BytesIO()
    tile.save(buffer, format="JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def test_tiles_are_compressed_after_tiling_and_before_normalisation() -> None:
    """Against tiles cut by hand from the plain output."""
    processor = InternVLImageProcessor(image_size=28, max_dynamic_patch=4, use_thumbnail=True)
    image, qualities = tiny.picture(3, (70, 60)), np.random.default_rng(5).integers(75, 100, 5, endpoint=True)
    plain = processor(image)["pixel_values"]
    assert len(plain) == 5
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    expected = []
    for tile, quality in zip(plain, qualities, strict=True):
        pixels = ((tile * std + mean) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        back = np.asarray(compressed(Image.fromarray(pixels), int(quality)))
        expected.append((torch.tensor(back).permute(2, 0, 1).float() / 255 - mean) / std)
    found = processor(image, tile_transform=RandomJPEG(np.random.default_rng(5)))["pixel_values"]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-6)
    assert not torch.equal(found, plain)


def test_qualities_are_uniform_from_75_to_100() -> None:
    drawn: list[int] = []

    class Spy(Image.Image):
        def save(self, buffer, format, quality):  # noqa: A002
            drawn.append(quality)
            Image.new("RGB", (8, 8)).save(buffer, format=format, quality=quality)

    transform = RandomJPEG(np.random.default_rng(0))
    for _ in range(5200):
        transform(Spy())
    counts = Counter(drawn)
    assert set(counts) == set(range(75, 101))
    # 25 degrees of freedom: chi-squared is below 52.6 with probability 0.999.
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 52.6


def test_streams_belong_to_the_take() -> None:
    def draw(generator: np.random.Generator) -> tuple[int, ...]:
        return tuple(generator.integers(0, 2**31, 4).tolist())

    takes = [Take(), Take(1), Take(0, 1), Take(0, 0, 1), Take(0, 0, 0, 1), Take(0, 1, 1)]
    assert [draw(take.generator()) for take in takes] == [draw(Take(*take).generator()) for take in takes]
    assert len({draw(take.generator()) for take in takes} | {draw(take.fixed_generator()) for take in takes}) == 6 + 3
    assert draw(Take(3, 4, 1, 7).fixed_generator()) == draw(Take(3, 4).fixed_generator())


@pytest.mark.parametrize("qualities", [(0, 50), (90, 80), (80, 101)])
def test_bad_qualities(qualities: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="1 <= low <= high <= 100"):
        RandomJPEG(np.random.default_rng(0), qualities)

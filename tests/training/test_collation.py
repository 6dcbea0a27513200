"""Batches: padding by length, weights per label, one dummy tile where there is no image."""

import pytest
import torch

from internvl_hub.tests.training import tiny_models as tiny
from internvl_hub.training.collation import InternVLCollator


def row(ids: list[int], labels: list[int], tiles: int = 0) -> dict:
    pixels = torch.rand(tiles, 3, 28, 28) if tiles else None
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixel_values": pixels}


def test_padding_follows_lengths_not_ids() -> None:
    """Token 0 pads here and is a real token at the same time."""
    batch = InternVLCollator(0, 28)([row([5, 0, 0], [-100, 0, 0]), row([7], [-100])])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["input_ids"].tolist() == [[5, 0, 0], [7, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 0, 0], [-100, -100, -100]]


@pytest.mark.parametrize(("reduction", "weight"), [("token", 1.0), ("sample", 1 / 4), ("square", 1 / 2)])
def test_weights(reduction: str, weight: float) -> None:
    batch = InternVLCollator(0, 28, reduction)([row([1] * 6, [-100, -100, 2, 3, 4, 5]), row([1, 2], [-100, -100])])
    assert batch["loss_weight"].dtype == torch.float32
    assert batch["loss_weight"].tolist() == [[0, 0, weight, weight, weight, weight], [0] * 6]


def test_count_is_taken_before_the_shift() -> None:
    """A label at position 0 is never predicted, but it counts."""
    batch = InternVLCollator(0, 28, "sample")([row([1, 2], [1, 2])])
    assert batch["loss_weight"].tolist() == [[0.5, 0.5]]


def test_tiles_of_all_rows_in_order() -> None:
    first, second = row([1], [1], 2), row([1], [1], 3)
    batch = InternVLCollator(0, 28)([first, row([1], [1]), second])
    assert torch.equal(batch["pixel_values"], torch.cat([first["pixel_values"], second["pixel_values"]]))
    assert batch["image_flags"].tolist() == [1] * 5


def test_text_only_batch_has_one_dummy_tile() -> None:
    batch = InternVLCollator(0, 28)([row([1], [1]), row([2], [2])])
    assert batch["pixel_values"].shape == (1, 3, 28, 28)
    assert batch["image_flags"].tolist() == [0]


def test_padding_does_not_change_the_loss() -> None:
    rows, collate = [tiny.dataset(count=5)[i] for i in (0, 3, 4)], InternVLCollator(1, 28, "token")
    model = tiny.model().eval()
    together = model(**collate(rows)).loss
    losses = torch.stack([model(**collate([one])).loss for one in rows])
    counts = torch.tensor([int((one["labels"] != -100).sum()) for one in rows])
    assert torch.allclose(together, (losses * counts).sum() / counts.sum(), atol=1e-6)


def test_unknown_reduction() -> None:
    with pytest.raises(ValueError, match="loss_reduction must be one of"):
        InternVLCollator(0, 28, "mean")

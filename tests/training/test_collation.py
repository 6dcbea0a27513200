"""Batches: padding by length, packing, weights per label, one dummy tile where there is no image, what is left out."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from transformers import DataCollatorWithFlattening
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from internvl_hub.data.skipped import Skipped
from internvl_hub.losses_internvl import LOSS_REDUCTIONS
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


# ------------------------------------------------------------------------------------------------------------ packing

ROWS = ([5, 6, 7, 8], [-100, -100, 7, 8]), ([9], [9]), ([1, 2, 3], [1, 2, 3])
SKIPPED = Skipped("set", "rows.jsonl:3", "no such image")


def packed(rows: list[dict], reduction: str = "token", **options: int) -> dict:
    return InternVLCollator(0, 28, reduction, packing=True, **options)(rows)


def test_one_sequence_with_restarting_positions() -> None:
    batch = packed([row(*ids) for ids in ROWS])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 2, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 0, 1, 2]]
    assert find_packed_sequence_indices(batch["position_ids"]).tolist() == [[0, 0, 0, 0, 1, 2, 2, 2]]
    assert "attention_mask" not in batch
    assert batch["use_cache"] is False


def test_no_row_is_predicted_from_the_row_before() -> None:
    """The last two rows are learned from their first token on, as text without a prompt is."""
    batch = packed([row(*ids) for ids in ROWS], "sample")
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, -100, -100, 2, 3]]
    third = pytest.approx(1 / 3)  # the dropped label counts, as it does in a padded batch
    assert batch["loss_weight"].tolist() == [[0, 0, 0.5, 0.5, 0, 0, third, third]]
    assert batch["loss_weight"].dtype == torch.float32


def test_rows_are_not_written_to() -> None:
    rows = [row(*ids) for ids in ROWS]
    packed(rows), packed(rows[1:2])
    assert [one["labels"].tolist() for one in rows] == [labels for _, labels in ROWS]


def test_flash_attention_lengths_are_those_of_transformers() -> None:
    rows = [row(*ids) for ids in ROWS]
    batch = packed(rows)
    features = [{"input_ids": one["input_ids"].tolist(), "labels": one["labels"].tolist()} for one in rows]
    expected = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features)
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(batch[key], value) and batch[key].dtype == value.dtype, key
        else:
            assert batch[key] == value, key
    (boundaries, _), (longest, _) = prepare_fa_kwargs_from_position_ids(batch["position_ids"])
    assert batch["cu_seq_lens_q"].tolist() == boundaries.tolist()
    assert batch["max_length_q"] == int(longest)


@pytest.mark.parametrize("reduction", LOSS_REDUCTIONS)
def test_packs_of_the_original(reduction: str, fixtures: Path) -> None:
    """It weighs unlabelled positions too, which changes nothing."""
    reference = next(
        one for one in json.loads((fixtures / "packed_weights.json").read_text()) if one["reduction"] == reduction
    )
    bounds, labels = reference["cu_seqlens"], reference["labels"]
    rows = [row(list(range(a, b)), labels[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    batch = packed(rows, reduction)
    assert batch["labels"].tolist() == [labels]
    assert batch["position_ids"].tolist() == [reference["position_ids"]]
    assert batch["cu_seq_lens_q"].tolist() == bounds
    labelled = torch.tensor(labels) != -100
    expected = torch.tensor(reference["loss_weight"]) * labelled
    assert torch.equal(batch["loss_weight"][0], expected)


def test_packed_tiles_are_those_of_the_padded_batch() -> None:
    rows = [row([1, 2], [1, 2], 2), row([1], [1]), row([3], [3], 1)]
    pack, padded = packed(rows), InternVLCollator(0, 28)(rows)
    assert torch.equal(pack["pixel_values"], padded["pixel_values"])
    assert torch.equal(pack["image_flags"], padded["image_flags"])
    assert packed(rows[1:2])["image_flags"].tolist() == [0]


# -------------------------------------------------------------------------------------------- what is left out, counts


@pytest.mark.parametrize("packing", [False, True])
def test_left_out_rows_are_handed_on(packing: bool) -> None:
    collate = InternVLCollator(0, 28, packing=packing)
    rows = [row([1, 2], [-100, 2], 1), SKIPPED, row([3], [3])]
    batch, without = collate(rows), collate([rows[0], rows[2]])
    assert batch.pop("skipped") == [SKIPPED]
    assert batch.keys() == without.keys()
    assert all(torch.equal(torch.as_tensor(batch[key]), torch.as_tensor(without[key])) for key in batch)


@pytest.mark.parametrize("rows", [[], [SKIPPED, SKIPPED]], ids=["empty", "all-skipped"])
@pytest.mark.parametrize("packing", [False, True])
def test_filler(rows: list, packing: bool) -> None:
    """Two pad tokens that teach nothing and one black tile, so that every rank has a batch."""
    batch = InternVLCollator(7, 28, packing=packing)(rows)
    assert batch["input_ids"].tolist() == [[7, 7]]
    assert batch["labels"].tolist() == [[-100, -100]]
    assert batch["loss_weight"].tolist() == [[0, 0]]
    assert batch["pixel_values"].shape == (1, 3, 28, 28) and batch["image_flags"].tolist() == [0]
    assert batch.get("skipped", []) == rows
    assert (batch["num_samples"], batch["num_tokens"], batch["num_tiles"]) == (0, 0, 0)
    positions = ("position_ids", [[0, 1]]) if packing else ("attention_mask", [[1, 1]])
    assert batch[positions[0]].tolist() == positions[1]


def test_counts() -> None:
    rows = [row([1, 2, 3], [-100, 2, 3], 2), SKIPPED, row([3], [3])]
    names = ("num_samples", "num_tokens", "num_slots", "num_tiles")
    assert [InternVLCollator(0, 28)(rows)[name] for name in names] == [2, 4, 6, 2]  # padded to 2 x 3
    assert [packed(rows, max_packed_tokens=16)[name] for name in names] == [2, 4, 16, 2]
    assert [packed(rows)[name] for name in names] == [2, 4, 4, 2]
    assert packed([], max_packed_tokens=16)["num_slots"] == 16


def test_skipped_travels_between_processes() -> None:
    assert pickle.loads(pickle.dumps(SKIPPED)) == SKIPPED
    assert str(SKIPPED) == "set: skipped rows.jsonl:3: no such image"

"""Batches of pairs: order, one set of tiles for two answers, counts, weights, fillers, what is handed on."""

from __future__ import annotations

import pytest
import torch

from internvl_hub.data.skipped import Skipped
from internvl_hub.losses_internvl import length_to_weight
from internvl_hub.tests.training import preference_runs
from internvl_hub.tests.training import tiny_models as tiny
from internvl_hub.training.collation import InternVLCollator
from internvl_hub.training.preference_batch import PairBatch
from internvl_hub.training.preference_collation import PreferenceCollator

PAD = preference_runs.PAD
ROWS = preference_runs.pairs(5)
SEQUENCES = [(row[f"{a}_input_ids"], row[f"{a}_labels"]) for row in ROWS for a in ("chosen", "rejected")]


def test_padded_pairs() -> None:
    batch = PreferenceCollator(PAD, tiny.IMAGE_SIZE, "square")(ROWS)
    assert "image_flags" not in batch and batch["input_ids"].shape[0] == 10
    for i, (ids, labels) in enumerate(SEQUENCES):
        length, count = len(ids), int((labels != -100).sum())
        assert torch.equal(batch["input_ids"][i, :length], ids) and bool((batch["input_ids"][i, length:] == PAD).all())
        assert torch.equal(batch["labels"][i, :length], labels) and int(batch["attention_mask"][i].sum()) == length
        weight = length_to_weight(count, "square") if i % 2 == 0 else 0.0
        expected = (batch["labels"][i] != -100) * weight
        torch.testing.assert_close(batch["loss_weight"][i], expected.float())
        assert batch["label_counts"][i] == count
    tokens = sum(len(ids) for ids, _ in SEQUENCES)
    assert (batch["num_samples"], batch["num_tokens"]) == (5, tokens)
    assert batch["num_slots"] == batch["input_ids"].numel() and batch["places"] == [0, 1, 2, 3, 4]


def test_tiles_stand_at_both_answers() -> None:
    tiles = [0 if row["pixel_values"] is None else len(row["pixel_values"]) for row in ROWS]
    assert 0 in tiles and max(tiles) > 3
    batch = PreferenceCollator(PAD, tiny.IMAGE_SIZE)(ROWS)
    assert len(batch["pixel_values"]) == batch["num_tiles"] == sum(tiles)
    places = iter(batch["tile_index"].tolist())
    for row, count in zip(ROWS, tiles, strict=True):
        for _ in range(2):
            for tile in range(count):
                assert torch.equal(batch["pixel_values"][next(places)], row["pixel_values"][tile])
    assert next(places, None) is None


def test_packed_pairs() -> None:
    batch = PreferenceCollator(PAD, tiny.IMAGE_SIZE, packing=True, max_packed_tokens=2000)(ROWS)
    assert torch.equal(batch["input_ids"][0], torch.cat([ids for ids, _ in SEQUENCES]))
    lengths = [len(ids) for ids, _ in SEQUENCES]
    assert batch["cu_seq_lens_q"].diff().tolist() == lengths and batch["num_slots"] == 2000
    assert torch.equal(batch["position_ids"][0], torch.cat([torch.arange(length) for length in lengths]))
    assert int(batch["label_counts"].sum()) == int((batch["labels"] != -100).sum())


@pytest.mark.parametrize("packing", [False, True])
def test_the_label_of_a_first_token_does_not_count(packing: bool) -> None:
    row = {**ROWS[1], "rejected_labels": ROWS[1]["rejected_input_ids"]}
    batch = PreferenceCollator(PAD, tiny.IMAGE_SIZE, packing=packing)([row])
    assert batch["label_counts"].tolist()[1] == len(row["rejected_input_ids"]) - 1
    inputs = {k: batch[k] for k in ("input_ids", "labels", "attention_mask", "position_ids") if k in batch}
    scored = tiny.model().eval()(**inputs, use_cache=False, output_log_probs=True)
    assert len(scored.log_probs) == int(batch["label_counts"].sum())


@pytest.mark.parametrize("packing", [False, True])
def test_fillers_and_skipped_pairs(packing: bool) -> None:
    collator, skipped = PreferenceCollator(PAD, tiny.IMAGE_SIZE, packing=packing), Skipped("set", "row 3", "broken")
    batch = collator([skipped])
    assert batch["skipped"] == [skipped] and batch["num_samples"] == batch["num_tokens"] == batch["num_tiles"] == 0
    assert batch["label_counts"].shape == (0,) and batch["tile_index"].shape == (0,)
    assert not batch["pixel_values"].any() and len(batch["pixel_values"]) == 1
    assert PairBatch.of(batch).pairs == 0
    mixed = collator([ROWS[0], skipped, ROWS[1]])
    assert mixed["places"] == [0, 2] and mixed["num_samples"] == 2 and mixed["skipped"] == [skipped]


def test_numbers_and_reference_values_are_handed_on() -> None:
    rows = [{**row, "row": 7 + i, "reference_log_probs": (-1.5 * i, -2.0)} for i, row in enumerate(ROWS)]
    batch = PreferenceCollator(PAD, tiny.IMAGE_SIZE)(rows)
    assert batch["rows"] == [7, 8, 9, 10, 11]
    assert batch["reference_log_probs"].tolist() == [[-1.5 * i, -2.0] for i in range(5)]
    assert PairBatch.of(batch).reference.tolist()[2:4] == [-1.5, -2.0]
    assert "rows" not in PreferenceCollator(PAD, tiny.IMAGE_SIZE)(ROWS)


def test_rows_and_pairs_are_told_apart() -> None:
    with pytest.raises(ValueError, match="no chosen_input_ids .* train on conversations with InternVLTrainer"):
        PreferenceCollator(PAD, tiny.IMAGE_SIZE)([tiny.dataset(count=1)[0]])
    with pytest.raises(ValueError, match="train on pairs with MPOTrainer"):
        InternVLCollator(PAD, tiny.IMAGE_SIZE)(ROWS)
    with pytest.raises(ValueError, match="needs batches of PreferenceCollator"):
        PairBatch.of(InternVLCollator(PAD, tiny.IMAGE_SIZE)([tiny.dataset(count=1)[0]]))

"""A data set over a mixture of files: settings and names per source, epochs, skipping, and the same rows anywhere."""

import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from internvl_hub.data.dataset import ConversationDataset, RowSettings
from internvl_hub.data.features import FeatureMaker, Features
from internvl_hub.data.mixture import DataSource, Mixture
from internvl_hub.data.records import RecordError, RecordFile
from internvl_hub.data.skipped import Skipped
from internvl_hub.tests.training import tiny_models as tiny
from internvl_hub.training.batching import BatchPlanner
from internvl_hub.training.sampling import PlanBatchSampler, SampleKey

ORIENTATION, QUARTER_TURN = 0x0112, 6
FRAMES = 12


def talk(question: str, **media: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "Yes."}], **media}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, one of them to be turned, an animation, and the annotation files of four data sets."""
    tiny.picture(1, (112, 28)).save(tmp_path / "wide.png")
    exif = Image.Exif()
    exif[ORIENTATION] = QUARTER_TURN
    halves = Image.new("RGB", (112, 28))
    halves.paste((255, 255, 255), (56, 0, 112, 28))
    halves.save(tmp_path / "turned.jpg", exif=exif)
    first, *rest = [Image.new("RGB", (20, 20), (20 * k,) * 3) for k in range(FRAMES)]
    first.save(tmp_path / "film.gif", save_all=True, append_images=rest, duration=100)
    both = [talk("<image>\nWide?", image="wide.png"), talk("<image>\nTall?", image="turned.jpg")]
    files = {
        "plain": both, "few": both, "text": [talk(f"Q{i}") for i in range(4)],
        "film": [talk("<video>\nMoves?", video="film.gif"), talk("<image>", image="none.png"), talk("Q")],
    }  # fmt: skip
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def make(folder: Path, on_error: str = "raise", **repeats: float) -> ConversationDataset:
    """Rows 0-1 plain, 2-3 few tiles, augmented and not turned, 4-7 text, 8-10 film; row 9 has no picture."""
    special = {"few": {"max_dynamic_patch": 2, "data_augment": True, "exif": False}}
    sources = [
        DataSource(
            name, str(folder / f"{name}.jsonl"), str(folder), repeat_time=repeats.get(name, 1), **special.get(name, {})
        )
        for name in ("plain", "few", "text", "film")
    ]
    options = RowSettings(min_num_frame=2, max_num_frame=5)
    return ConversationDataset(
        Mixture(sources), tiny.tokenizer(), tiny.image_processor(), tiny.config(),
        on_error=on_error, settings=options, seed=7,
    )  # fmt: skip


def same(left: Features, right: Features) -> bool:
    assert left.keys() == right.keys()
    return left["num_patches"] == right["num_patches"] and all(
        left[key] is right[key] if left[key] is None else torch.equal(left[key], right[key])
        for key in ("input_ids", "labels", "pixel_values")
    )


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.newest
def test_rows_are_read_as_their_data_set_says(folder: Path) -> None:
    dataset = make(folder)
    maker = FeatureMaker(tiny.tokenizer(), tiny.image_processor(), tiny.config())
    records = RecordFile(folder / "plain.jsonl", folder)
    plain, few = RowSettings(), RowSettings(max_dynamic_patch=2, exif=False)
    for row in (0, 1):
        assert same(dataset[row], maker.features(records[row], plain))
        expected, found = maker.features(records[row], few), dataset[2 + row]
        assert found["num_patches"] == expected["num_patches"] == [3]
        assert torch.equal(found["input_ids"], expected["input_ids"])
        # JPEG moves values a little; pictures that are turned or not have nothing to do with each other.
        difference = (found["pixel_values"] - expected["pixel_values"]).abs().mean()
        assert 0 < difference < 0.6
    turned = maker.features(records[1], replace(few, exif=True))["pixel_values"]
    assert (dataset[3]["pixel_values"][-1] - turned[-1]).abs().mean() > 1  # the thumbnail: left and right, not above
    assert dataset[0]["num_patches"] == dataset[1]["num_patches"] == [5]


def test_names_and_sizes_of_data_sets(folder: Path) -> None:
    dataset = make(folder)
    assert len(dataset) == 11
    assert dataset.source_sizes() == {"plain": 2, "few": 2, "text": 4, "film": 3}
    names = [dataset.source_name(row) for row in range(11)]
    assert names == ["plain"] * 2 + ["few"] * 2 + ["text"] * 4 + ["film"] * 3
    assert [dataset.settings_of(row).max_dynamic_patch for row in (0, 2, 10)] == [None, 2, None]
    assert dataset.settings_of(0).max_num_frame == 5
    off = make(folder, few=0)
    assert off.source_sizes() == {"plain": 2, "few": 0, "text": 4, "film": 3} and off.source_name(2) == "text"


def test_bad_rows_raise_or_are_skipped(folder: Path) -> None:
    where = f"{folder / 'film.jsonl'}:2"
    for call in (make(folder).__getitem__, make(folder).measure):
        with pytest.raises(RecordError, match=r"film\.jsonl:2: cannot load image") as caught:
            call(9)
        assert caught.value.where == where
    dataset = make(folder, "skip")
    for found in (dataset[9], dataset.measure(9), dataset[SampleKey(9, 0, 3)]):
        assert isinstance(found, Skipped) and (found.source, found.where) == ("film", where)
    assert not any(isinstance(dataset[row], Skipped) for row in (8, 10))
    for row in (-1, 11):
        with pytest.raises(IndexError, match="of 11"):
            dataset[row]


# --- epochs ----------------------------------------------------------------------------------------------------------


def test_epoch_repeats_whole_and_fraction(folder: Path) -> None:
    dataset = make(folder, "skip", plain=2.5, text=0.5, film=3)
    counts = Counter(dataset.epoch_rows().tolist())
    assert sorted(counts[row] for row in (0, 1)) == [2, 3]
    assert (counts[2], counts[3]) == (1, 1)
    assert sorted(counts[row] for row in range(4, 8)) == [0, 0, 1, 1]
    assert [counts[row] for row in (8, 9, 10)] == [3, 3, 3]
    index = dataset.build_index(progress=False)
    assert list(index.unusable) == [9] and index.unusable[9].source == "film"
    without = Counter({row: count for row, count in counts.items() if row != 9})
    assert Counter(index.usable(dataset.epoch_rows()).tolist()) == without
    assert np.array_equal(dataset.epoch_rows(), make(folder, plain=2.5, text=0.5, film=3).epoch_rows())


def test_index_says_what_rows_cost(folder: Path) -> None:
    dataset = make(folder, "skip")
    index = dataset.build_index(workers=2, progress=False)
    for row in (0, 2, 3, 4, 8, 10):
        for key in (row, SampleKey(row, 2, 5)):
            found = dataset[key]
            assert (len(found["input_ids"]), sum(found["num_patches"])) == (index.tokens[row], index.tiles[row])


def test_repeating_changes_no_lengths(folder: Path, tmp_path: Path) -> None:
    """So another share of a data set finds the index of the first run."""
    once, more = make(folder, "skip"), make(folder, "skip", plain=2.5, text=0.5)
    assert once.fingerprint() == more.fingerprint()
    assert once.fingerprint() != make(folder, "skip", few=0).fingerprint()
    once.build_index(tmp_path / "cache", progress=False)
    more.build_index(tmp_path / "cache", progress=False)
    assert len(list((tmp_path / "cache").iterdir())) == 1


# --- the same anywhere -----------------------------------------------------------------------------------------------

KEYS = [SampleKey(row, copy, epoch) for row in (0, 2, 3, 8) for copy in (0, 1) for epoch in (0, 1)]


def test_keys_alone_decide_also_in_workers(folder: Path) -> None:
    dataset = make(folder)
    here = {key: dataset[key] for key in KEYS}
    orders = [KEYS, [KEYS[i] for i in np.random.default_rng(0).permutation(len(KEYS))]]
    for order in orders:
        loader = DataLoader(dataset, batch_size=None, sampler=order, num_workers=2)  # type: ignore[arg-type]
        for key, found in zip(order, loader, strict=True):
            assert same(found, here[key])
    # What is random differs between occurrences, what is not does not.
    for row, changes in ((0, False), (2, True), (8, True)):
        first, *others = (here[key]["pixel_values"] for key in KEYS if key.row == row)
        assert all(len(other) == len(first) for other in others)
        assert (not any(torch.equal(first, other) for other in others)) == changes
    other_run = replace(dataset, seed=8)
    assert not same(other_run[KEYS[4]], here[KEYS[4]])


def test_plans_and_rows_are_keys_alike(folder: Path) -> None:
    """A plain row is its first occurrence in epoch 0; the sampler's batches are lists of keys."""
    dataset = make(folder, "skip", few=2)
    index = dataset.build_index(progress=False)
    assert same(dataset[2], dataset[SampleKey(2, 0, 0)])
    rows = index.usable(dataset.epoch_rows())
    sampler = PlanBatchSampler(BatchPlanner(index.tokens[rows], 3, seed=1), rows)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=2, collate_fn=list)
    keys = list(sampler)
    assert {key for batch in keys for key in batch} >= {SampleKey(2, 0, 0), SampleKey(2, 1, 0)}
    for batch, found in zip(keys, loader, strict=True):
        assert len(batch) == len(found)
        assert all(same(features, dataset[key]) for key, features in zip(batch, found, strict=True))


def test_pickling_keeps_rows_settings_and_index(folder: Path) -> None:
    dataset = make(folder, "skip")
    first = dataset[2]  # files are open
    dataset.build_index(progress=False)
    again = pickle.loads(pickle.dumps(dataset))
    assert same(again[2], first) and same(again[SampleKey(8, 1, 1)], dataset[SampleKey(8, 1, 1)])
    assert np.array_equal(again.epoch_rows(), dataset.epoch_rows()) and again[9] == dataset[9]
    assert again.fingerprint() == dataset.fingerprint()


def test_unknown_way_with_errors_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'skip', got 'ignore'"):
        make(folder, "ignore")

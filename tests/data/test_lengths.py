"""The length index: what it holds, when a cached one is taken, and that workers do not change it."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internvl_hub.data.dataset import ConversationDataset, RowSettings
from internvl_hub.data.features import FeatureMaker
from internvl_hub.data.lengths import (
    LengthIndex,
    RowLength,
    hash_of,
    load_or_measure,
    measure_all,
    tokenizer_fingerprint,
)
from internvl_hub.data.records import RecordFile
from internvl_hub.data.skipped import Skipped
from internvl_hub.tests.training import tiny_models as tiny


class Rows:
    """Row i costs (i + 1, i % 3, i // 2); every 50th cannot be used."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.measured: list[int] = []

    def __len__(self) -> int:
        return self.count

    def measure(self, row: int) -> RowLength | Skipped:
        self.measured.append(row)
        return Skipped("d", f"r:{row}", "bad") if row % 50 == 49 else RowLength(row + 1, row % 3, row // 2)


def write_rows(path: Path, questions: Sequence[str], extra: Sequence[str] = ()) -> Path:
    """A jsonl file of text rows, with a blank line after the first and `extra` lines behind."""
    rows = [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": "Yes."}]} for q in questions]
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join([lines[0], "", *lines[1:], *extra]) + "\n", encoding="utf-8")
    return path


def make_dataset(path: Path, **changes: Any) -> ConversationDataset:
    values = {"tokenizer": tiny.tokenizer(), "image_processor": tiny.image_processor(), "config": tiny.config()}
    return ConversationDataset(RecordFile(path), **{**values, "on_error": "skip", "name": "mine", **changes})


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where the rows that were measured, and not read from the cache, stand."""
    found: list[str] = []
    measure = FeatureMaker.measure

    def counting(maker: FeatureMaker, record: Any, *args: Any) -> RowLength:
        found.append(record.where)
        return measure(maker, record, *args)

    monkeypatch.setattr(FeatureMaker, "measure", counting)
    return found


# --- measuring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 63, 64, 65, 130])
def test_every_row_once_and_in_order(count: int) -> None:
    rows = Rows(count)
    index = measure_all(rows, progress=False)
    assert rows.measured == list(range(count))
    expected = [(0, 0, 0) if row % 50 == 49 else (row + 1, row % 3, row // 2) for row in range(count)]
    assert index.lengths.tolist() == [list(row) for row in expected]
    assert index.lengths.dtype == np.int32
    assert index.tokens.tolist() == [tokens for tokens, _, _ in expected]
    assert index.tiles.tolist() == [tiles for _, tiles, _ in expected]
    assert list(index.unusable) == list(range(49, count, 50))


def test_workers_measure_the_same() -> None:
    alone, shared = measure_all(Rows(200), 0, progress=False), measure_all(Rows(200), 2, progress=False)
    assert np.array_equal(alone.lengths, shared.lengths)
    assert alone.unusable == shared.unusable and len(shared.unusable) == 4


def test_usable_rows_keep_their_order_and_copies() -> None:
    index = measure_all(Rows(100), progress=False)
    rows = np.array([99, 3, 49, 3, 50, 0, 49])
    assert index.usable(rows).tolist() == [3, 3, 50, 0]
    assert LengthIndex(index.lengths, {}).usable(rows).tolist() == rows.tolist()


def test_unusable_rows_are_reported_by_file_and_line(tmp_path: Path) -> None:
    missing = {"image": "none.png", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    path = write_rows(tmp_path / "rows.jsonl", ["a", "b", "word " * 60], ['{"half":', json.dumps(missing)])
    limit = make_dataset(path).measure(0).tokens + 5
    index = make_dataset(path, max_seq_length=limit).build_index(progress=False)
    # The second line is blank.
    where = {row: found.where for row, found in index.unusable.items()}
    assert where == {2: f"{path}:4", 3: f"{path}:5", 4: f"{path}:6"}
    reasons = [f"exceed max_seq_length={limit}", "not valid json", "cannot load image"]
    for found, reason in zip(index.unusable.values(), reasons, strict=True):
        assert reason in found.reason and found.source == "mine"
    assert Counter(entry.source for entry in index.unusable.values()) == {"mine": 3}
    assert (index.lengths[2:] == 0).all() and (index.lengths[:2, 0] > 0).all()


# --- cache -----------------------------------------------------------------------------------------------------------


def test_saved_index_comes_back(tmp_path: Path) -> None:
    index = measure_all(Rows(120), progress=False)
    index.save(tmp_path / "deep" / "index.npz")
    again = LengthIndex.load(tmp_path / "deep" / "index.npz")
    assert np.array_equal(again.lengths, index.lengths) and again.lengths.dtype == np.int32
    assert again.unusable == index.unusable
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["index.npz"]


def test_second_run_measures_nothing(tmp_path: Path, measured: list[str]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ["a", "b", "c"], ["[]"])
    first = make_dataset(path).build_index(tmp_path / "cache", progress=False)
    assert measured == [f"{path}:1", f"{path}:3", f"{path}:4"]
    dataset = make_dataset(path)
    second = dataset.build_index(tmp_path / "cache", workers=2, progress=False)
    assert len(measured) == 3
    assert np.array_equal(first.lengths, second.lengths) and first.unusable == second.unusable
    assert dataset.index is second


def with_another_token() -> Any:
    """A copy of the tokenizer that knows one word more."""
    tokenizer = type(tiny.tokenizer()).from_pretrained(tiny.CHAT / tiny.FOLDERS["qwen2"])
    tokenizer.add_tokens(["question"])
    return tokenizer


def with_another_special_token() -> Any:
    """The same with a special token."""
    tokenizer = type(tiny.tokenizer()).from_pretrained(tiny.CHAT / tiny.FOLDERS["qwen2"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<mine>"]})
    return tokenizer


CHANGES = {
    "tokenizer": lambda: {"tokenizer": with_another_token()},
    "special token": lambda: {"tokenizer": with_another_special_token()},
    "other tokenizer": lambda: {"tokenizer": tiny.tokenizer("internlm2")},
    "template": lambda: {"config": tiny.config(template="Hermes-2")},
    "system message": lambda: {"config": tiny.config(system_message="Be brief.")},
    "tokens of a tile": lambda: {"config": tiny.config(downsample_ratio=0.25)},
    "tiling": lambda: {"image_processor": type(tiny.image_processor())(image_size=28, max_dynamic_patch=2)},
    "limit": lambda: {"max_seq_length": 4000},
    "tiles of a row": lambda: {"settings": RowSettings(max_dynamic_patch=2)},
    "frames": lambda: {"settings": RowSettings(max_num_frame=4, min_num_frame=2)},
    "seed": lambda: {"seed": 1},
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_changes_lengths_is_measured_again(change: str, tmp_path: Path, measured: list[str]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ["question"])
    make_dataset(path).build_index(tmp_path / "cache", progress=False)
    make_dataset(path, **CHANGES[change]()).build_index(tmp_path / "cache", progress=False)
    assert len(measured) == 2
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 2


def test_other_content_or_place_is_measured_again(tmp_path: Path, measured: list[str]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ["a", "b"])
    make_dataset(path).build_index(tmp_path / "cache", progress=False)
    write_rows(path, ["a", "c"])  # as many rows and bytes
    make_dataset(path).build_index(tmp_path / "cache", progress=False)
    assert len(measured) == 4
    elsewhere = ConversationDataset(
        RecordFile(path, tmp_path / "pictures"), tiny.tokenizer(), tiny.image_processor(), tiny.config()
    )
    elsewhere.build_index(tmp_path / "cache", progress=False)
    assert len(measured) == 6
    # The same rows in a copy of the file are the same rows.
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    assert make_dataset(copy).fingerprint() == make_dataset(path).fingerprint()


@pytest.mark.parametrize("damage", ["empty", "garbage", "cut", "flipped", "no lengths", "bad notes", "other rows"])
def test_damaged_cache_is_made_again(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = Rows(120)
    expected = load_or_measure(rows, tmp_path, "abc", progress=False)
    path = tmp_path / "abc.npz"
    good = path.read_bytes()
    middle = len(good) // 3
    written = {
        "empty": b"", "garbage": b"no index " * 9, "cut": good[: len(good) // 2],
        "flipped": good[:middle] + bytes(255 - byte for byte in good[middle : middle + 40]) + good[middle + 40 :],
    }  # fmt: skip
    if damage == "no lengths":
        np.savez(path, unusable=np.array("[]"))
    elif damage == "bad notes":
        np.savez(path, lengths=expected.lengths, unusable=np.array("[[1, 2"))
    elif damage == "other rows":
        measure_all(Rows(7), progress=False).save(path)
    else:
        path.write_bytes(written[damage])
    index = load_or_measure(rows, tmp_path, "abc", progress=False)
    assert len(rows.measured) == 240
    assert np.array_equal(index.lengths, expected.lengths) and index.unusable == expected.unusable
    assert "abc.npz" in caplog.text and "made again" in caplog.text
    load_or_measure(rows, tmp_path, "abc", progress=False)  # what was written is good
    assert len(rows.measured) == 240


def test_records_without_a_file_are_always_measured(tmp_path: Path, measured: list[str]) -> None:
    dataset = tiny.dataset(count=2)
    assert dataset.fingerprint() is None
    for _ in range(2):
        dataset.build_index(tmp_path, progress=False)
    assert len(measured) == 4 and not list(tmp_path.iterdir())


def test_media_that_changed_since_are_noticed(tmp_path: Path) -> None:
    tiny.picture(0, (28, 28)).save(tmp_path / "a.png")
    row = {"image": "a.png", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    dataset = ConversationDataset(
        RecordFile(tmp_path / "rows.json", tmp_path), tiny.tokenizer(), tiny.image_processor(), tiny.config()
    )
    dataset.build_index(tmp_path / "cache", progress=False)
    assert dataset[0]["num_patches"] == [1]
    tiny.picture(0, (56, 28)).save(tmp_path / "a.png")
    skipping = replace(dataset, on_error="skip")
    skipping.index = dataset.index
    marker = skipping[0]
    assert isinstance(marker, Skipped) and marker.where == f"{tmp_path / 'rows.json'}[0]"
    assert "3 tiles where the length index says" in marker.reason and "its media have changed" in marker.reason


# --- hashes ----------------------------------------------------------------------------------------------------------


def test_hashes_tell_parts_apart() -> None:
    different = [("ab", "c"), ("a", "bc"), ("abc",), (["ab", "c"],), (b"ab", b"c"), ("ab", None), ("ab", 0), ("ab",)]
    assert len({hash_of(*parts) for parts in different}) == len(different)
    assert hash_of({"a": 1, "b": 2}) == hash_of({"b": 2, "a": 1})
    assert len(hash_of()) == 32


def test_tokenizer_without_a_backend() -> None:
    """Slow tokenizers are told apart by their vocabulary."""

    class Slow:
        special_tokens_map = {"eos_token": "</s>"}

        def __init__(self, **vocabulary: int) -> None:
            self.vocabulary = vocabulary

        def get_vocab(self) -> dict[str, int]:
            return self.vocabulary

    same = tokenizer_fingerprint(Slow(a=0, b=1))
    assert same == tokenizer_fingerprint(Slow(b=1, a=0))
    assert same != tokenizer_fingerprint(Slow(a=1, b=0))

"""Data sets of a run: meta files and lists, their errors, and exact, repeatable numbers of rows in an epoch."""

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from internvl_hub.data.mixture import DataSource, DataSourceError, Mixture, load_sources, read_meta
from internvl_hub.training.arguments import DataArguments


def write_rows(path: Path, count: int, prefix: str = "q") -> str:
    """A jsonl file of text rows whose questions are `prefix0`, `prefix1`, ..."""
    path.parent.mkdir(parents=True, exist_ok=True)
    turns = [[{"from": "human", "value": f"{prefix}{i}"}, {"from": "gpt", "value": "A"}] for i in range(count)]
    path.write_text("".join(json.dumps({"conversations": turn}) + "\n" for turn in turns))
    return str(path)


def mixture(tmp_path: Path, counts: list[int], repeat_times: list[float]) -> Mixture:
    sources = [
        DataSource(f"d{i}", write_rows(tmp_path / f"d{i}.jsonl", count, f"d{i}-"), repeat_time=repeat)
        for i, (count, repeat) in enumerate(zip(counts, repeat_times, strict=True))
    ]
    return Mixture(sources)


def write_meta(path: Path, meta: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(meta if isinstance(meta, str) else json.dumps(meta))
    return str(path)


# --- epochs ----------------------------------------------------------------------------------------------------------


def test_exact_counts_of_repeated_rows(tmp_path: Path) -> None:
    data = mixture(tmp_path, [5, 11, 7], [2, 0.5, 3.5])
    rows = data.epoch_rows(seed=3)
    assert rows.dtype == np.int64
    counts = Counter(rows.tolist())
    assert [counts[row] for row in range(5)] == [2] * 5
    assert Counter(counts[row] for row in range(5, 16)) == {0: 5, 1: 6}  # round(5.5) is 6
    assert Counter(counts[row] for row in range(16, 23)) == {3: 3, 4: 4}  # round(3.5) is 4
    assert len(rows) == 2 * 5 + 6 + 21 + 4
    assert (np.diff([data.locate(row)[0] for row in rows]) >= 0).all()  # source by source


@pytest.mark.parametrize(("rows", "repeat", "expected"), [(10, 0.1, 1), (10, 1.1, 11), (3, 2.9, 9), (1, 0.4, 0)])
def test_rounding(tmp_path: Path, rows: int, repeat: float, expected: int) -> None:
    data = mixture(tmp_path, [rows, 1], [repeat, 1])
    assert len(data.epoch_rows(0)) == expected + 1


@pytest.mark.newest
def test_subset_depends_on_seed_and_name_alone(tmp_path: Path) -> None:
    data = mixture(tmp_path, [200, 200], [0.5, 0.5])
    first = data.epoch_rows(0)
    assert (data.epoch_rows(0) == first).all()
    assert (pickle.loads(pickle.dumps(data)).epoch_rows(0) == first).all()
    assert set(first) != set(data.epoch_rows(1))
    mine, other = first[first < 200], first[first >= 200] - 200
    assert set(mine) != set(other)
    assert mine.max() > 100  # not the first half
    alone = Mixture([data.sources[1]]).epoch_rows(0)
    assert (alone == other).all()


def test_data_set_that_is_off_is_not_opened(tmp_path: Path) -> None:
    on = DataSource("on", write_rows(tmp_path / "on.jsonl", 3))
    data = Mixture([DataSource("off", "no/such.jsonl", repeat_time=0), on])
    assert len(data) == 3
    assert data.epoch_rows(0).tolist() == [0, 1, 2]
    assert data.source_of(0) == on
    assert data.sizes() == {"off": 0, "on": 3}
    with pytest.raises(DataSourceError, match="'off': this and all others have repeat_time 0"):
        Mixture([data.sources[0]])


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_of_several_files(tmp_path: Path) -> None:
    data = mixture(tmp_path, [2, 1, 3], [1, 0.1, 2])
    assert len(data) == 6
    expected = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
    assert [data.locate(row) for row in range(6)] == expected
    for row, (source, place) in enumerate(expected):
        assert data.record(row).messages[0].text == f"d{source}-{place}"
        assert data.record(row).where == f"{tmp_path}/d{source}.jsonl:{place + 1}"
        assert data.source_of(np.int64(row)).name == f"d{source}"
    for row in (-1, 6):
        with pytest.raises(IndexError, match="of 6"):
            data.record(row)
    assert len(list(data)) == 6


def test_workers_read_the_same_rows(tmp_path: Path) -> None:
    data = mixture(tmp_path, [3, 4], [1, 1])
    here = [data[row] for row in range(7)]  # the files are open when the worker starts
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert list(loader) == here


def test_root_of_a_source_is_that_of_its_images(tmp_path: Path) -> None:
    row = {"image": "a.png", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    data = Mixture([DataSource("d", str(tmp_path / "rows.json"), "pictures")])
    assert data[0].images == (Path("pictures/a.png"),)


def test_fingerprint_is_of_what_makes_lengths(tmp_path: Path) -> None:
    source = {"name": "d", "annotation": write_rows(tmp_path / "a.jsonl", 2)}
    other = write_rows(tmp_path / "b.jsonl", 2, "other")

    def fingerprint(**changes: Any) -> str:
        return Mixture([DataSource(**{**source, **changes})]).fingerprint()

    same = fingerprint()
    assert same == fingerprint(repeat_time=2.5, data_augment=True, length=2)
    changes = ({"annotation": other}, {"name": "e"}, {"root": "r"}, {"max_dynamic_patch": 6}, {"exif": False})
    assert len({same, *(fingerprint(**change) for change in changes)}) == 6


# --- describing data sets --------------------------------------------------------------------------------------------


def test_meta_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 2)
    (tmp_path / "pictures").mkdir()
    meta = {
        "first": {
            "root": "pictures", "annotation": "rows.jsonl", "data_augment": True, "min_dynamic_patch": 2,
            "max_dynamic_patch": 6, "repeat_time": 0.5, "length": 2,
        },
        "second": {"annotation": str(tmp_path / "rows.jsonl"), "exif": False, "max_dynamic_patch": None},
    }  # fmt: skip
    arguments = DataArguments(meta_path=write_meta(tmp_path / "meta.json", meta), data_augment=False)
    rows = str(tmp_path / "rows.jsonl")
    assert load_sources(arguments) == [
        DataSource("first", rows, str(tmp_path / "pictures"), True, 2, 6, 0.5, True, 2),
        DataSource("second", rows, exif=False),
    ]
    arguments = DataArguments(eval_meta_path=arguments.meta_path, data_augment=True, exif=False)
    assert load_sources(arguments) == []
    evaluation = load_sources(arguments, evaluation=True)
    assert [(s.data_augment, s.exif) for s in evaluation] == [(False, False), (False, False)]


def test_meta_paths_are_of_the_working_directory_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("work", "meta"):
        write_rows(tmp_path / folder / "both.jsonl", 1)
    write_rows(tmp_path / "meta" / "beside.jsonl", 1)
    entries = {name: {"annotation": f"{name}.jsonl", "root": "s3://bucket/x"} for name in ("both", "beside", "none")}
    meta = write_meta(tmp_path / "meta" / "meta.json", entries)
    monkeypatch.chdir(tmp_path / "work")
    found = [source.annotation for source in read_meta(meta)]
    assert found == ["both.jsonl", str(tmp_path / "meta" / "beside.jsonl"), "none.jsonl"]
    assert {source.root for source in read_meta(meta)} == {"s3://bucket/x"}


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ("{", "not valid json"),
        ("[]", "one entry per data set"),
        ("{}", "one entry per data set"),
        ({"d": "rows.jsonl"}, "'d': an entry is an object with at least 'annotation'"),
        ({"d": {"root": "r"}}, "'d': an entry is an object with at least 'annotation'"),
        ({"d": {"annotation": "a.jsonl", "repeat_times": 2}}, "key 'repeat_times'; did you mean 'repeat_time'"),
        ({"d": {"annotation": "a.jsonl", "zzz": 2}}, "unknown key 'zzz'; known are annotation, root, "),
        ({"d": {"annotation": ["a.jsonl"]}}, r"annotation must be text, got \['a.jsonl'\]"),
        ({"d": {"annotation": "a.jsonl", "data_augment": "yes"}}, "data_augment must be true or false, got 'yes'"),
        ({"d": {"annotation": "a.jsonl", "repeat_time": -1}}, "repeat_time must be a number from 0"),
        ({"d": {"annotation": "a.jsonl", "repeat_time": True}}, "repeat_time must be a number from 0"),
        ({"d": {"annotation": "a.jsonl", "repeat_time": float("nan")}}, "repeat_time must be a number from 0"),
        ({"d": {"annotation": "a.jsonl", "max_dynamic_patch": 0}}, "max_dynamic_patch must be a positive integer"),
        ({"d": {"annotation": "a.jsonl", "max_dynamic_patch": 2, "min_dynamic_patch": 3}}, "at most max_dynamic_pa"),
        ('{"d": {"annotation": "a.jsonl"}, "d": {"annotation": "b.jsonl"}}', "has 'd' twice"),
    ],
)  # fmt: skip
def test_bad_meta_files(tmp_path: Path, meta: Any, message: str) -> None:
    path = write_meta(tmp_path / "meta.json", meta)
    with pytest.raises(DataSourceError, match=message):
        read_meta(path)


def test_missing_meta_file() -> None:
    with pytest.raises(DataSourceError, match="data set 'no/meta.json': cannot read the meta file: No such file"):
        load_sources(DataArguments(meta_path="no/meta.json"))


def test_list_form() -> None:
    arguments = DataArguments(
        data_paths=["a/train.jsonl", "b/train.json", "c/text.jsonl"],
        image_folders=["x", None, ""],
        repeat_times=[2, 0.5, 3.5],
        data_augment=True,
        eval_data_paths=["val.jsonl"],
    )
    assert load_sources(arguments) == [
        DataSource("a/train", "a/train.jsonl", "x", True, repeat_time=2),
        DataSource("b/train", "b/train.json", "", True, repeat_time=0.5),
        DataSource("c/text", "c/text.jsonl", "", True, repeat_time=3.5),
    ]
    assert load_sources(arguments, evaluation=True) == [DataSource("val", "val.jsonl")]
    assert load_sources(DataArguments()) == []
    with pytest.raises(DataSourceError, match="listed twice"):
        load_sources(DataArguments(data_paths=["a.jsonl", "a.jsonl"]))
    assert [s.name for s in load_sources(DataArguments(data_paths=["a.jsonl", "a.json"]))] == ["a.jsonl", "a.json"]


def test_what_cannot_be_opened_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    empty, other = tmp_path / "empty.jsonl", tmp_path / "rows.csv"
    empty.write_text("\n\n")
    other.write_text("a,b")
    for annotation, message in (
        ("no.jsonl", "there is no annotation file .*no.jsonl'; check"),
        (str(tmp_path / "no.csv"), "there is no annotation file"),
        (str(empty), "has no rows; leave it out"),
        (str(other), "suffix is '.csv'"),
    ):
        with pytest.raises(DataSourceError, match=f"data set 'mine': .*{message}"):
            Mixture([DataSource("mine", annotation)])
    with pytest.raises(DataSourceError, match="there is no data"):
        Mixture([])
    source = DataSource("twice", write_rows(tmp_path / "a.jsonl", 3), length=4)
    with pytest.raises(DataSourceError, match="'twice': two data sets have this name"):
        Mixture([source, source])
    Mixture([source])
    assert "length says 4 rows" in caplog.text

"""Files of pairs: complete or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from internvl_hub.data.mixture import read_meta
from internvl_hub.data.sources import DataSource
from internvl_hub.preference.pair_files import PairFile, meta_entry, update_meta


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "pairs.jsonl"
    with PairFile(path) as file:
        file.write({"question": "猫\u2028\ud800", "n": 1})
        file.write({"n": 2})
        assert not path.exists()
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert rows == [{"question": "猫\u2028\ud800", "n": 1}, {"n": 2}]
    before = path.read_bytes()
    with pytest.raises(KeyError), PairFile(path) as file:
        file.write({"n": 3})
        raise KeyError
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    with PairFile(path):
        pass
    assert not list(path.parent.iterdir())


def test_two_processes_do_not_write_into_one_another(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    with PairFile(path) as first, PairFile(path) as second:
        first.write({"n": 1})
        second.write({"n": 1})
    assert path.read_text() == '{"n": 1}\n' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("root", ["", "images", "https://example.org/images", "/data"])
def test_meta_entries_work_from_anywhere(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("{}\n")
    entry = meta_entry(Path("a.jsonl"), 7, DataSource("a", "source.jsonl", root, exif=False), 5)
    meta = update_meta(Path("."), {"a": entry}, ["a", "b"])
    assert meta is not None
    path = meta.absolute()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (source,) = read_meta(path)
    expected = root if "://" in root else str(tmp_path / root)
    assert (source.root, source.annotation) == (expected, str(tmp_path / "a.jsonl"))
    assert (source.exif, source.max_dynamic_patch, source.length) == (False, 5, 7)

"""The answer store: what was written is read again, cut lines are dropped, and other settings are refused."""

import json
from pathlib import Path

import pytest

from internvl_hub.evaluation.answer_store import (
    AnswerStore,
    differences,
    missing_shards,
    read_entries,
    read_settings,
)

SETTINGS = {"model": "m", "sampling": {"seed": 0, "n": 2}, "tags": ("a",)}


def entry(key: str, text: str = "x") -> dict:
    return {"key": key, "answers": [{"text": text, "complete": True}]}


def test_entries_come_back(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "new", SETTINGS)
    assert store.keys() == set() and store.entries() == []
    entries = [entry("1", "Zürich 漢字\n\u2028 \x00"), entry("2", "lone \ud800"), {"key": "3", "error": "no"}]
    store.append(entries[:2])
    store.append([])
    store.append(entries[2:])
    again = AnswerStore(tmp_path / "new", SETTINGS)
    assert again.entries() == store.entries() == entries
    assert again.keys() == store.keys() == {"1", "2", "3"} and again.failed_keys() == {"3"}
    assert read_settings(tmp_path / "new") == json.loads(json.dumps(SETTINGS))


def test_a_later_entry_replaces_an_earlier_one(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, SETTINGS)
    store.append([{"key": "1", "error": "no"}, entry("2")])
    store.append([entry("1", "yes")])
    assert store.failed_keys() == set()
    assert read_entries(tmp_path) == [entry("1", "yes"), entry("2")]


def test_a_cut_file_goes_on_at_its_last_whole_line(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    store = AnswerStore(whole, SETTINGS)
    entries = [entry(str(i), "äöü" * i) for i in range(4)]
    store.append(entries)
    content = store.path.read_bytes()
    for length in range(len(content) + 1):
        folder = tmp_path / f"cut{length}"
        cut = AnswerStore(folder, SETTINGS)
        cut.path.write_bytes(content[:length])
        cut = AnswerStore(folder, SETTINGS)
        assert cut.keys() == {str(i) for i in range(4) if content[:length].count(b"\n") > i + 1}
        cut.append([e for e in entries if e["key"] not in cut.keys()])
        if len(cut.keys()) == 4 and content[:length].count(b"\n") < 5:
            assert cut.path.read_bytes() == content


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    AnswerStore(tmp_path, SETTINGS).append([entry("1")])
    other = {"model": "m", "sampling": {"seed": 5, "n": 2}, "tags": ["a"], "new": 1}
    with pytest.raises(ValueError, match=r"sampling.seed: 0 there, 5 now; new: None there, 1 now"):
        AnswerStore(tmp_path, other)
    with pytest.raises(ValueError, match="shards: 1 there, 2 now"):
        AnswerStore(tmp_path, SETTINGS, 1, 2)


def test_settings_are_refused_across_shards(tmp_path: Path) -> None:
    AnswerStore(tmp_path, SETTINGS, 1, 2).append([entry("1")])
    with pytest.raises(ValueError, match="model: 'm' there, 'n' now"):
        AnswerStore(tmp_path, {**SETTINGS, "model": "n"}, 0, 2)


def test_shards_read_together(tmp_path: Path) -> None:
    stores = [AnswerStore(tmp_path, SETTINGS, shard, 3) for shard in range(3)]
    stores[2].append([entry("c")])
    assert missing_shards(tmp_path) == [0, 1]
    stores[0].append([entry("a")])
    assert missing_shards(tmp_path) == [1]
    assert [e["key"] for e in stores[1].entries()] == ["a", "c"]
    assert stores[2].keys() == {"c"}


def test_damage_is_named(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, SETTINGS)
    store.append([entry("1"), entry("2")])
    lines = store.path.read_bytes().splitlines(keepends=True)
    for broken in (b"{nonsense\n", b"[]\n", b"{}\n"):
        store.path.write_bytes(b"".join([lines[0], broken, lines[2]]))
        with pytest.raises(ValueError, match=r"00001.jsonl:2: .*damaged"):
            AnswerStore(tmp_path, SETTINGS)
    store.path.write_bytes(b'{"some": "json"}\n')
    with pytest.raises(ValueError, match="not the first line"):
        AnswerStore(tmp_path, SETTINGS)


def test_bad_arguments(tmp_path: Path) -> None:
    for shard, shards in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="numbered from 0"):
            AnswerStore(tmp_path, SETTINGS, shard, shards)
    store = AnswerStore(tmp_path, SETTINGS)
    for bad in ({"answers": []}, {"key": "1"}, {"key": "1", "answers": [], "error": "x"}):
        with pytest.raises(ValueError, match="an entry needs"):
            store.append([bad])
    with pytest.raises(FileNotFoundError, match="holds no answers"):
        read_settings(tmp_path)


def test_differences() -> None:
    assert list(differences({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 1}, "d": [1, 2]})) == [
        "a.c: 2 there, None now",
        "d: [1] there, [1, 2] now",
    ]

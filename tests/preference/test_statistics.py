"""Counts of a run as json and as a table; stored answers that are read back."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from internvl_hub.evaluation.answer_store import AnswerStore
from internvl_hub.evaluation.engines import Answer, Failure
from internvl_hub.preference.statistics import PairStatistics, render_statistics
from internvl_hub.preference.stored_answers import StoredAnswers


def make_statistics() -> PairStatistics:
    found = PairStatistics(questions=12, answered=10, samples=40, all_correct=2, none_correct=3, paired=5)
    found.kinds.update(correct=20, incorrect=14, format=5, unusable=1)
    found.format_failures.update(no_box=5)
    for _ in range(2):
        found.add_failure("timed\nout")
    for length in (1, 2, 3, 10):
        found.add_pair("right", "x" * length, "y" * (length + 4))
    return found


def test_shares_and_lengths() -> None:
    content = json.loads(json.dumps(make_statistics().to_dict()))
    assert content["correct_share"] == 0.5 and content["format_failure_share"] == 5 / 40
    assert content["pairs_per_question"] == 0.4 and content["pairs"] == {"right": 4}
    assert content["lengths"]["chosen"] == {
        "mean": 4.0,
        "median": float(np.median([1, 2, 3, 10])),
        "min": 1,
        "max": 10,
    }
    assert content["failures"] == {"timed out": 2}
    empty = PairStatistics().to_dict()
    assert empty["correct_share"] is None and empty["lengths"] == {"chosen": None, "rejected": None}


def test_sums() -> None:
    one = make_statistics()
    total = one + one + PairStatistics()
    assert (total.questions, total.kinds["correct"], len(total.lengths["rejected"])) == (24, 40, 8)
    assert one.questions == 12 and len(one.lengths["chosen"]) == 4


def test_failures_of_many_reasons_are_bounded() -> None:
    found = PairStatistics()
    for number in range(1000):
        found.add_failure(f"reason {number} {'x' * 1000}")
    assert found.failed == 1000 and len(found.failures) == 20 and max(map(len, found.failures)) == 200


def test_the_table() -> None:
    lines = render_statistics({"a": make_statistics(), "long name": PairStatistics(questions=3)}).splitlines()
    assert lines[0].split() == [
        "data",
        "set",
        *"questions answered failed correct all none format pairs per question".split(),
    ]
    assert lines[1].split() == ["a", "12", "10", "2", "50.0%", "20.0%", "30.0%", "12.5%", "4", "0.40"]
    assert lines[2].split() == ["long", "name", "3", "0", "0", "0"] and lines[3].split()[:3] == ["all", "15", "10"]
    assert len(set(map(len, lines[:2]))) == 1
    assert "  pairs: right 4" in lines and "  characters: chosen 4 (median 2), rejected 8 (median 6)" in lines


def test_stored_answers_are_those_of_the_store(tmp_path: Path) -> None:
    assert len(StoredAnswers(tmp_path)) == 0
    for shard in range(2):
        store = AnswerStore(tmp_path, {}, shard, 2)
        store.append([{"key": f"k{shard}", "error": "lost"}, {"key": f"键{shard}", "answers": []}])
        store.append([{"key": f"k{shard}", "answers": [{"text": f"a\u2028{shard}\ud800", "complete": False}]}])
    store.append([{"key": "late", "error": "x"}])
    store.path.write_bytes(store.path.read_bytes()[:-1])
    with StoredAnswers(tmp_path) as stored:
        assert len(stored) == 4 and "k1" in stored and "late" not in stored
        assert stored["k1"] == [Answer("a\u20281\ud800", complete=False)] and stored["键0"] == []
        assert Counter(type(stored[key]) for key in ("k0", "k1")) == {list: 2}
    AnswerStore(tmp_path, {}, 0, 2).append([{"key": "k0", "error": "again"}])
    with StoredAnswers(tmp_path) as stored:
        assert stored["k0"] == Failure("again")


@pytest.mark.parametrize("line", [b"{\n", b"[]\n", b'{"answers": []}\n'], ids=["json", "list", "key"])
def test_damaged_stores_are_refused(line: bytes, tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, {})
    store.append([{"key": "a", "error": "x"}])
    with store.path.open("ab") as file:
        file.write(line)
    with pytest.raises(ValueError, match="damaged"):
        StoredAnswers(tmp_path)

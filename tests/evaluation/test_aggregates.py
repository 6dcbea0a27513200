"""Totals of scores."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_hub.evaluation import aggregates, choice_metrics


def test_pope_counts_against_a_table():
    answers = ["yes", "yes", "no", "no", "yes", "no"]
    gold = ["yes", "no", "no", "yes", "yes", "no"]
    table, overall = aggregates.pope(answers, gold, ["a", "a", "a", "b", "b", "b"])
    confusion = Counter(zip(answers, gold, strict=True))
    all_counts = aggregates.yes_no_counts(answers, gold)
    assert all_counts.true_positive == confusion["yes", "yes"] and all_counts.false_positive == confusion["yes", "no"]
    assert all_counts.true_negative == confusion["no", "no"] and all_counts.false_negative == confusion["no", "yes"]
    assert all_counts.accuracy == pytest.approx(4 / 6) and all_counts.yes_ratio == 0.5
    assert table["a"].precision == 0.5 and table["a"].recall == 1 and table["a"].f1 == pytest.approx(2 / 3)
    assert table["b"].precision == 1 and table["b"].recall == 0.5 and overall == pytest.approx(2 / 3)
    assert table["a"].report()["count"] == 3
    with pytest.raises(ValueError, match="gold must be"):
        aggregates.yes_no_counts(["yes"], ["maybe"])


def test_mme_points():
    labels = [choice_metrics.mme_label(text) for text in ("Yes, it is", "no", "The", "I do not know", "")]
    assert labels == ["yes", "no", "other", "other", "other"]
    tasks = ["OCR"] * 4 + ["code_reasoning"] * 2
    table, sums = aggregates.mme_tasks(tasks, ["x", "y", "x", "y", "x", "x"], [True, True, True, False, True, True])
    assert (table["OCR"].accuracy, table["OCR"].accuracy_plus, table["OCR"].points) == (0.75, 0.5, 125)
    assert sums == {"perception": 125, "cognition": 200}
    assert [len(each) for each in aggregates.MME_GROUPS.values()] == [10, 4]


def test_means():
    found = aggregates.mean([0, 1, 1, 1])
    assert (found.value, found.count) == (0.75, 4) and found.error == pytest.approx(0.25)
    assert aggregates.mean([1.0]).error is None and math.isnan(aggregates.mean([]).value)
    by = aggregates.mean_by([1, 0, 1], ["x", "x", "y"])
    assert list(by) == ["x", "y"] and aggregates.mean_of_means(by) == 0.75
    assert aggregates.mean_of_means(by, {"x": 2, "y": 1}) == pytest.approx(2 / 3)  # counts give the overall mean
    assert aggregates.mean_of_means({**by, "z": aggregates.mean([])}) == 0.75
    with pytest.raises(ValueError, match="no entry for"):
        aggregates.mean_of_means(by, {"x": 1})
    with pytest.raises(ValueError, match="negative"):
        aggregates.mean_of_means(by, {"x": 1, "y": -1})
    assert math.isnan(aggregates.mean_of_means({}))


def test_pairs_do_not_depend_on_the_order_of_the_file():
    pairs = aggregates.all_right([True, False, True, True], ["a", "b", "b", "a"])
    assert (pairs.value, pairs.count) == (0.5, 2)
    assert aggregates.group_sums({"x": 1.0, "y": 2.0}, {"both": ["x", "y"], "one": ["y", "z"], "none": ["z"]}) == {
        "both": 3, "one": 2
    }  # fmt: skip


@given(st.lists(st.floats(0, 1), min_size=1), st.integers(1, 4))
def test_shards_merge_to_the_result_of_one_process(scores, shards):
    parts = [scores[place::shards] for place in range(shards)]
    by = aggregates.mean_by(sum(parts, []), [place for place, part in enumerate(parts) for _ in part])
    counts = {name: each.count for name, each in by.items()}
    assert aggregates.mean_of_means(by, counts) == pytest.approx(aggregates.mean(scores).value)

"""Evaluations with an engine that knows the answers: reports add up, whatever order or process asked."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from internvl_hub.evaluation.engines import Answer, Failure, Request, Sampling
from internvl_hub.evaluation.presets import find_preset
from internvl_hub.evaluation.prompts import THINKING_SYSTEM_PROMPT
from internvl_hub.evaluation.questions import Question
from internvl_hub.evaluation.report import Report, render
from internvl_hub.evaluation.runner import ask, make_requests, score_folder

PRESET = find_preset("scienceqa")
GREEDY = Sampling(max_new_tokens=10)
DRAWN = Sampling(n=5, temperature=1.0, seed=1)


def questions(count: int = 10) -> list[Question]:
    return [
        Question(f"q{i}", f"Number {i}?", answers=("AB"[i % 2],), options=("x", "y"), category="ab"[i // 5 % 2])
        for i in range(count)
    ]


class Oracle:
    """Right but for questions 2 (wrong), 3 (unreadable and cut) and 4 (fails); draws where several are wanted."""

    name = "oracle"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Answer] | Failure]:
        draw = random.Random(sampling.seed)
        results: list[list[Answer] | Failure] = []
        for request in requests:
            self.asked.append(request.text)
            number = int(request.text.split()[1].rstrip("?"))
            right = "AB"[number % 2]
            answers = [Answer(right if sampling.n == 1 or draw.random() < 0.7 else "C D") for _ in range(sampling.n)]
            special: dict[int, Any] = {2: [Answer("B")], 3: [Answer("well, I", False)], 4: Failure("no picture")}
            results.append(special.get(number, answers) if sampling.n == 1 else answers)
        return results


def run(folder: Path, sampling: Sampling = GREEDY, rows: list[Question] | None = None, **options: Any) -> Report:
    rows = questions() if rows is None else rows
    ask(rows, Oracle(), PRESET, sampling, folder, batch_size=3, progress=False, **options)
    return score_folder(rows, folder)


def test_a_report_adds_up(tmp_path: Path) -> None:
    content = run(tmp_path).content
    assert content["score"] == 0.7 and content["error"] == pytest.approx((0.21 / 9) ** 0.5)
    assert {name: (each["value"], each["count"]) for name, each in content["categories"].items()} == {
        "a": (0.4, 5), "b": (1.0, 5)
    }  # fmt: skip
    assert [(entry["key"], entry["reason"]) for entry in content["failures"]] == [("q4", "no picture")]
    assert [(e["key"], e["problem"], e["answer"]) for e in content["unreadable"]] == [("q3", "no_choice", "well, I")]
    assert content["questions"] == {"scored": 10, "without_gold": 0, "missing": 0} and content["cut"] == 1
    assert content["samples"] is None and content["versions"]["transformers"]


def test_the_page_says_it_all(tmp_path: Path) -> None:
    report = run(tmp_path)
    report.write(tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    for words in (
        "# ScienceQA: oracle",
        "**70.00 ± 15.28 % (mean score, letter)**",
        "10 questions scored; 1 failed and count as wrong; 1 could not be read and count as wrong; 1 answers were cut",
        "| b | 1.0000 | 5 |",
        "no picture",
        "| question | no_choice | well, I |",
        "temperature=0.0",
        "batch_size | 3",
    ):
        assert words in page
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(report.content))
    marks = [json.loads(line) for line in (tmp_path / "out" / "marks.jsonl").read_text().splitlines()]
    assert [mark["key"] for mark in marks] == [f"q{i}" for i in range(10)]
    assert (marks[2]["score"], marks[2]["read_as"], marks[2]["gold"]) == (0.0, "B", ["A"])


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("shards", [2, 3, 7])
def test_shards_merge_to_the_result_of_one_process(tmp_path: Path, shards: int, sampling: Sampling) -> None:
    whole = run(tmp_path / "whole", sampling)
    for shard in reversed(range(shards)):
        merged = run(tmp_path / "shards", sampling, shard=shard, shards=shards)
    assert merged == whole


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    run(tmp_path)
    engine = Oracle()
    ask(questions(), engine, PRESET, GREEDY, tmp_path, batch_size=3, progress=False)
    assert engine.asked == []
    ask(questions(), engine, PRESET, GREEDY, tmp_path, batch_size=3, progress=False, retry_failures=True)
    assert len(engine.asked) == 3  # the batch of question 4


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    content = run(tmp_path, shard=0, shards=2).content
    assert content["questions"] == {"scored": 6, "without_gold": 0, "missing": 4}
    assert "INCOMPLETE" in render(content) and "4 not asked yet" in render(content)


def test_the_majority_counts(tmp_path: Path) -> None:
    report = run(tmp_path, DRAWN)
    samples, rows = report.content["samples"], report.rows
    right = [[answer.text != "C D" for answer in row.answers] for row in rows]
    assert samples["count"] == 5 and sum(map(sum, right)) not in (0, 50)
    # An answer that cannot be read does not vote, so that one readable answer is enough.
    assert report.content["score"] == sum(map(any, right)) / 10 == samples["pass_at"]["5"]
    assert samples["mean"] == pytest.approx(sum(map(sum, right)) / 50) == samples["pass_at"]["1"]
    assert set(samples["pass_at"]) == {"1", "2", "4", "5"}
    assert "majority of 5 answers" in render(report.content)


def test_questions_without_gold_are_counted_apart(tmp_path: Path) -> None:
    rows = [replace(q, answers=()) if i % 2 else q for i, q in enumerate(questions(4))]
    content = run(tmp_path, rows=rows).content
    assert content["questions"] == {"scored": 2, "without_gold": 2, "missing": 0} and content["score"] == 0.5
    only = run(tmp_path / "none", rows=[replace(q, answers=()) for q in rows])
    assert "no score" in render(only.content)
    only.write(tmp_path / "none")
    assert json.loads((tmp_path / "none" / "report.json").read_text())["score"] is None


def test_another_metric_needs_no_new_answers(tmp_path: Path) -> None:
    run(tmp_path)
    assert score_folder(questions(), tmp_path, "exact").content["score"] == 0.7
    assert score_folder(questions(), tmp_path, "contains").content["metric"] == "contains"
    with pytest.raises(ValueError, match="no metric 'bleu'"):
        score_folder(questions(), tmp_path, "bleu")


def test_answers_to_other_questions_are_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match="answers to 10 other questions than these 9"):
        score_folder(questions(9), tmp_path)
    with pytest.raises(ValueError, match="preset.max_tiles: 6 there, 3 now"):
        ask(questions(), Oracle(), replace(PRESET, max_tiles=3), GREEDY, tmp_path, batch_size=3, progress=False)
    with pytest.raises(FileNotFoundError, match="holds no answers"):
        score_folder(questions(), tmp_path / "absent")


def test_fields_are_checked_before_anything_is_asked(tmp_path: Path) -> None:
    engine = Oracle()
    with pytest.raises(ValueError, match="no 'group'"):
        ask(questions(), engine, find_preset("mmvp"), GREEDY, tmp_path, progress=False)
    assert engine.asked == []


def test_requests() -> None:
    question = Question("k", "<image>\nWhich?", ("a.png",), options=("x", "y"), fields={"system": "Row."})
    ((key, request),) = make_requests([question], PRESET)
    assert (key, request.images, request.max_tiles, request.system) == ("k", ("a.png",), 6, "Row.")
    assert request.text.endswith("A. x\nB. y\nAnswer with the option's letter from the given choices directly.")
    ((_, thinking),) = make_requests([question], replace(PRESET, style="think"))
    assert thinking.system == THINKING_SYSTEM_PROMPT and "directly" not in thinking.text
    assert thinking.text.startswith("<image>\nWhich?\nA. x\nB. y")
    ((_, own),) = make_requests([question], replace(PRESET, style="think", system="Mine."))
    assert own.system == "Mine."

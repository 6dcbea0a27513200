"""Marks of single answers, and the totals over many, against counting by hand."""

import math

import pytest

from internvl_hub.evaluation.questions import Question
from internvl_hub.evaluation.scoring import SCORERS, Mark, mark_text
from internvl_hub.evaluation.totals import TOTALS, check_fields

CAT = ("cat", "dog", "fish")
# metric: (gold, options, answer, score, problem)
MARKS = {
    "exact": [("A Cat", (), " a cat ", 1, None), ("cat", (), "cats", 0, None)],
    "vqa": [("2", (), "Two.", 1, None), ("2", (), "three", 0, None)],
    "relaxed": [("100", (), "105", 1, None), ("100", (), "105.1", 0, None), ("12%", (), "0.12", 1, None)],
    "anls": [("hello", (), "hellO", 1, None), ("abcd", (), "abxx", 0.5, None), ("abcd", (), "axxx", 0, None)],
    "contains": [("cat", (), "It is a cat, I think", 1, None), ("cat", (), "catalogue", 0, None)],
    "letter": [
        ("B", CAT, "B. dog", 1, None), ("B", CAT, "a dog", 1, None), ("dog", CAT, "B", 1, None),
        ("B", CAT, "perhaps", 0, "no_choice"), ("B", (), "(B)", 1, None), ("B", CAT, "C", 0, None),
    ],
    "first_letter": [("B", (), " B is right", 1, None), ("B", (), "b", 0, None)],
    "mvbench": [("B", CAT, "(B) dog", 1, None), ("dog", CAT, "Answer: B", 1, None), ("B", CAT, "(A)", 0, None)],
    "mmmu": [
        ("B", CAT, "I think (B) is right", 1, None), ("B", CAT, "who knows", 0, "no_choice"),
        ("3.25", (), "so the answer is 3.142", 0, None), ("3.14", (), "so the answer is 3.142", 1, None),
    ],
    "mmmu_pro": [
        ("C", CAT, "Answer: A? No.\nAnswer: C", 1, None), ("C", CAT, "**Answer:** (C)", 1, None),
        ("B", CAT, "it must be (B)", 1, None),
    ],
    "pope": [("no", (), "No, there is not.", 1, None), ("yes", (), "A cat", 1, None), ("no", (), "nope", 0, None)],
    "mme": [("Yes", (), "yes.", 1, None), ("Yes", (), "It is", 0, "no_yes_no")],
    "grounding": [
        ("[[0, 0, 100, 100]]", (), "<box>[[0, 0, 100, 50]]</box>", 1, None),
        ("[[0, 0, 100, 100]]", (), "[0, 0, 100, 49]", 0, None),
        ("[[0, 0, 100, 100]]", (), "[0, 0, 0.1, 0.1]", 1, None),
        ("[[0, 0, 100, 100]]", (), "nowhere", 0, "no_box"),
    ],
    "auto": [
        ("blue", (), "Blue", 1, None), ("[[0, 0, 100, 100]]", (), "[[0, 0, 100, 100]]", 1, None),
        ("B", CAT, "dog", 1, None), ("0.5", (), r"\frac{1}{2}", 1, None),
        ("[[546.88, 531.25, 937.5, 726.56]]", (), "<box>[[547, 531, 938, 727]]</box>", 1, None),
    ],
}  # fmt: skip


@pytest.mark.parametrize("metric", MARKS)
def test_marks(metric: str) -> None:
    for gold, options, answer, score, problem in MARKS[metric]:
        mark = SCORERS[metric](answer, Question("k", "?", answers=(gold,), options=options))
        assert (mark.score, mark.problem) == (pytest.approx(score), problem), (metric, answer)


@pytest.mark.parametrize("metric", SCORERS)
def test_the_gold_answer_is_right_and_nothing_is_wrong(metric: str) -> None:
    gold = {"grounding": "[[1, 2, 300, 400]]", "box": "[[1, 2, 300, 400]]"}.get(metric, "B")
    if metric in ("pope", "mme", "yes_no"):
        gold = "no"
    question = Question("k", "?", answers=(gold,), options=CAT if gold == "B" else ())
    assert mark_text(gold, question, metric).score == 1
    for nothing in ("", "  \n"):
        assert mark_text(nothing, question, metric) == Mark(0.0, "", "empty")
    for odd in ("\x00", "(" * 2000, "\ud800", "Answer:", "[[", "\\boxed{", "½" * 50):
        assert 0 <= mark_text(odd, question, metric).score <= 1


def test_a_row_says_how_it_is_judged() -> None:
    assert SCORERS["auto"]("95", Question("k", "?", answers=("100",), task="relaxed")).score == 1
    assert SCORERS["auto"]("95", Question("k", "?", answers=("100",))).score == 0


def test_mathvista() -> None:
    def score(answer: str, gold: str, options: tuple[str, ...] = (), **fields: object) -> float:
        return SCORERS["mathvista"](answer, Question("k", "?", answers=(gold,), options=options, fields=fields)).score

    assert score("3.0", "3", answer_type="integer") == 1
    assert score('So. The answer is "1.246".', "1.25", answer_type="float", precision=2.0) == 1
    assert score("1.24", "1.25", answer_type="float", precision=2.0) == 0
    assert score("dog", "dog", CAT) == score("(B) dog", "dog", CAT) == 1
    assert score("[1, 2]", "[1, 2]", answer_type="list") == 1
    assert score("many", "3", answer_type="integer") == 0


STYLES = {
    "direct": "B",
    "final_answer": "It barks.\n\nFinal answer: B",
    "boxed": "It barks, so \\boxed{B}.",
    "think": "<think>\nIt barks.\n</think>\n\nB",
}


@pytest.mark.parametrize("style", STYLES)
def test_the_answer_is_read_out_of_the_reasoning(style: str) -> None:
    question = Question("k", "?", answers=("B",), options=CAT)
    assert mark_text(STYLES[style], question, "letter", style) == Mark(1.0, "B")
    if style != "direct":
        assert mark_text("Thinking about", question, "letter", style).problem is not None


SAME = {
    "vqa": [("two", "2"), ("A cat", "cat.")], "relaxed": [("0.5", "50%")], "letter": [("B", "B. dog")],
    "auto": [("Yes.", "yes, it is"), ("12", "12.")], "pope": [("No.", "no, not")],
}  # fmt: skip


@pytest.mark.parametrize("metric", SAME)
def test_answers_that_are_the_same_to_a_metric_vote_together(metric: str) -> None:
    question = Question("k", "?", answers=("B",), options=CAT if metric == "letter" else ())
    for first, second in SAME[metric]:
        assert SCORERS[metric](first, question).label == SCORERS[metric](second, question).label, (first, second)


# --- totals ----------------------------------------------------------------------------------------------------------


def rows(*marks: tuple[str, float], **fields: list[str]) -> list[tuple[Question, Mark]]:
    """(category, score) each; `fields` lists a field's values."""
    return [
        (
            Question(str(i), "?", answers=("yes",), category=name, fields={k: v[i] for k, v in fields.items()}),
            Mark(s, ""),
        )
        for i, (name, s) in enumerate(marks)
    ]


def test_mean() -> None:
    totals = TOTALS["mean"](rows(("a", 1), ("a", 0), ("b", 1), ("b", 1)))
    deviation = math.sqrt((3 * 0.25**2 + 0.75**2) / 3)
    assert totals.score == 0.75 and totals.error == pytest.approx(deviation / 2)
    assert {name: each["value"] for name, each in totals.categories.items()} == {"a": 0.5, "b": 1.0}
    assert math.isnan(TOTALS["mean"]([]).score)


def test_mean_and_sum_of_categories() -> None:
    scored = rows(("a", 1), ("a", 0), ("b", 1), ("b", 1), ("b", 0), ("b", 0))
    error_a, error_b = math.sqrt(0.5) / math.sqrt(2), math.sqrt(1 / 3) / 2
    mean, total = TOTALS["mean_of_categories"](scored), TOTALS["sum_of_categories"](scored)
    assert (mean.score, total.score) == (0.5, 1.0)
    assert total.error == pytest.approx(math.hypot(error_a, error_b)) and mean.error == pytest.approx(total.error / 2)
    uneven = TOTALS["mean_of_categories"](rows(("a", 1), ("b", 0), ("b", 0)))
    assert uneven.score == 0.5 and uneven.more == {"all": pytest.approx(1 / 3)}


def test_groups() -> None:
    totals = TOTALS["groups"](rows(("", 1), ("", 1), ("", 1), ("", 0), group=["p", "q", "p", "q"]))
    assert totals.score == 0.5 and totals.more == {"all": 0.75}


def test_pope() -> None:
    cases = [("random", "yes", "yes"), ("random", "no", "yes"), ("popular", "yes", "yes"), ("popular", "no", "no")]
    scored = [
        (Question(str(i), "?", answers=(gold,), category=name), Mark(float(gold == said), said))
        for i, (name, gold, said) in enumerate(cases)
    ]
    totals = TOTALS["pope"](scored)
    assert totals.score == pytest.approx((2 / 3 + 1) / 2)
    assert totals.categories["random"]["precision"] == 0.5 and totals.categories["popular"]["accuracy"] == 1


def test_mme() -> None:
    scored = [
        (Question(f"{i}", "?", images=(f"{image}.png",), answers=("yes",), category=task), Mark(score, "yes"))
        for i, (task, image, score) in enumerate([("color", 1, 1), ("color", 1, 1), ("color", 2, 1), ("color", 2, 0)])
    ]
    totals = TOTALS["mme"](scored)
    assert totals.score == 100 * (0.75 + 0.5) and totals.more == {"perception": 125.0} and totals.unit == "points"


def test_missing_fields_are_named() -> None:
    plain = Question("k", "?", answers=("yes",), where="f.jsonl:3")
    for totals, field in (("pope", "category"), ("mme", "category"), ("groups", "group")):
        with pytest.raises(ValueError, match=f"f.jsonl:3: the row has no '{field}'"):
            check_fields([plain], totals)
    with pytest.raises(ValueError, match="must be yes or no, got 'maybe'"):
        check_fields([Question("k", "?", answers=("maybe",), category="random", where="f:1")], "pope")
    check_fields([plain], "mean")

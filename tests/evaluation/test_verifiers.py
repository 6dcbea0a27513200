"""Verifiers against answers that want to be right and are not, and text that wants to break them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_hub.evaluation import verifiers
from internvl_hub.evaluation.choices import read_choice, read_yes_no
from internvl_hub.evaluation.verifiers import VERDICT_PROBLEMS, VERIFIERS, task_of_dataset, verify

NASTY = [
    None, "", "  \n", "\x00", "\x00" * 9000, "\ud800\udfff", "\u202e5\u200f", "(" * 9000, "{" * 9000,
    "}" * 9000,
    "(" * 10**6, "[" * 10**6 + "]" * 10**6, "a" * 10**6, "\\frac{" * 1500, "$" * 9000, "\\text{" * 1500, "nan",
    "NaN",
    "inf", "-inf", "1e999", "-1e999", "1e-999", "-0", "٣", "９９", "½", "²", "50%", "%", "%%%", "-", "+", ".",
    "..", "1" * 9000,
    "-" * 9000 + "1", "1," * 4000, "0x10", "1_000", "Final answer: 5", "答案：5", "\\boxed{5}", "</think>5",
    "answer" + " " * 9000 + "x", "answer" + "\u2003" * 9000, "^" + " " * 9000, "the answer is " * 600,
    "A B C D E",
    "1 2 3 4 5 6", "yes no", "True or False", "[0,0,1,1" * 1000, "[[0.1,0.2,0.3,0.4]]", "'" * 9000, "\\",
    "\\\\" * 4000,
    "import os", "__import__('os').system('x')", "x" + "'" * 900, "\n".join("ab"), "e" * 9000, "1e" * 4000,
    "5" + "!" * 400,
]  # fmt: skip
GOLD = ["5", "a dog", "B", "[[100,200,300,400]]", "\\frac{1}{2}", "yes", "", "2020", "(" * 9000]


@pytest.mark.newest
@pytest.mark.parametrize("task", sorted(VERIFIERS))
def test_no_text_is_an_error(task):
    for answer in NASTY:
        for gold in GOLD:
            verdict = verify(answer, [gold], task, options=["a dog", "5"])
            assert 0 <= verdict.score <= 1 and verdict.correct == (verdict.score > 0.9)
            assert verdict.problem is None or verdict.problem in VERDICT_PROBLEMS
            assert verdict.method in VERIFIERS[task]
        assert not verify("5", [answer or ""], task).correct or "5" in str(answer)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30), st.text(max_size=30), st.sampled_from(sorted(VERIFIERS)))
def test_any_text_gets_a_verdict(answer, gold, task):
    assert 0 <= verify(answer, [gold], task, options=[gold, "x"]).score <= 1


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1, max_size=40).filter(lambda text: verifiers._cleaned(text).strip()))
def test_gold_answers_are_right(text):
    for task in set(VERIFIERS) - {"choice", "box", "yes_no"}:
        assert verify(text, ["other", text], task).score == 1, task


@pytest.mark.parametrize(
    ("task", "gold"),
    [
        ("choice", "B"), ("choice", "(c)"), ("choice", "D. red"), ("box", "<box>[[1,2,30,40]]</box>"),
        ("box", "[.1,.2,.3,.4]"), ("yes_no", "No."),
    ],
    ids=range(6),
)  # fmt: skip
def test_gold_of_fixed_forms_is_right(task, gold):
    assert verify(gold, [gold], task) == verifiers.Verdict(1.0, True, task, None)


@pytest.mark.parametrize(
    ("answer", "gold", "task"),
    [
        ("15", "5", "auto"), ("not 5", "5", "auto"), ("1, 2, 5", "5", "auto"), ("5 or 6", "5", "auto"),
        ("4.9", "5", "auto"),
        ("a dog and a cat", "a dog", "auto"), ("god", "dog", "auto"), ("act", "cat", "math"),
        ("A cat", "A", "auto"),
        ("A or B", "A", "auto"), ("A, B, C, D", "A", "auto"), ("Final answer: 5", "5", "auto"),
        ("the", "A", "auto"),
        ("2021", "2020", "auto"), ("2021", "2020", "geometry"), ("5 cm", "5 m", "auto"), ("5cm", "5m", "auto"),
        ("5x", "5", "auto"),
        ("5 is wrong", "5", "auto"), ("-5", "5", "math"), ("0.001", "0", "auto"), ("1e999", "5", "auto"),
        ("nan", "5", "auto"),
        ("no", "nope", "auto"), ("A. cat or B. dog", "A", "choice"), ("105", "100", "auto"),
        ("106", "100", "geometry"),
        ("yes and no", "yes", "yes_no"), ("red", "reddish", "contains"),
        ("[0,0,10,10] [0,0,10,10]", "[0,0,10,10]", "box"),
        ("1 2", "12", "auto"), ("1/2/3", "1/2", "auto"), ("x=5, x=6", "5", "auto"), ("∞", "5", "auto"),
        ("5%", "5000", "auto"),
    ],
    ids=range(35),
)  # fmt: skip
def test_wrong_answers(answer, gold, task):
    assert not verify(answer, [gold], task).correct


@pytest.mark.parametrize(
    ("answer", "gold", "task"),
    [
        ("5.", "5", "auto"), ("five", "5", "auto"), ("The dog", "dog", "auto"), ("(A)", "A", "auto"),
        ("\u200fA\u200e", "A", "choice"),
        ("A. cat", "A", "auto"), ("0.5", "\\frac{1}{2}", "auto"), ("$\\dfrac12$", "\\frac{1}{2}", "latex"),
        ("1,000", "1000", "auto"),
        ("1000.9", "1000", "math"), ("5 cm", "5", "auto"), ("5 apples", "5", "auto"), ("50%", "50", "math"),
        ("50%", "0.5", "math"),
        ("60^\\circ", "60", "math"), ("x=5", "5", "math"), ("(x+1)^2", "x^2+2x+1", "math"),
        ("3\\sqrt{2}", "\\sqrt{18}", "math"),
        ("104", "100", "geometry"), ("0.11", "11%", "relaxed"), ("\\boxed{7}", "7", "math"),
        ("\uff15", "5", "math"), ("\u22125", "-5", "math"),
        ("-0", "0", "math"), ("[[100,200,300,400]]", "[0.1,0.2,0.3,0.4]", "box"),
        ("Yes, it is.", "yes", "yes_no"), ("True", "yes", "yes_no"),
        ("A red car", "red", "contains"), ("是的", "Yes", "yes_no"), ("\\text{B}", "B", "choice"),
    ],
    ids=range(30),
)  # fmt: skip
def test_right_answers(answer, gold, task):
    assert verify(answer, [gold], task).correct


def test_the_best_verifier_counts_and_is_named():
    assert verify("B", ["B. dog"], "auto", ["cat", "dog"]).method == "choice"
    assert verify("1/2", ["0.5"]).method == "math"
    assert verify("two", ["2"]).method == "vqa"
    votes = ["cat"] * 3 + ["dog"] * 7
    assert verify("cat", votes).score == pytest.approx(0.9) and not verify("cat", votes).correct
    assert verify("cat", votes, threshold=0.5).correct
    assert verify("abcx", ["abcd"], "anls") == verifiers.Verdict(0.75, False, "anls", None)


def test_problems_are_named():
    assert verify(None, ["5"]).problem == verify(" ", ["5"]).problem == verify("\u200b", ["5"]).problem == "empty"
    assert verify("5", []).problem == verify("5", [" "]).problem == "no_gold"
    assert verify("A cat", ["A"], "choice").problem == "no_choice"
    assert verify("left", ["[1,2,3,4]"], "box").problem == "no_box"
    assert verify("maybe", ["yes"], "yes_no").problem == "no_yes_no"
    assert verify("x" * 20_000, ["5"]).problem == "too_long" and verify("x" * 20_000, ["x" * 20_000]).correct
    assert verify("A cat", ["A"]).problem is None  # other verifiers could judge it
    assert verify("5", "5").correct  # a lone string is one gold answer, not its characters


def test_unknown_tasks_are_errors():
    with pytest.raises(ValueError, match="task must be one of exact, relaxed.*got 'bleu'"):
        verify("5", ["5"], "bleu")


def test_tasks_of_data_sets():
    names = [
        "ChartQA",
        "docvqa_train",
        "InfoVQA",
        "SROIE",
        "CLEVR-Math",
        "GEOS",
        "Geometry3K",
        "MAVIS-Function",
        "VQAv2",
        "",
    ]
    found = [task_of_dataset(name) for name in names]
    assert found == ["relaxed", "anls", "anls", *["geometry"] * 4, "geometry_latex", "auto", "auto"]
    assert set(found) <= set(VERIFIERS)


@pytest.mark.parametrize(
    ("text", "with_options", "without"),
    [
        ("A", "A", "A"), ("(b)", "B", "B"), ("B.", "B", "B"), ("A. cat", "A", "A"), ("A cat", None, None),
        ("A. dog", None, "A"),
        ("dog", "B", None), ("The answer is B", "B", "B"), ("The correct answer is (B) dog.", "B", "B"),
        ("答案是B", "B", "B"),
        ("选 B", "B", "B"), ("C", None, "C"), ("A. B", None, None), ("[B]", "B", "B"), ("**B**", "B", "B"),
        ("Cat!", None, None),
        ("Answer B is wrong", None, None), ("AB", None, None), ("I", None, "I"), ("(A) not (B)", None, None),
        ("B\x00", None, None),
    ],
    ids=range(21),
)  # fmt: skip
def test_choices(text, with_options, without):
    assert read_choice(text, ["A. cat", "dog."]) == with_options
    assert read_choice(text) == without


def test_options_that_read_alike_name_none():
    assert read_choice("cat", ["cat", "Cat."]) is None and read_choice("A", ["cat", "Cat."]) == "A"
    assert read_choice("B", ["B", "A"]) == "A"  # the text of an option comes before its letter
    assert read_yes_no("No, it is true that") is None and read_yes_no("nope") is None

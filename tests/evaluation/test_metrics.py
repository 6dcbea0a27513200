"""Scores of benchmarks against brute force and the definitions' own borders."""

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_hub.evaluation import choice_metrics
from internvl_hub.evaluation.choice_metrics import mmbench_letter, mmmu_choice, mmmu_open_match
from internvl_hub.evaluation.text_metrics import anls, contains_word, exact_match, relaxed_accuracy
from internvl_hub.evaluation.vqa_score import normalize_answer, vqa_score


def plain_levenshtein(first: str, second: str) -> int:
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        previous, row = row, [i]
        for j, b in enumerate(second, start=1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (a != b)))
    return row[-1]


WORDS = st.text("abAB .1\u00e9猫", max_size=8)


@given(WORDS, st.lists(WORDS, max_size=3))
def test_anls_is_levenshtein_over_the_given_lengths(answer, gold):
    best = 0.0
    for text in gold:
        first, second = (re.sub(r"\s+", " ", each.strip().lower()) for each in (answer, text))
        length = max(len(answer), len(text))
        best = max(best, 1 - plain_levenshtein(first, second) / length if length else 1.0)
    assert anls(answer, gold) == (best if best >= 0.5 else 0)


def test_anls_borders():
    assert anls("abcd", ["abxy"]) == 0.5  # exactly the threshold counts
    assert anls("abcde", ["abxyz"]) == 0.0
    assert anls(" ABC  d ", ["abc d"]) == 1.0
    assert anls("abc", ["abd   "]) == pytest.approx(1 - 1 / 6)  # length of the text as given
    assert anls("x", []) == 0.0


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("105", "100", 1), ("95", "100", 1), ("105.01", "100", 0), ("94.9", "100", 0), ("1.05", "1", 1),
        ("-105", "-100", 1), ("5", "-5", 0), ("12%", "0.12", 1), ("12", "12%", 0), ("12.5%", "12%", 1),
        ("0", "0", 1), ("0.0", "0", 0), ("0.001", "0", 0), ("Blue", "blue ", 1), ("blue", "5", 0),
        ("nan", "nan", 1), ("nan", "5", 0), ("inf", "5", 0), ("1e999", "5", 0), ("5", "1e999", 0),
        ("-0", "0", 0),
        ("2021", "2020", 1), ("1e308", "-1e308", 0), ("5,000", "5000", 0),
    ],
    ids=range(24),
)  # fmt: skip
def test_relaxed_accuracy(answer, gold, score):
    assert relaxed_accuracy(answer, ["nothing", gold]) == score


def test_years_are_exact_where_asked():
    assert relaxed_accuracy("2021", ["2020"], exact_years=True) == 0
    assert relaxed_accuracy("2020.0", ["2020"], exact_years=True) == 1
    assert relaxed_accuracy("1999", ["1990"], exact_years=True) == 1  # the rule knows this century only
    assert relaxed_accuracy("20500", ["20000"], exact_years=True) == 1


def brute_force_vqa(answer: str, gold: list[str]) -> Fraction:
    """The definition: leave out every annotator in turn, count the matches among the others."""
    scores = []
    for left_out in range(len(gold)):
        others = [text for place, text in enumerate(gold) if place != left_out]
        scores.append(min(Fraction(1), Fraction(others.count(answer), 3)))
    return sum(scores) / len(scores)


@given(st.lists(st.sampled_from(["cat", "dog", "red bird", "4"]), min_size=10, max_size=12), st.data())
def test_vqa_score_is_the_mean_over_left_out_annotators(gold, data):
    answer = data.draw(st.sampled_from(["cat", "dog", "red bird", "4", "fish"]))
    assert vqa_score(answer, gold) == float(brute_force_vqa(answer, gold))


def test_vqa_score_with_few_answers_takes_any():
    assert vqa_score("The cat.", ["cat"]) == vqa_score("two", ["dog", "2"]) == 1
    assert vqa_score("cats", ["cat"]) == vqa_score("cat", []) == 0


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat's, hat?", "cat 's hat"), ("None", "0"), ("Ten", "10"), ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("hadnt've", "hadn't've"), ("3.5 m.", "3.5 m"), ("a.b.", "ab"), ("1,000", "1000"),
        ("well-known", "well known"),
        ("well - known", "well known"), ("yes/no", "yes no"), ("x\ty\nz", "x y z"), ("a", ""), ("." * 100, ""),
        ("oclock", "o'clock"), ("shed well were", "shed well were"), ("$5.", "$5"), ("-5", "5"), ("id", "id"),
    ],
    ids=range(20),
)  # fmt: skip
def test_vqa_normaliser(text, normal):
    assert normalize_answer(text) == normal


def test_articles_and_numbers_stay_what_they_are():
    """The original adds every word it meets to its table of numbers and takes the answer "a" for nothing."""
    assert vqa_score("the", ["A"]) == vqa_score("?", ["a"]) == 0
    assert vqa_score("a", ["A"]) == 1
    assert normalize_answer("none") == normalize_answer("zero") == "0"


def test_contained_words():
    assert contains_word("It is a Red car.", ["red"]) == 1
    assert contains_word("It is scared", ["red"]) == 0
    assert contains_word("a  fire truck", ["Fire\ntruck"]) == 1
    assert contains_word("这是红色的车", ["红色"]) == 1
    assert contains_word("anything", ["", "  "]) == 0
    assert contains_word("c++ is old", ["c++"]) == 1
    assert exact_match(" Dog ", ["cat", "dog"]) == 1 and exact_match("dogs", ["dog"]) == 0


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("No", "no"), ("Nope", "yes"), ("It is not there", "no"), ("Yes. no", "yes"), ("Yes, no", "no"),
        ("", "yes"), ("NO", "yes"), ("no.", "no"),
    ],
    ids=range(8),
)  # fmt: skip
def test_pope_labels(text, label):
    assert choice_metrics.pope_label(text) == label


OPTIONS = {"A": "a cat", "B": "dog", "C": "a cat and a dog"}


def test_option_letters():
    answers = ("B", "B. dog", "dog", "x", "", "A cat", "so it's a dog", "bird")
    assert [mmbench_letter(text, OPTIONS) for text in answers] == ["B", "B", "B", "x", "", "A", "B", "bird"]
    assert mmbench_letter("this is a cat and a dog", OPTIONS) == "A"  # the first option contained, as published
    assert [choice_metrics.first_letter(text) for text in (" C. x", "", "  ")] == ["C", "", ""]
    matches = [
        choice_metrics.mvbench_match(text, "(B) Walking.")
        for text in ("(B)", "B.", "Answer: b", "b walking", "A", "", "(", "Walking")
    ]
    assert matches == [True, True, True, True, False, False, False, False]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(A) or rather (B).", "B"), ("B", "B"), ("A B C", "C"), ("I think (A), not B", "A"),
        ("the answer: B", "B"),
        ("well I am sure that it is a dog", "B"), ("a dog", None), ("", None), ("ABC", None), ("(b)", None),
    ],
    ids=range(10),
)  # fmt: skip
def test_mmmu_letters(text, letter):
    assert mmmu_choice(text, {"A": "cat", "B": "dog", "C": ""}) == letter


def test_mmmu_chance_is_seeded():
    drawn = [mmmu_choice(f"no idea {number}", OPTIONS, seed=1) for number in range(50)]
    assert set(drawn) == set(OPTIONS)
    assert drawn == [mmmu_choice(f"no idea {number}", OPTIONS, seed=1) for number in range(50)]
    assert drawn != [mmmu_choice(f"no idea {number}", OPTIONS, seed=2) for number in range(50)]
    assert mmmu_choice("no idea", {}, seed=1) is None


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("So the answer is 12.004 cm", ["12"], True), ("x = 1,234.5", ["1234.50"], True),
        ("It is a red car", ["Red"], True),
        ("The result is 13", ["12"], False), ("nan", ["nan"], True), ("", ["x"], False), ("x", [""], False),
        ("the answer is b", ["b"], True), ("the answer is a club", ["b"], False),
        ("area\nis 2e3 units", ["2000"], True), ("first 5\nthen it is 7", ["5"], False),
    ],
    ids=range(11),
)  # fmt: skip
def test_mmmu_open_answers(text, gold, right):
    assert mmmu_open_match(text, gold) is right


@given(st.text("12.,eE+- ax", max_size=20))
def test_mmmu_numbers_match_as_the_published_patterns_do(text):
    published = [
        r"-?\b\d{1,3}(?:,\d{3})+\b",
        r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
        r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
    ]
    for mine, original in zip(choice_metrics._NUMBERS, published, strict=True):
        assert mine.findall(text) == re.findall(original, text)


@given(st.text(min_size=1).filter(str.strip))
def test_gold_answers_score_one(text):
    for metric in (exact_match, anls, relaxed_accuracy, vqa_score, contains_word):
        assert metric(text, ["something else", text]) == 1, metric
    assert vqa_score(text, [text] * 10) == 1


@given(st.text(), st.text())
def test_any_text_scores_between_0_and_1(answer, gold):
    for metric in (exact_match, anls, relaxed_accuracy, vqa_score, contains_word):
        assert 0 <= metric(answer, [gold]) <= 1
    choice_metrics.pope_label(answer), choice_metrics.mme_label(answer), mmbench_letter(answer, {"A": gold})
    choice_metrics.mvbench_match(answer, gold), mmmu_choice(answer, {"A": gold}), mmmu_open_match(answer, [gold])

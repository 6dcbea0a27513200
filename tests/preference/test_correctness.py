"""Judging and pairing the answers to one question."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from internvl_hub.evaluation.engines import Answer
from internvl_hub.evaluation.questions import Question
from internvl_hub.preference import correctness
from internvl_hub.preference.correctness import CUT, MAX_CHARACTERS, Caps, JudgedAnswer, judge, pair

COLOUR = Question("colour", "Which colour?", answers=("red",))
RIGHT = "I look at it.\nIt is like blood.\n\nFinal answer: red"


def kinds(texts: list[str], style: str = "direct", question: Question = COLOUR, task: str = "exact") -> list[str]:
    return [answer.kind for answer in judge(question, [Answer(text) for text in texts], style, task)]


def answers(**numbers: int) -> list[JudgedAnswer]:
    """So many judged answers of each kind, all different."""
    made = [(kind, number) for kind, count in numbers.items() for number in range(count)]
    return [JudgedAnswer(i, f"{kind} {number}", kind, f"{kind[:1]}{number}") for i, (kind, number) in enumerate(made)]


# ------------------------------------------------------------------------------------------------------------- judging


def test_answers_are_judged_by_what_they_say() -> None:
    assert kinds(["red", "Red", "blue", "", " \n", "\ud800"]) == [
        "correct", "correct", "incorrect", "unusable", "unusable", "unusable",
    ]  # fmt: skip
    assert kinds([RIGHT, RIGHT.replace("red", "blue"), "red"], "final_answer") == ["correct", "incorrect", "format"]


@pytest.mark.parametrize("style", ["direct", "final_answer", "boxed", "think"])
@pytest.mark.parametrize("task", ["auto", "exact", "relaxed", "anls", "choice", "box"])
def test_hostile_answers_are_judged_and_never_correct(style: str, task: str) -> None:
    texts = [
        "\x00", "\x00" * 50, "Final answer:" * 500, "Final answer: \n" * 100, "\\boxed{" * 500, "<think>" * 300,
        "</think>" * 300, "<html><body><b>red?</b></body></html>", "<image>", "[[[[", "9" * 5000,
        "\u202ered\u202c" * 30,
        "Answer: \\boxed{}", "}" * 1000, "z" * (MAX_CHARACTERS + 1),
    ]  # fmt: skip
    found = judge(COLOUR, [Answer(text) for text in texts], style, task)
    assert [answer.sample for answer in found] == list(range(len(texts)))
    assert all(answer.kind != "correct" for answer in found)
    assert found[-1].kind == "unusable" and "200,000" in (found[-1].problem or "")


def test_a_cut_answer_is_a_format_failure_whatever_it_says() -> None:
    (cut,) = judge(COLOUR, [Answer("red", complete=False)], "direct", "exact")
    assert (cut.kind, cut.problem) == ("format", CUT)


def test_an_answer_that_no_verifier_could_judge_is_not_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = correctness.Verdict(0.0, False, "math", "timeout")
    monkeypatch.setattr(correctness, "verify", lambda *_: verdict)
    (answer,) = judge(COLOUR, [Answer("x^2")], "direct", "math")
    assert answer.kind == "unusable" and "timeout" in (answer.problem or "")


def test_the_threshold_is_exclusive() -> None:
    votes = Question("votes", "?", answers=("red",) * 3 + ("blue",) * 7)  # 3 votes of 10 are worth 0.9
    (answer,) = judge(votes, [Answer("red")], "direct", "vqa")
    assert answer.verdict is not None and answer.verdict.score == pytest.approx(0.9) and answer.kind == "incorrect"


# ------------------------------------------------------------------------------------------------------------- pairing


@pytest.mark.parametrize(("right", "wrong", "bad"), [(3, 5, 2), (4, 6, 0), (1, 1, 1), (0, 4, 4), (4, 0, 3), (9, 9, 0)])
def test_without_a_cap_every_pair_comes_once(right: int, wrong: int, bad: int) -> None:
    judged = answers(correct=right, incorrect=wrong, format=bad)
    found = pair(judged, COLOUR, (10**6, 10**6), seed=0)
    expected = Counter(itertools.product(judged[:right], judged[right : right + wrong]))
    assert Counter(found.correctness) == expected
    assert Counter(found.format) == Counter(itertools.product(judged[:right], judged[right + wrong :]))


@pytest.mark.parametrize("cap", [0, 1, 3, 7, 12, 15])
@pytest.mark.parametrize(("right", "wrong"), [(3, 5), (4, 6), (6, 4), (2, 30), (5, 5)])
def test_a_cap_keeps_answers_in_equal_numbers(right: int, wrong: int, cap: int) -> None:
    judged = answers(correct=right, incorrect=wrong, format=wrong)
    found = pair(judged, COLOUR, (cap, cap), seed=1)
    for pairs in (found.correctness, found.format):
        assert len(pairs) == len(set(pairs)) == min(cap, right * wrong)
        for side, size in ((0, right), (1, wrong)):
            used = Counter(both[side].text for both in pairs)
            low, high = len(pairs) // size, -(-len(pairs) // size)
            assert set(used.values()) <= {low, high} and (len(used) == size or low == 0)


def test_the_choice_depends_on_the_seed_and_the_key_alone() -> None:
    judged = answers(correct=6, incorrect=6)
    first = pair(judged, COLOUR, (5, 5), seed=0)
    assert pair(judged, COLOUR, (5, 5), seed=0) == first
    assert pair(judged, Question("colour", "Another text", answers=("red",)), (5, 5), seed=0) == first
    assert pair(judged, COLOUR, (9, 5), seed=0).correctness[:5] == first.correctness  # a larger cap adds
    others = [pair(judged, Question(f"q{i}", "?"), (5, 5), seed=0) for i in range(5)]
    others += [pair(judged, COLOUR, (5, 5), seed=seed) for seed in range(1, 5)]
    assert len({other.correctness for other in [first, *others]}) == 10


def test_equal_texts_are_one_answer() -> None:
    texts = ["red", " red\n", "blue", "blue", "red"]
    judged = judge(COLOUR, [Answer(text) for text in texts], "direct", "exact")
    found = pair(judged, COLOUR, (15, 15), seed=0)
    assert [(c.sample, r.sample) for c, r in found.correctness] == [(0, 2)]
    assert found.duplicates == 3


def test_a_cut_answer_gives_way_to_the_same_one_that_ended() -> None:
    judged = judge(COLOUR, [Answer("red", complete=False), Answer("red"), Answer("blue")], "direct", "exact")
    found = pair(judged, COLOUR, (15, 15), seed=0)
    assert [(c.sample, r.sample) for c, r in found.correctness] == [(1, 2)] and not found.format


def test_wrong_answers_that_hold_the_right_one_are_left_out() -> None:
    texts = ["red", "dark red", "blue", "red blue", "tired"]
    judged = judge(COLOUR, [Answer(text) for text in texts], "direct", "exact")
    found = pair(judged, COLOUR, (15, 15), seed=0)
    assert {rejected.text for _, rejected in found.correctness} == {"blue", "tired"} and found.contained == 2
    alias = Question("colour", "?", answers=("red", "crimson"))  # another gold answer than the chosen one's
    judged = judge(alias, [Answer(text) for text in ("red", "a crimson one", "blue")], "direct", "exact")
    assert {rejected.text for _, rejected in pair(judged, alias, (15, 15), 0).correctness} == {"blue"}
    text = RIGHT.replace("Final answer: red", "It is red.")  # right, but not as asked
    judged = judge(COLOUR, [Answer(RIGHT), Answer(text)], "final_answer", "exact")
    assert [rejected.problem for _, rejected in pair(judged, COLOUR, (15, 15), 0).format] == ["no_trigger"]


def test_chosen_and_rejected_always_differ() -> None:
    generator = random.Random(0)
    words = ["red", "blue", "", " red", "red ", "\x00", "blue\n", "dark red", "RED", "\u00a0red"]
    for number in range(300):
        sampled = [Answer(generator.choice(words), generator.random() > 0.2) for _ in range(generator.randrange(12))]
        judged = judge(COLOUR, sampled, "direct", "exact")
        found = pair(judged, Question(str(number), "?", answers=("red",)), (15, 15), seed=number)
        for chosen, rejected in (*found.correctness, *found.format):
            assert chosen.text.strip() and rejected.text.strip() and chosen.text.strip() != rejected.text.strip()
            assert chosen.kind == "correct" and rejected.kind in ("incorrect", "format")


def test_caps() -> None:
    assert Caps().of_file(500_000) == (15, 15) and Caps().of_file(500_001) == (3, 3)
    assert Caps(7, 0).of_file(1) == Caps(7, 0).of_file(10**6) == (7, 0) and Caps(format=2).of_file(1) == (15, 2)
    with pytest.raises(ValueError, match="must be 0 or more, got -1"):
        Caps(-1)

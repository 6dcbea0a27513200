"""The first half of an answer, and what becomes of its continuation."""

from __future__ import annotations

import random
import unicodedata

import pytest

from internvl_hub.evaluation.engines import Answer, Failure, Request, Sampling
from internvl_hub.preference.dropout_ntp import (
    HalfAnswers,
    blind_request,
    first_half,
    why_not_chosen,
    why_not_rejected,
    without_media,
)
from internvl_hub.tests.preference.fake_engines import FakeEngine


@pytest.mark.parametrize(
    ("answer", "half"),
    [
        ("one two three four", "one two"), ("one two three", "one"), ("  one  two\nthree four ", "  one  two"),
        ("一只猫在睡觉", "一只猫"), ("你好，世界。", "你好，"), ("ねこがいる", "ねこ"),
        ("고양이가 자고 있다", "고양이가"),
        ("The word 猫 means cat", "The word"), ("图中有 3 只 cats 和 dogs", "图中有 3"), ("dog猫", "dog"),
        ("a.b c.d", "a.b"),
        ("<box>[[1, 2, 3, 4]]</box>", "<box>[[1, 2,"), ("\x00 x", "\x00"),
    ],
)  # fmt: skip
def test_first_half(answer: str, half: str) -> None:
    assert first_half(answer) == half


@pytest.mark.parametrize("answer", ["", " \n", "word", "猫", "  猫 ", "a" * 1_000_000, "\x00"])
def test_what_has_one_unit_has_no_half(answer: str) -> None:
    assert first_half(answer) is None


def test_marks_stay_with_their_letters() -> None:
    for text in ("ที่นี่มีแมวอยู่", "ここにがぎぐげご"):  # Thai vowels above; kana with combining voice marks
        decomposed = unicodedata.normalize("NFD", text)
        half = first_half(decomposed)
        assert half and not unicodedata.combining(decomposed[len(half)])
        assert unicodedata.category(decomposed[len(half)]) != "Mn"


def test_it_is_always_a_proper_beginning() -> None:
    generator = random.Random(0)
    for _ in range(2000):
        text = "".join(generator.choices("ab 猫狗ก็ \n\u3099.,", k=generator.randrange(12)))
        half = first_half(text)
        if half is not None:
            assert half.strip() and text.startswith(half) and text[len(half) :].strip() and not half[-1].isspace()
    for count in range(2, 40):  # English: the words that splitting at white space gives
        words = [f"w{i}" for i in range(count)]
        assert first_half(" ".join(words)).split() == words[: count // 2]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("<image>\nWhat?", "What?"), ("What is <image> here?", "What is here?"), ("Look: <video>", "Look:"),
        ("Image-1: <image>\nImage-2: <image>\nCompare Image-1 and Image-2.", "Compare Image-1 and Image-2."),
        ("Compare Image-1: <image> with Image-2: <image>.", "Compare with ."), ("<image><image>\nQ", "Q"), ("Q", "Q"),
    ],
)  # fmt: skip
def test_the_question_loses_its_marks(text: str, plain: str) -> None:
    assert without_media(text) == plain


def test_the_blind_request_sees_nothing() -> None:
    request = Request("<image>\nWhat?", ("a.png",), system="Be brief.", max_tiles=3)
    assert blind_request(request, "A cat") == Request("What?", system="Be brief.", prefix="A cat", max_tiles=3)


def test_reasons() -> None:
    assert why_not_chosen(Answer("a cat sleeps"), "direct") is None
    for answer, style, part in (
        (Answer(" "), "direct", "empty"), (Answer("a cat", complete=False), "direct", "token limit"),
        (Answer("cat"), "direct", "too short"), (Answer("a cat sleeps"), "boxed", "no_box"),
        (Answer("x " * 200_000), "direct", "characters"), (Answer("a \ud800"), "direct", "Unicode"),
    ):  # fmt: skip
        assert part in (why_not_chosen(answer, style) or "")
    assert why_not_rejected(Answer(" dog"), "a cat", "a") is None
    for answer, part in (
        (Answer(""), "empty"), (Answer(" cat"), "same"), (Answer(" cat \n"), "same"),
        (Answer(" dog", complete=False), "token limit"), (Answer("\udfff"), "Unicode"),
    ):  # fmt: skip
        assert part in (why_not_rejected(answer, "a cat", "a") or "")
    assert why_not_rejected(Answer(" dog", complete=False), "a cat", "a", keep_cut=True) is None


def test_only_what_has_a_prefix_is_asked() -> None:
    inner = FakeEngine(lambda request, seed, number: f" after {request.prefix}")
    requests = [Request("Q"), Request("Q", prefix="A"), Request(""), Request("Q", prefix="B")]
    results = HalfAnswers(inner).sample(requests, Sampling())
    assert isinstance(results[0], Failure) and results[2] == [Answer("")]
    assert [results[1], results[3]] == [[Answer(" after A")], [Answer(" after B")]]
    assert inner.batches == [[requests[1], requests[3]]]

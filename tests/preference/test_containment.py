"""Which short answers count as contained in others."""

from __future__ import annotations

import pytest

from internvl_hub.preference.containment import contains_answer


@pytest.mark.parametrize(
    ("short", "text"),
    [
        ("red", "a red car"), ("Red.", "RED"), ("two  cats", "there are two\ncats here"), ("5", "(5)"),
        ("a a", "ba a a"), ("5", "5 apples"),
        ("5", "5."), ("5", "x = 5, y"), ("5", "3-5"), ("5", "5%"), ("猫", "一只猫在睡"),
        ("５", "5 apples"), ("A", "A. cat"),
        ("12", "12公里"), ("don't", "I don't know"), ("**5**", "it is 5"), ("4 cm", "about 4 cm long"),
        ("x.y", "the x.y"),
    ],
)  # fmt: skip
def test_whole_words_are_found(short: str, text: str) -> None:
    assert contains_answer(short, text)


@pytest.mark.parametrize(
    ("short", "text"),
    [
        ("red", "a tired driver"), ("5", "15"), ("5", "1.5"), ("5", "5.5"), ("5", "5,000"), ("5", "-5"),
        ("000", "5,000"),
        ("5", "x = -5"), ("1", "1/2"), ("5", "5:30"), ("5", "5th"), ("A", "a dog"), ("a", "A dog"), ("", "anything"),
        ("...", "anything"), ("\x00", ""), ("cat", "concatenate"), ("x.y", "x-y"), ("no", "not"),
        ("狗", "一只猫"),
    ],
)  # fmt: skip
def test_parts_of_words_and_numbers_are_not(short: str, text: str) -> None:
    assert not contains_answer(short, text)


def test_long_texts_take_no_long_time() -> None:
    assert not contains_answer("aa", "a" * 200_000)
    assert contains_answer("needle", "hay " * 200_000 + "needle")

"""Answers to questions with options and to yes-no questions, read as each benchmark reads them.

Every reader takes any text, the empty one too (the original scripts fail on it), and says "cannot tell" as None or as
the text itself, never by chance unless asked to. Letters compare by equality. `verifiers.py` has a stricter reader
that belongs to no benchmark.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence

_END_MARKS = ",.!?;:'"
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
# MMMU's numbers. The (?<!\d) change no match, but keep long runs of digits from being read from every digit again.
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def pope_label(text: str) -> str:
    """POPE: "no" where the first sentence has the word "No", "not" or "no", else "yes" ("nope" is a yes)."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def mme_label(text: str) -> str:
    """MME: "yes" or "no" where it stands within the first four letters, else "other"."""
    start = text.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def first_letter(text: str) -> str:
    """SEED-Image: the first character of the stripped answer; "" for an empty one."""
    return text.strip()[:1]


def mmbench_letter(text: str, options: Mapping[str, str]) -> str:
    """MMBench and CCBench: the letter that an answer names.

    A single character is taken as it is; then a first character that is an option's letter; then the first option
    whose text stands in the answer; else the answer itself.

    Args:
        text: The answer.
        options: Letter to text.
    """
    text = text.strip()
    if len(text) <= 1 or text[0] in options:
        return text[:1]
    return next((letter for letter, option in options.items() if option and option in text), text)


def mvbench_match(text: str, gold: str) -> bool:
    """MVBench: whether the first word of an answer names the option of `gold`, such as "(A) walking".

    Case and full stops do not count. An answer without a letter or digit in its first word is wrong, though "" would
    be contained in anything.
    """
    word = (text.strip().removeprefix("Answer:").strip().lower().split() or [""])[0].replace(".", "")
    wanted = (gold.strip().lower().split() or [""])[0]
    return any(map(str.isalnum, word)) and any(map(str.isalnum, wanted)) and (word in wanted or wanted in word)


def mmmu_choice(text: str, options: Mapping[str, str], seed: int | None = None) -> str | None:
    """MMMU, multiple choice: the letter that an answer names last.

    In this order: letters in brackets; letters between spaces; option texts, in answers of more than five words.

    Args:
        text: The answer.
        options: Letter to text.
        seed: Where nothing is found, draws a letter with this seed and the answer, as the original draws with the
            global state; None gives None, which is wrong.
    """
    for mark in _END_MARKS:
        text = text.strip(mark)
    padded = f" {text} "
    found = {letter: padded.rfind(f"({letter})") for letter in options}
    if max(found.values(), default=-1) < 0:
        found = {letter: padded.rfind(f" {letter} ") for letter in options}
    if max(found.values(), default=-1) < 0 and len(padded.split()) > 5:
        lower = padded.lower()
        found = {letter: lower.rfind(option.lower()) if option else -1 for letter, option in options.items()}
    place = max(found.values(), default=-1)
    if place >= 0:
        return next(letter for letter in options if found[letter] == place)
    return None if seed is None or not options else random.Random(f"{seed}:{text}").choice(list(options))


def mmmu_open_match(text: str, gold: Sequence[str]) -> bool:
    """MMMU, open questions: whether a key phrase of an answer holds a gold text, or a gold number is among its own.

    Numbers are compared after rounding to two decimals; gold texts without any character never match.
    """
    wanted = [value for each in gold if each.strip() for value in _number_or_texts(each)]
    found = [value for phrase in mmmu_key_phrases(text) for value in _number_or_texts(phrase)]
    numbers = {value for value in found if isinstance(value, float)}
    texts = [value for value in found if isinstance(value, str)]
    return any(
        value in numbers if isinstance(value, float) else any(value in each for each in texts) for value in wanted
    )


def mmmu_key_phrases(text: str) -> list[str]:
    """What stands behind words such as "is" or "answer" in every line (the shortest such rest), and all its numbers.

    In the last line "=" counts as such a word. Without any key phrase the whole answer is one.
    """
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    phrases = []
    for number, line in enumerate(lines, start=1):
        keys = (*_KEYS, "=") if number == len(lines) else _KEYS
        rests = [line.split(key)[-1].strip() for key in keys if key in line]
        shortest = min((rest for rest in rests if rest), key=len, default="")
        if shortest and shortest not in _END_MARKS:
            phrases.append(shortest)
    phrases = phrases or [text]
    return phrases + [found for phrase in phrases for pattern in _NUMBERS for found in pattern.findall(phrase)]


def _number_or_texts(text: str) -> list[float | str]:
    """A rounded number; or the lower-cased text, a single character with a space at either side (it matches less)."""
    text = text.strip()
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        return [round(value, 2)]
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]

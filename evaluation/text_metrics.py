"""Scores of short answers: exact match, ANLS, relaxed accuracy, containment.

Pure functions of an answer and its gold answers, 0 to 1, the best over the gold answers. Definitions are those of the
benchmarks (docs/metrics.md says where results differ from the original scripts and why).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05
_ROUNDING = 1e-12  # so that 1.05 is within 5 % of 1, which binary fractions deny

_CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[^\W{_CJK}]")


def exact_match(answer: str, gold: Sequence[str]) -> float:
    """1 where the stripped, lower-cased answer equals a gold answer treated alike (OCRVQA, AI2D), else 0."""
    return float(answer.strip().lower() in {text.strip().lower() for text in gold})


def anls(answer: str, gold: Sequence[str], threshold: float = ANLS_THRESHOLD) -> float:
    """Normalised Levenshtein similarity of DocVQA and InfoVQA (Biten et al. 2019, Scene Text VQA, section 4).

    1 - distance / length, where the distance is between lower-cased texts with single spaces, and the length is that
    of the longer text as it was given. Less than `threshold` counts 0; `threshold` itself counts.

    Raises:
        ImportError: rapidfuzz is missing.
    """
    distance = _levenshtein()
    best = 0.0
    for text in gold:
        first, second = (" ".join(each.strip().lower().split()) for each in (text, answer))
        length = max(len(text), len(answer))
        best = max(best, 1 - distance(first, second) / length if length else 1.0)
    return best if best >= threshold else 0.0


def relaxed_accuracy(
    answer: str, gold: Sequence[str], tolerance: float = RELAXED_TOLERANCE, exact_years: bool = False
) -> float:
    """1 for a number within `tolerance` of a gold number, or the same text in either case (ChartQA), else 0.

    "%" divides by 100. A gold number of 0 is compared as text (Masry et al. 2022; Methani et al. 2020).

    Args:
        answer: Of the model.
        gold: Any of which counts.
        tolerance: Largest |answer - gold| / |gold|, inclusive.
        exact_years: Asks for the very number where a gold answer has four characters and starts with "20", which
            preference data are built with: 5 % of a year is a century.
    """
    return float(any(_relaxed(answer, text, tolerance, exact_years) for text in gold))


def contains_word(answer: str, gold: Sequence[str]) -> float:
    """1 where a gold answer stands in the answer as whole words, in either case (Tiny-LVLM), else 0.

    Chinese, Japanese and Korean have no spaces: their characters need no word boundary. Empty gold never counts.
    """
    text = " ".join(answer.lower().split())
    return float(any(_stands_in(" ".join(each.lower().split()), text) for each in gold))


def read_number(text: str) -> float | None:
    """A finite number, "12%" as 0.12; None for anything else (ChartQA's reading: no thousands separators)."""
    text = text.strip()
    percent = text.endswith("%")
    try:
        value = float(text.rstrip("%")) / (100 if percent else 1)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def numbers_close(value: float, wanted: float, tolerance: float) -> bool:
    """|value - wanted| / |wanted| <= tolerance, but for the rounding of binary fractions; False for a wanted 0."""
    return wanted != 0 and abs(value - wanted) <= tolerance * abs(wanted) * (1 + _ROUNDING)


def is_year(text: str) -> bool:
    """Four characters that start with "20" (MMPR's rule for years)."""
    text = text.strip()
    return len(text) == 4 and text.startswith("20")


def _relaxed(answer: str, gold: str, tolerance: float, exact_years: bool) -> bool:
    value, wanted = read_number(answer), read_number(gold)
    if value is None or not wanted:
        return answer.strip().lower() == gold.strip().lower()
    return value == wanted if exact_years and is_year(gold) else numbers_close(value, wanted, tolerance)


def _stands_in(words: str, text: str) -> bool:
    if not words:
        return False
    before = rf"(?<![^\W{_CJK}])" if _WORD.match(words[0]) else ""
    after = rf"(?![^\W{_CJK}])" if _WORD.match(words[-1]) else ""
    return re.search(before + re.escape(words) + after, text) is not None


def _levenshtein():
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ImportError("ANLS needs rapidfuzz: pip install internvl-hub[eval]") from error
    return Levenshtein.distance

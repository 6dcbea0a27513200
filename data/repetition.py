"""How much a text repeats itself: the original's share of repeated 10-grams, and one that also sees endless loops.

Nothing is decided or filtered here; `checks` compares the numbers with `THRESHOLD`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

NGRAM = 10
THRESHOLD = 0.4
"""Share above which the original would leave a row out (InternVL 2.5 report, arXiv 2412.05271, data filtering)."""

# Chinese and Japanese characters and full-width forms, which are written without spaces.
_UNSPACED = "\u2e80-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")


def repeated_ngrams(text: str, n: int = NGRAM) -> float:
    """Distinct n-grams of words that occur more than once / all n-grams; 0 for fewer than n words.

    This is the original's number. It cannot exceed 1/2 and falls towards 0 as a loop goes on: "x x x ..." of 200 words
    has one distinct 10-gram in 191, 0.5 %.
    """
    counts = _count(text.split(), n)
    return _share(sum(count > 1 for count in counts.values()), counts)


def repeated_share(text: str, n: int = NGRAM) -> float:
    """n-grams that have an equal one elsewhere in the text / all n-grams: 1 for an endless loop.

    Words are split at white space, Chinese and Japanese at every character.
    """
    counts = _count(_WORD.findall(text), n)
    return _share(sum(count for count in counts.values() if count > 1), counts)


def _count(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _share(part: int, counts: Counter[tuple[str, ...]]) -> float:
    total = counts.total()
    return part / total if total else 0.0

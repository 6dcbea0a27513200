"""Whether one short answer is contained in another, so that calling the longer one wrong would be unjust.

"a red car" against the gold answer "red" may be right although no verifier says so; such pairs are left out.
"""

from __future__ import annotations

import re
import unicodedata

from .scripts import is_unspaced

_QUOTES = "\"'`*_.,;:!?()[]{}$ \t\n。，；：！？、“”‘’「」『』（）"
_JOINTS = ".,:/"  # between digits they are part of a number, a ratio or a time


def contains_answer(short: str, text: str) -> bool:
    """Whether `short` occurs in `text` as whole words.

    Both are compared under NFKC and case folding with runs of white space as one space, `short` without punctuation
    around it; a single Latin letter, which names an option, keeps its case. An occurrence counts if it is not part of
    a longer word or number: no letter or digit stands directly before or behind it, except beside a character of a
    script that writes no spaces; a number is not found inside another one, as 5 in 1.5, 5,000, -5, 1/5 or 5:30.

    Args:
        short: A short answer; an empty one is contained in nothing.
        text: Where to look.
    """
    short = _normalised(short).strip(_QUOTES)
    if not short:
        return False
    text = _normalised(text)
    if not (len(short) == 1 and short.isascii() and short.isalpha()):
        short, text = short.casefold(), text.casefold()
    overlapping = re.finditer(f"(?={re.escape(short)})", text)
    return any(_is_whole(text, match.start(), match.start() + len(short)) for match in overlapping)


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _is_whole(text: str, start: int, end: int) -> bool:
    before, behind = text[max(0, start - 2) : start], text[end : end + 2]
    if before and _joined(before[-1], text[start]) or behind and _joined(text[end - 1], behind[0]):
        return False
    if text[start].isdigit() and before:
        if before[-1] in _JOINTS and before[:-1].isdigit():
            return False
        if before[-1] in "-−" and not before[:-1].isalnum():  # a sign, not the hyphen of "3-5"
            return False
    return not (text[end - 1].isdigit() and len(behind) == 2 and behind[0] in _JOINTS and behind[1].isdigit())


def _joined(left: str, right: str) -> bool:
    """Whether two neighbouring characters are of one word."""
    return left.isalnum() and right.isalnum() and not is_unspaced(left) and not is_unspaced(right)

"""Which option, or whether yes or no, an answer names: strict readers for verification.

An answer names an option only where it can mean no other: "A cat" names none, "A or B" neither, and "A. dog" none
where A is the cat. The lenient readers of the benchmarks are in `choice_metrics.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_LETTER = re.compile(r"[(\[（【]?\s*([A-Za-z])\s*[)\]）】]?\s*[.:：、,，]?")
_LETTER_AND_TEXT = re.compile(
    r"(?:[(\[（【]\s*([A-Za-z])\s*[)\]）】]\s*[.:：、,，]?|([A-Za-z])\s*[)）.:：、])\s*(\S.*)", re.DOTALL
)
_SENTENCE = re.compile(
    r"(?:so\s+|thus,?\s+|therefore,?\s+)?(?:the\s+)?(?:correct\s+|right\s+|best\s+|final\s+)?"
    r"(?:answer|option|choice)\s*(?:is|:|=)?\s*(?:the\s+)?(?:option|choice)?\s*:?\s+(\S.*)"
    r"|(?:正确)?(?:答案|选项)(?:是|为|选)?\s*[:：]?\s*(?:选项)?\s*(\S.*)|选(?:择)?\s*([A-Za-z].*)",
    re.IGNORECASE | re.DOTALL,
)
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_OTHER_LETTER = re.compile(r"[(\[（]\s?[A-Za-z]\s?[)\]）]|\b[A-Z][).:：、]|\b(?:and|or|not)\s[A-Z]\b|^[A-Za-z]$")
_EDGES = " \t\r\n*$\"'“”‘’"
_YES = set("yes true 是 是的 对 正确 有".split())
_NO = set("no false 否 不 不是 不对 错 错误 没有".split())
_WORDS = re.compile(r"[^\W_]+")


def read_choice(text: str, options: Sequence[str] = ()) -> str | None:
    """The capital letter of the option that `text` names; None where it names none, several or one that is not there.

    Understood are `A`, `a`, `(A)`, `A.`, `A. text`, `(A) text`, the text of an option, and one of these after "the
    answer is" or its like.

    Args:
        text: An answer, or a gold answer.
        options: Their texts, A first, with or without their letters; () where they are unknown, which leaves letters.
    """
    letters = [chr(ord("A") + place) for place in range(min(len(options), 26))]
    texts = dict(zip(letters, map(_option_text, options), strict=False))
    text = _TEXT.sub(r"\1", " ".join(text.split())).strip(_EDGES)
    found = _named(text, texts)
    if found is None and (sentence := _SENTENCE.fullmatch(text)):
        found = _named(next(group for group in sentence.groups() if group).strip(_EDGES), texts)
    return found


def read_yes_no(text: str) -> str | None:
    """The "yes" or "no" that the first word says and no later word denies, else None; "true" is a yes."""
    words = _WORDS.findall(text.lower())
    first, later = words[:1], set(words[1:])
    if first and first[0] in _YES:
        return None if later & _NO else "yes"
    if first and first[0] in _NO:
        return None if later & _YES else "no"
    return None


def _named(text: str, texts: dict[str, str]) -> str | None:
    same = [letter for letter, option in texts.items() if option and option == _plain(text)]
    if same:
        return same[0] if len(same) == 1 else None
    if letter := _LETTER.fullmatch(text):
        return _existing(letter[1], texts)
    if match := _LETTER_AND_TEXT.fullmatch(text):
        found, rest = _existing(match[1] or match[2], texts), _plain(match[3])
        if found and texts:  # "A. dog" names no option where A is another text
            return found if rest == texts[found] else None
        return None if _OTHER_LETTER.search(match[3]) else found
    return None


def _existing(letter: str, texts: dict[str, str]) -> str | None:
    letter = letter.upper()
    return letter if not texts or letter in texts else None


def _option_text(option: str) -> str:
    match = _LETTER_AND_TEXT.fullmatch(option.strip(_EDGES))
    return _plain(match[3] if match else option)


def _plain(text: str) -> str:
    return " ".join(text.strip(_EDGES).rstrip(".。").lower().split())

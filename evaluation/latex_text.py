r"""Short mathematical answers as text: LaTeX in one spelling, and numbers with their units.

Rules on characters alone; no expression is evaluated here (see `maths.py`). Units are kept apart from numbers rather
than dropped, so that 5 cm is not 5 m.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .answers import last_box

_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_TEXT = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mathit|operatorname|mbox)\s*\{([^{}]*)\}")
_SPELLINGS = (
    (re.compile(r"\\(?:left|right|displaystyle|[bB]igg?)(?![A-Za-z])|\\[,;:!]"), ""),
    (re.compile(r"\\ |~"), " "),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\frac\s*([0-9])\s*([0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\cdot(?![A-Za-z])"), r"\\times"),
    (re.compile(r"\\(le|ge|ne)q(?![A-Za-z])"), r"\\\1"),
    (re.compile(r"\^\s*\{?\s*\\circ(?![A-Za-z])\s*\}?|\\degree(?![A-Za-z])"), "°"),
    (re.compile(r"\\([%$])"), r"\1"),
    (re.compile(r"([\^_])\s*\{\s*(\w)\s*\}"), r"\1\2"),
    (re.compile("\u2212"), "-"),
)
_FULL_WIDTH = {place + 0xFEE0: place for place in range(0x21, 0x7F)}
_SPACE = re.compile("(?<![0-9]) | (?![0-9])")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_LONG_WORD = re.compile(r"[^\W\d_]{3,}")
_FUNCTIONS = set(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp sqrt max min gcd lcm det".split()
)

_QUANTITY = re.compile(
    r"([+-]?)\s*[$€£¥₹]?\s*((?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"(\s*)([%°]|[^\W\d_][^\d=+*\\<>()\[\]{},;:|!?^]{0,40}(?:\^[23])?)?"
)
_LONGEST_NUMBER = 400  # characters: more than any float needs
# Units that may touch their number or have one letter; other short ones read as variables (5xy, 5 x, 2 pi).
_SHORT_UNITS = set("m g s h L N J W V A K C F cm mm km dm nm kg mg ml mL ms ft in lb oz Hz Pa eV kJ kW".split())
_NO_UNITS = set("is or and not but no nor if then wrong incorrect".split()) | _FUNCTIONS


@dataclass(frozen=True)
class Quantity:
    """A finite number and the unit behind it: "" for none; a percentage has the unit "%" and its number as written."""

    value: float
    unit: str


def plain_latex(text: str) -> str:
    r"""`text` in one spelling of LaTeX: unwrapped (`$`, `\(`, `\boxed`), `\dfrac` as `\frac`, no `\left` and so on.

    White space becomes single spaces. May be "".
    """
    text = _unwrapped(" ".join(text.translate(_FULL_WIDTH).split()))
    for _ in range(3):  # \text{} inside \text{}
        text = _TEXT.sub(r"\1", text)
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    return " ".join(text.rstrip(". ").split())


def normalize_latex(text: str) -> str:
    """`plain_latex` without white space, but for that between digits (1 2 is not 12) and in texts with words."""
    text = plain_latex(text)
    return text if has_words(text) else _SPACE.sub("", text)


def latex_equal(answer: str, gold: str) -> bool:
    """Whether two texts are the same LaTeX but for spelling; texts of nothing but mark-up compare as they are."""
    first, second = normalize_latex(answer), normalize_latex(gold)
    return first == second if first or second else bool(answer.strip()) and answer.strip() == gold.strip()


def has_words(text: str) -> bool:
    """Whether three or more letters stand together that are neither a command nor a function: not an expression."""
    return any(word.lower() not in _FUNCTIONS for word in _LONG_WORD.findall(_COMMAND.sub(" ", text)))


def read_quantity(text: str) -> Quantity | None:
    """A number, with commas for thousands, a currency sign before it or a unit behind it; None for all else."""
    match = _QUANTITY.fullmatch(text.strip().rstrip("."))
    if not match or len(match[2]) > _LONGEST_NUMBER:
        return None
    value = float(match[1] + match[2].replace(",", ""))
    unit = (match[4] or "").strip()
    return Quantity(value, unit) if math.isfinite(value) and _is_unit(unit, touching=not match[3]) else None


def _is_unit(unit: str, touching: bool) -> bool:
    if unit in ("", "%", "°"):
        return True
    words = unit.partition("^")[0].replace("/", " ").split()
    if _NO_UNITS & {word.lower() for word in words}:
        return False
    if touching and len(words) == 1 and len(words[0]) == 1:
        return False
    return all(word in _SHORT_UNITS or len(word) > 2 or not word.isascii() or len(words) > 1 for word in words)


def _unwrapped(text: str) -> str:
    box = last_box(text)
    if box is not None and box[0] == 0 and box[1] is not None and text.endswith("}"):
        text = box[1].strip()
    for opening, closing in _WRAPPERS:
        inner = text[len(opening) : len(text) - len(closing)]
        if len(text) > len(opening + closing) and text.startswith(opening) and text.endswith(closing):
            return inner.strip() if opening not in inner else text
    return text

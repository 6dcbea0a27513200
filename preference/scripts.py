"""Units of text: words where a script puts spaces between them, characters where it does not.

Han, kana, Thai, Lao, Khmer, Myanmar and Tibetan letters stand alone, each with the marks above and below it; between
them, whatever holds no space is a unit. So English is counted in words and Chinese in characters, and a text with
both needs no threshold at which it turns from one into the other.
"""

from __future__ import annotations

import re

_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u0f00-\u0fff\u1000-\u109f\uaa60-\uaa7f"  # Tibetan, Myanmar
    "\u1780-\u17ff\u19e0-\u19ff"  # Khmer
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029"  # radicals, iteration marks and numerals of Han
    "\u3040-\u30ff\u3100-\u312f\u31f0-\u31ff\uff66-\uff9f"  # kana, bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Han
    "\U0001b000-\U0001b16f\U00020000-\U0003fffd"  # archaic kana, rarer Han
)
# Combining marks of these scripts and for all scripts, variation selectors, joiners: they belong to what is before.
_MARKS = (
    "\u0300-\u036f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece"
    "\u0f18\u0f19\u0f35\u0f37\u0f39\u0f71-\u0f84\u0f86\u0f87\u0f8d-\u0fbc"
    "\u102b-\u103e\u1056-\u1059\u105e-\u1060\u1062-\u1064\u1067-\u106d\u1071-\u1074\u1082-\u108d\u108f\u109a-\u109d"
    "\u17b4-\u17d3\u17dd\u200d\u3099\u309a\uff9e\uff9f\ufe00-\ufe0f\U000e0100-\U000e01ef"
)
_UNIT = re.compile(f"[{_UNSPACED}][{_MARKS}]*|[^\\s{_UNSPACED}]+")
_UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")


def is_unspaced(character: str) -> bool:
    """Whether a character belongs to a script that writes no spaces between words."""
    return _UNSPACED_CHARACTER.fullmatch(character) is not None


def unit_ends(text: str) -> list[int]:
    """Offsets behind each unit of a text, in order; none for a text of white space."""
    return [match.end() for match in _UNIT.finditer(text)]

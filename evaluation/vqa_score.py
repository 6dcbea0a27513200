"""The soft score of VQAv2, OKVQA, TextVQA and VizWiz: answers normalised, ten annotators left out in turn.

Normalisation follows the official evaluation (Antol et al. 2015; VQAEval and TextVQA's answer processor), without its
slips (docs/metrics.md).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

ANNOTATORS = 10
AGREEING = 3  # annotators that make an answer fully right

_NUMBERS = {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'  # "," and "?" are gone before
_PERIOD = re.compile(r"\.(?!\d)")

# Contractions that annotators write without an apostrophe; those with two may lack either.
_ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's i'm i've
isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've shouldn't
somebody'd somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
""".split()
_TWO_APOSTROPHES = """
couldn't've hadn't've he'd've i'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
""".split()
_MANY_APOSTROPHES = ("'ow's'at", "y'all'd've")


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


_CONTRACTIONS = {
    variant: word
    for word in (*_ONE_APOSTROPHE, *_TWO_APOSTROPHES, *_MANY_APOSTROPHES)
    for variant in _without_one_apostrophe(word)
}


def normalize_answer(text: str) -> str:
    """`text` in lower case, without punctuation and articles, small numbers as digits, contractions spelt out.

    May be "" for a text of articles and punctuation alone; `vqa_score` then compares the texts themselves.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    plain = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if beside_space else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", plain).split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_score(answer: str, gold: Sequence[str]) -> float:
    """Soft score of an answer, 0 to 1.

    Ten or more gold answers are those of annotators: each is left out in turn, and the score is the mean of
    min(1, matches among the others / 3). Fewer are alternatives, of which any counts in full.
    """
    wanted = Counter(map(_comparable, gold))
    matches, total = wanted[_comparable(answer)], wanted.total()
    if total < ANNOTATORS:
        return float(matches > 0)
    # Leaving out one of the matches leaves one fewer; leaving out another leaves all.
    left = matches * min(AGREEING, matches - 1) + (total - matches) * min(AGREEING, matches)
    return float(Fraction(left, AGREEING * total))


def _comparable(text: str) -> str:
    return normalize_answer(text) or text.strip().lower()

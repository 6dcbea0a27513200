"""Pairs without a known answer: an answer, and how the model ends its first half when it cannot see (DropoutNTP).

The continuation of half an answer without the picture is fluent and full of things that are not there, which makes it
the rejected answer. Source: arXiv 2411.10442, section 3. The original splits at single spaces, so that Chinese text
has an empty prefix, and puts prefix and continuation together without the space between them; both are mended here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from ..evaluation.answers import parse_response
from ..evaluation.engines import Answer, Engine, Failure, Request, Sampling
from .correctness import CUT, unusable_because
from .scripts import unit_ends

_MARK = "<(?:image|video)>"
_LABEL = r"(?:(?:Image|Video|Frame)[- ]?\d+[ \t]*[:：][ \t]*)?"
_MARK_LINE = re.compile(rf"^[ \t]*{_LABEL}{_MARK}[ \t]*(?:\n|\Z)", re.MULTILINE | re.IGNORECASE)
_MARK_INSIDE = re.compile(rf"{_LABEL}{_MARK}[ \t]?", re.IGNORECASE)


def first_half(answer: str) -> str | None:
    """The first half of an answer: of its words, or of its characters in scripts without spaces (`scripts`).

    With an odd number of these the shorter half, as in the original. It ends with a word, not with the space behind
    it: that belongs to the next word, as in the tokens of all tokenizers that the models use.

    Returns:
        A beginning of `answer`, neither empty nor all of it; None if there is no such half.
    """
    ends = unit_ends(answer)
    return answer[: ends[len(ends) // 2 - 1]] if len(ends) > 1 else None


def without_media(text: str) -> str:
    """A question without its `<image>` and `<video>`, and without the labels before them (`Image-1: `)."""
    return _MARK_INSIDE.sub("", _MARK_LINE.sub("", text)).strip()


def blind_request(request: Request, prefix: str) -> Request:
    """The request without its media, whose answer begins with `prefix`."""
    return replace(request, text=without_media(request.text), images=(), videos=(), prefix=prefix)


def why_not_chosen(answer: Answer, style: str) -> str | None:
    """Why an answer cannot be the chosen one of a pair, or None; `style` as in `parse_response`."""
    if reason := unusable_because(answer.text):
        return f"chosen: {reason}"
    if not answer.complete:
        return f"chosen: {CUT}"
    problem = parse_response(answer.text, style).problem
    if problem is not None:
        return f"chosen: {problem}"
    return "chosen: too short for two halves" if first_half(answer.text) is None else None


def why_not_rejected(continuation: Answer, chosen: str, prefix: str, keep_cut: bool = False) -> str | None:
    """Why `prefix` with its continuation cannot be the rejected answer of a pair, or None.

    Args:
        continuation: What the model wrote after the prefix.
        chosen: The whole answer.
        prefix: Its first half.
        keep_cut: Accept a continuation that was cut at the token limit.
    """
    if reason := unusable_because(continuation.text):
        return f"continuation: {reason}"
    if not continuation.complete and not keep_cut:
        return f"continuation: {CUT}"
    if reason := unusable_because(prefix + continuation.text):
        return f"rejected: {reason}"
    return "rejected: the same as the chosen" if (prefix + continuation.text).split() == chosen.split() else None


class HalfAnswers:
    """An engine that asks another one only what has a prefix.

    An empty request, of a question whose answer has no half to continue, gets an empty answer, and is done. Any other
    request without a prefix, of a question whose answer failed and may yet come, fails. So the batches of
    continuations are those of the questions, whatever became of their first answers.

    Args:
        engine: Continues answers.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.name = engine.name

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Answer] | Failure]:
        """See `Engine.sample`."""
        asked = [request for request in requests if request.prefix]
        results = iter(self.engine.sample(asked, sampling) if asked else [])
        return [next(results) if request.prefix else _unasked(request) for request in requests]


def _unasked(request: Request) -> list[Answer] | Failure:
    return Failure("there is no answer to continue") if request.text else [Answer("")]

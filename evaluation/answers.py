r"""Taking a response apart: the reasoning, the answer, and what is wrong with its shape.

Rules of MMPR's correctness pipeline (tools/reasoning_data_pipeline) for responses to the prompts of `prompts.py`. A
response that breaks them has a `problem`, one of `PROBLEMS`, never an error. What an answer is worth is not judged
here (see `verifiers.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

STYLES = ("direct", "final_answer", "boxed", "think")
PROBLEMS = (
    "empty",  # nothing but white space
    "no_trigger",  # no "Final answer:"
    "many_triggers",  # more than MAX_TRIGGERS of them
    "few_lines",  # fewer than MIN_NEWLINES line breaks: no steps were written
    "no_reasoning",  # nothing before the answer
    "many_lines",  # the answer goes over several lines
    "no_answer",  # nothing after the trigger or inside the box
    "no_box",
    "unclosed_box",  # the braces of the last box never close
    "no_think",  # no </think>, nor <think>
    "unclosed_think",  # <think> without </think>: mostly cut off at the token limit
    "many_thinks",  # more than one </think>
)
MAX_TRIGGERS = 2
MIN_NEWLINES = 2

_TRIGGER = re.compile(
    r"\*{0,3}(?:\bfinal answer\*{0,3}\s*[:：]|(?:最终|最后)?答案\*{0,3}\s*[:：])\*{0,3}", re.IGNORECASE
)
_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped character is taken whole, so that \{ is no brace
_BEFORE_BOX = re.compile(r"(?:\**(?:final answer|answer|答案)\**[ \t]*[:：])?[\s$*]*\Z", re.IGNORECASE)
_BOX_TAIL = 200  # characters before a box in which its "Answer:" is looked for


@dataclass(frozen=True)
class ParsedResponse:
    """A response taken apart.

    Attributes:
        reasoning: What stands before the answer, stripped; "" where there is none or the response has no shape.
        answer: The answer, stripped; None exactly where there is a problem.
        problem: One of `PROBLEMS`, or None.
    """

    reasoning: str
    answer: str | None
    problem: str | None


def parse_response(text: str | None, style: str, strict: bool = True) -> ParsedResponse:
    r"""Reasoning and answer of a response.

    Styles:
        direct: the answer is the stripped text.
        final_answer: what follows the last "Final answer:" or "答案:" (either colon, bold or not), on one line; at
            most two triggers, at least two line breaks in the whole, and reasoning before it.
        boxed: what the last `\boxed{...}` holds, braces inside it balanced.
        think: `<think>...</think>`, then the answer: its last box, or else all of it. The opening tag may be missing,
            as some templates write it into the prompt.

    Args:
        text: What the model wrote.
        style: One of `STYLES`.
        strict: False asks only for an answer, for evaluation: no rule about the number of triggers, lines and tags or
            about reasoning; the answer is then the first line after the last trigger, or what follows the last
            `</think>`.

    Raises:
        ValueError: an unknown style.
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
    if not isinstance(text, str) or not text.strip():
        return _failed("empty")
    if style == "direct":
        return ParsedResponse("", text.strip(), None)
    return {"final_answer": _final_answer, "boxed": _boxed, "think": _think}[style](text, strict)


def last_box(text: str) -> tuple[int, str | None] | None:
    r"""Place and content of the last `\boxed{...}`, None where there is none; content None if it never closes."""
    start, opening = len(text), None
    while opening is None:
        start = text.rfind("\\boxed", 0, start)
        if start < 0:
            return None
        opening = _BOX.match(text, start)
    depth = 1
    for match in _BRACE.finditer(text, opening.end()):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if not depth:
            return start, text[opening.end() : match.start()]
    return start, None


def _failed(problem: str, reasoning: str = "") -> ParsedResponse:
    return ParsedResponse(reasoning.strip(), None, problem)


def _final_answer(text: str, strict: bool) -> ParsedResponse:
    triggers = list(_TRIGGER.finditer(text))
    if not triggers:
        return _failed("no_trigger")
    reasoning = text[: triggers[-1].start()].strip()
    answer = text[triggers[-1].end() :].strip()
    if not strict:
        answer = answer.partition("\n")[0]
    answer = _without_bold(answer)
    if strict and len(triggers) > MAX_TRIGGERS:
        return _failed("many_triggers", reasoning)
    if strict and text.count("\n") < MIN_NEWLINES:
        return _failed("few_lines", reasoning)
    if strict and not reasoning:
        return _failed("no_reasoning")
    if not answer:
        return _failed("no_answer", reasoning)
    if len(answer.splitlines()) > 1:
        return _failed("many_lines", reasoning)
    return ParsedResponse(reasoning, answer, None)


def _without_bold(answer: str) -> str:
    """`**5**` and `5**` (whose opening stood before the trigger) as 5."""
    if answer.endswith("**") and answer.count("**") <= 2:
        return answer.replace("**", "").strip()
    return answer


def _boxed(text: str, strict: bool) -> ParsedResponse:
    found = last_box(text)
    if found is None:
        return _failed("no_box", text)
    start, content = found
    cut = max(0, start - _BOX_TAIL)
    lead = _BEFORE_BOX.search(text, cut, start)
    reasoning = text[: lead.start() if lead else start].strip()
    if content is None:
        return _failed("unclosed_box", reasoning)
    return ParsedResponse(reasoning, content.strip(), None) if content.strip() else _failed("no_answer", reasoning)


def _think(text: str, strict: bool) -> ParsedResponse:
    if "</think>" not in text:
        return _failed("unclosed_think" if "<think>" in text else "no_think", text.replace("<think>", ""))
    before, _, rest = text.rpartition("</think>")
    if strict and "</think>" in before:
        return _failed("many_thinks", before)
    reasoning = before.strip().removeprefix("<think>").strip()
    if strict and not reasoning:
        return _failed("no_reasoning")
    found = last_box(rest)
    if found is not None and found[1] is None:
        return _failed("unclosed_box", reasoning)
    answer = rest.strip() if found is None or found[1] is None else found[1].strip()
    return ParsedResponse(reasoning, answer, None) if answer else _failed("no_answer", reasoning)

"""Pairs of right and wrong answers to questions with a known answer: the first pipeline of MMPR.

A sampled answer is parsed and judged; correct answers are paired with incorrect ones, and with answers that break the
format they were asked for. Source: arXiv 2411.10442, section 3; the original's `tools/reasoning_data_pipeline`, whose
inverted ANLS check is not kept. Everything here is a function of the sampled texts; asking and files are elsewhere.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

from ..evaluation.answers import parse_response
from ..evaluation.engines import Answer
from ..evaluation.questions import Question
from ..evaluation.verifiers import Verdict, verify
from .containment import contains_answer

Kind = Literal["correct", "incorrect", "format", "unusable"]

CUT = "cut at the token limit"
# Of `Verdict.problem`: the verifier gave up, so that the answer may be right.
_UNJUDGED = ("too_long", "timeout", "crash")
# The longest rows of the recipes, 16,384 tokens, are about 65,000 characters of English; more is an accident.
MAX_CHARACTERS = 200_000


@dataclass(frozen=True)
class JudgedAnswer:
    """A sampled answer and what was found.

    Attributes:
        sample: Its place among the samples of its question, from 0.
        text: As the model wrote it.
        kind: `"correct"`, `"incorrect"`, `"format"` (it breaks the format, or was cut), or `"unusable"`: never part of
            a pair.
        short: The short answer that was parsed from it, if any.
        verdict: Of a parsed answer.
        problem: Why it is of the last two kinds.
    """

    sample: int
    text: str
    kind: Kind
    short: str | None = None
    verdict: Verdict | None = None
    problem: str | None = None

    def meta(self) -> dict[str, Any]:
        """As `chosen_meta` or `rejected_meta` of a row."""
        verdict = self.verdict
        return {
            "sample": self.sample,
            "answer": self.short,
            "score": None if verdict is None else verdict.score,
            "method": None if verdict is None else verdict.method,
            "problem": self.problem,
        }


def unusable_because(text: str) -> str | None:
    """Why a text cannot stand in a row of training data, or None."""
    if not text.strip():
        return "empty"
    if len(text) > MAX_CHARACTERS:
        return f"more than {MAX_CHARACTERS:,} characters"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "not valid Unicode"
    return None


def judge(
    question: Question, answers: Sequence[Answer], style: str, task: str, threshold: float = 0.9
) -> list[JudgedAnswer]:
    """What each sampled answer to a question is; in order.

    Args:
        question: Its gold answers and options judge.
        answers: The samples.
        style: Of `parse_response`.
        task: Of `verify`.
        threshold: An answer is correct above this score.
    """

    @cache  # samples agree more often than not
    def verdict_of(short: str) -> Verdict:
        return verify(short, question.answers, task, question.options, threshold)

    return [_judge(sample, answer, style, verdict_of) for sample, answer in enumerate(answers)]


def _judge(sample: int, answer: Answer, style: str, verdict_of: Any) -> JudgedAnswer:
    if reason := unusable_because(answer.text):
        return JudgedAnswer(sample, answer.text, "unusable", problem=reason)
    if not answer.complete:
        return JudgedAnswer(sample, answer.text, "format", problem=CUT)
    parsed = parse_response(answer.text, style)
    if parsed.problem is not None or parsed.answer is None:
        return JudgedAnswer(sample, answer.text, "format", parsed.answer, problem=parsed.problem or "no answer")
    verdict = verdict_of(parsed.answer)
    if verdict.problem in _UNJUDGED and not verdict.correct:
        reason = f"could not be judged: {verdict.problem}"
        return JudgedAnswer(sample, answer.text, "unusable", parsed.answer, verdict, reason)
    return JudgedAnswer(sample, answer.text, "correct" if verdict.correct else "incorrect", parsed.answer, verdict)


@dataclass(frozen=True)
class Caps:
    """Most pairs of a question.

    Attributes:
        correctness: Of a correct and an incorrect answer; None for 15, or 3 in files of more than 500,000 lines, as
            in the original.
        format: Of a correct answer and one that breaks the format; None for the same.
    """

    correctness: int | None = None
    format: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 0:
                raise ValueError(f"the most {name} pairs of a question must be 0 or more, got {value}")

    def of_file(self, lines: int) -> tuple[int, int]:
        """Both caps for a file of so many lines."""
        default = 15 if lines <= 500_000 else 3
        return tuple(default if value is None else value for value in (self.correctness, self.format))  # type: ignore[return-value]


@dataclass(frozen=True)
class PairedAnswers:
    """The pairs of one question.

    Attributes:
        correctness, format: (chosen, rejected) of both kinds.
        duplicates: Samples that were left out because another one is the same.
        contained: Pairs that were left out because the correct answer is contained in the wrong one.
    """

    correctness: tuple[tuple[JudgedAnswer, JudgedAnswer], ...]
    format: tuple[tuple[JudgedAnswer, JudgedAnswer], ...]
    duplicates: int
    contained: int


def pair(judged: Sequence[JudgedAnswer], question: Question, caps: tuple[int, int], seed: int) -> PairedAnswers:
    """Pairs the answers to a question; which pairs are kept depends on the seed and the question's key alone.

    Equal texts, but for white space around them, are one answer. A wrong answer is no counterpart to a correct one if
    it contains its short answer or a gold answer as whole words (`contains_answer`); format failures are, since there
    it is the form that is wrong. Under a cap every answer appears as often as every other, or once more.

    Args:
        judged: From `judge`.
        question: What was asked.
        caps: Most correctness pairs and most format pairs.
        seed: Of the choice.
    """
    usable = [answer for answer in judged if answer.kind != "unusable"]
    different = _without_duplicates(usable)
    kinds = {kind: [answer for answer in different if answer.kind == kind] for kind in get_args(Kind)}
    contained = 0

    @cache
    def is_contained(short: str, wrong: str) -> bool:
        return any(contains_answer(right, wrong) for right in (short, *question.answers))

    pairs: dict[str, list[tuple[JudgedAnswer, JudgedAnswer]]] = {"incorrect": [], "format": []}
    for kind, cap in zip(pairs, caps, strict=True):
        for chosen, rejected in _spread(kinds["correct"], kinds[kind], f"{seed} {kind} {question.key}"):
            if len(pairs[kind]) >= cap:
                break
            if kind == "incorrect" and is_contained(chosen.short or "", rejected.short or ""):
                contained += 1
            else:
                pairs[kind].append((chosen, rejected))
    duplicates = len(usable) - len(different)
    return PairedAnswers(tuple(pairs["incorrect"]), tuple(pairs["format"]), duplicates, contained)


def _without_duplicates(answers: Sequence[JudgedAnswer]) -> list[JudgedAnswer]:
    """The first of equal texts, in order; one that was cut gives way to one that was not."""
    kept: dict[str, JudgedAnswer] = {}
    for answer in answers:
        text = answer.text.strip()
        if text not in kept or (kept[text].problem == CUT and answer.problem != CUT):
            kept[text] = answer
    return list(kept.values())


def _spread(
    left: Sequence[JudgedAnswer], right: Sequence[JudgedAnswer], seed: str
) -> Iterator[tuple[JudgedAnswer, JudgedAnswer]]:
    """Every pair once; the first ones, however many, use all answers of a side about equally often."""
    if not left or not right:
        return
    generator = random.Random(seed)
    left, right = (generator.sample(side, len(side)) for side in (left, right))
    for number in range(len(left) * len(right)):
        # Going around both sides meets a pair again after lcm steps; one side is then moved on by one.
        turn = number // math.lcm(len(left), len(right))
        yield left[number % len(left)], right[(number + turn) % len(right)]

"""Verifiers: whether an answer is right, for data that are built from answers and for voting.

Rules of MMPR's correctness pipeline (tools/reasoning_data_pipeline): each data set has its verifiers, the best score
counts, and an answer is right above a threshold. Stricter than benchmarks: an answer that hedges between options, or
that merely holds the gold text, is wrong. Any text gets a verdict, never an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .boxes import GROUNDING_HIT, box_iou, read_boxes, relative_box
from .choices import read_choice, read_yes_no
from .latex_text import latex_equal
from .maths import MATHS_PROBLEMS, maths_equal
from .text_metrics import anls, contains_word, exact_match, relaxed_accuracy
from .vqa_score import ANNOTATORS, vqa_score

THRESHOLD = 0.9
LONGEST = 10_000  # characters of an answer or a gold text; longer ones must be equal
VERDICT_PROBLEMS = (
    "empty",  # no answer, or white space
    "no_gold",
    "no_choice",  # the answer names no option, or several
    "no_box",
    "no_yes_no",
    *MATHS_PROBLEMS,  # too_long, timeout, crash, unparsable
)


@dataclass(frozen=True)
class Verdict:
    """What an answer is worth.

    Attributes:
        score: 0 to 1.
        correct: Whether the score is above the threshold.
        method: The verifier whose score counts.
        problem: Why there is no better score, of `VERDICT_PROBLEMS`; None for correct answers and plainly wrong ones.
    """

    score: float
    correct: bool
    method: str
    problem: str | None


Scored = tuple[float, str | None]
Verifier = Callable[[str, Sequence[str], Sequence[str]], Scored]


def _exact(answer: str, gold: Sequence[str], options: Sequence[str]) -> Scored:
    return exact_match(answer, gold), None


def _relaxed(answer: str, gold: Sequence[str], options: Sequence[str]) -> Scored:
    return relaxed_accuracy(answer, gold, exact_years=True), None


def _anls(answer: str, gold: Sequence[str], options: Sequence[str]) -> Scored:
    """On single spaces: the published length counts all white space, so that padding would raise a wrong score."""
    return anls(" ".join(answer.split()), [" ".join(text.split()) for text in gold]), None


def _vqa(answer: str, gold: Sequence[str], options: Sequence[str]) -> Scored:
    return vqa_score(answer, gold), None


def _choice(answer: str, gold: Sequence[str], options: Sequence[str]) -> Scored:
    """Letters with or without brackets, "A. text" and option texts; both sides must name the same option."""
    found = read_choice(answer, options)
    if found is None:
        return 0.0, "no_choice"
    return float(any(read_choice(text, options) == found for text in gold)), None


def _math(answer: str, gold: Sequence[str], options: Sequence[str]) -> Scored:
    result = maths_equal(answer, gold)
    return float(result.correct), result.problem


def _latex(answer: str, gold: Sequence[str], options: Sequence[str]) -> Scored:
    return float(any(latex_equal(answer, text) for text in gold)), None


def _box(answer: str, gold: Sequence[str], options: Sequence[str]) -> Scored:
    """All boxes of a gold text met in order, as many as it has, each with an IoU of at least 0.5."""
    found = [relative_box(box) for box in read_boxes(answer)]
    if not found:
        return 0.0, "no_box"
    wanted = [[relative_box(box) for box in read_boxes(text)] for text in gold]
    return float(
        any(
            len(boxes) == len(found)
            and all(box_iou(first, second) >= GROUNDING_HIT for first, second in zip(found, boxes, strict=True))
            for boxes in wanted
        )
    ), None


def _contains(answer: str, gold: Sequence[str], options: Sequence[str]) -> Scored:
    return contains_word(answer, gold), None


def _yes_no(answer: str, gold: Sequence[str], options: Sequence[str]) -> Scored:
    found = read_yes_no(answer)
    if found is None:
        return 0.0, "no_yes_no"
    return float(any(read_yes_no(text) == found for text in gold)), None


_SINGLE: dict[str, Verifier] = {
    "exact": _exact,
    "relaxed": _relaxed,
    "anls": _anls,
    "vqa": _vqa,
    "choice": _choice,
    "math": _math,
    "latex": _latex,
    "box": _box,
    "contains": _contains,
    "yes_no": _yes_no,
}

# Task to the verifiers whose best score counts, cheap ones first.
VERIFIERS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in _SINGLE},
    "auto": ("vqa", "choice", "math"),
    "geometry": ("relaxed", "vqa", "choice", "math"),
    "geometry_latex": ("relaxed", "vqa", "choice", "latex", "math"),
}

_DATASET_TASKS = {
    "chartqa": "relaxed",
    "docvqa": "anls",
    "infovqa": "anls",
    "infographicsvqa": "anls",
    "sroie": "geometry",
    "clevrmath": "geometry",
    "geos": "geometry",
    "geometry": "geometry",
    "geometry3k": "geometry",
    "mavis": "geometry_latex",
}


def task_of_dataset(name: str) -> str:
    """The task that MMPR verifies a data set's answers with, "auto" for all that have no entry of their own.

    Args:
        name: Such as "ChartQA" or "docvqa_train"; case and separators do not matter, and what follows a known name
            may be a split, a version or a language.
    """
    plain = re.sub(r"[\W_]+", "", name.lower())
    known = [dataset for dataset in _DATASET_TASKS if plain.startswith(dataset)]
    return _DATASET_TASKS[max(known, key=len)] if known else "auto"


def verify(
    answer: str | None,
    gold: Sequence[str],
    task: str = "auto",
    options: Sequence[str] = (),
    threshold: float = THRESHOLD,
) -> Verdict:
    """Judge an answer.

    Args:
        answer: Without reasoning (see `answers.parse_response`); None where there is none.
        gold: Any of which counts; ten or more are the votes of annotators for "vqa".
        task: Key of `VERIFIERS`. "auto" is MMPR's default: VQA score, choice and mathematics, the best of which
            counts. Relaxed accuracy is left to the data sets that want it: 5 % is much for a count.
        options: Texts of the options, for "choice".
        threshold: The score must be above it.

    Raises:
        ValueError: an unknown task.
        ImportError: the task needs a package of the extra `eval` that is missing.
    """
    if task not in VERIFIERS:
        raise ValueError(f"task must be one of {', '.join(VERIFIERS)}, got {task!r}")
    gold = [gold] if isinstance(gold, str) else gold
    wanted = [_cleaned(text) for text in gold if isinstance(text, str) and text.strip()]
    text = _cleaned(answer) if isinstance(answer, str) else ""
    if not text.strip() or not wanted:
        return Verdict(0.0, False, VERIFIERS[task][0], "no_gold" if text.strip() else "empty")
    if len(text) > LONGEST or max(map(len, wanted)) > LONGEST:
        score = float(text.strip() in {each.strip() for each in wanted})
        return Verdict(score, score > threshold, VERIFIERS[task][0], None if score else "too_long")
    options = [_cleaned(option) for option in options]
    agreed = _agreed(wanted, threshold)
    best, problems = Verdict(0.0, False, VERIFIERS[task][0], None), []
    for name in VERIFIERS[task]:
        score, problem = _SINGLE[name](text, wanted if name in (task, "vqa") else agreed, options)
        problems.append(problem)
        if score > best.score:
            best = Verdict(score, score > threshold, name, None)
        if best.score >= 1.0:
            break
    return best if best.correct else Verdict(best.score, False, best.method, _telling(problems))


def _agreed(gold: Sequence[str], threshold: float) -> Sequence[str]:
    """Of the votes of annotators those that are right by themselves: one vote must not count in full beside "vqa"."""
    return gold if len(gold) < ANNOTATORS else [text for text in gold if vqa_score(text, gold) > threshold]


def _telling(problems: Sequence[str | None]) -> str | None:
    """The problem of a single verifier; of several, one that kept an answer from being judged at all."""
    if len(problems) == 1:
        return problems[0]
    return next((each for each in problems if each in ("too_long", "timeout", "crash")), None)


# Zero-width and direction marks, which change what a text is but not what it says.
_INVISIBLE = dict.fromkeys([0xFEFF, 0x00AD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x206A)])


def _cleaned(text: str) -> str:
    return text.translate(_INVISIBLE)
